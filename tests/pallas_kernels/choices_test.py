"""On an H200, every operation of 1B and 8B models names its kernel."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import attention, linear_logprob, paged_attention, sampling
from pallas_kernels._dispatch import H200, Device
from pallas_kernels.attention import tokamax
from pallas_kernels.interval_copy import Block
from pallas_kernels.interval_copy.api import explain_pack

A100 = Device(platform="gpu", kind="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0))
NUM_ROWS = 256

MODELS = {
    "llama-3.2-1b": (32, 8, 64, 2048, 128256),
    "llama-3.1-8b": (32, 8, 128, 4096, 128256),
    "qwen2.5-7b": (28, 4, 128, 3584, 152064),
}
"""Query heads, key heads, width of one, of the model, and the vocabulary."""

models = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "width", "vocab_size"),
    MODELS.values(),
    ids=MODELS,
)


@models
def test_kernels_serve_models_on_hopper(heads, kv_heads, head_dim, width, vocab_size):
    pages = (32, NUM_ROWS * 32, kv_heads, 32, head_dim)
    for num_tokens in (1, 64):
        query = (NUM_ROWS, num_tokens, heads, head_dim)
        for stored, is_scaled in (
            (jnp.bfloat16, False),
            (jnp.int8, True),
            (jnp.uint8, True),
        ):
            answer = paged_attention.explain(
                *(query, pages, 32, jnp.bfloat16),
                pages_dtype=stored,
                is_scaled=is_scaled,
                device=H200,
            )
            assert answer.startswith("paged attention runs as 'mosaic'."), answer
    for kernel_dtype in (jnp.float32, jnp.bfloat16):
        answer = linear_logprob.explain(
            *((16384, width), (width, vocab_size), jnp.bfloat16),
            kernel_dtype=kernel_dtype,
            device=H200,
        )
        assert answer.startswith("linear_logprob runs as 'mosaic'."), answer
    for filters in ({"top_p": 0.9}, {"top_k": 50}, {"top_k": 50, "top_p": 0.95}):
        answer = sampling.explain((NUM_ROWS, vocab_size), device=H200, **filters)
        assert answer.startswith("sampling runs as 'mosaic'."), answer


@models
def test_what_has_no_matrix_products_is_a_kernel_on_ampere_too(
    heads, kv_heads, head_dim, width, vocab_size
):
    answer = sampling.explain((NUM_ROWS, vocab_size), device=A100, top_p=0.9)
    assert answer.startswith("sampling runs as 'mosaic'."), answer
    answer = linear_logprob.explain(
        (16384, width), (width, vocab_size), jnp.bfloat16, device=A100
    )
    assert answer.startswith("linear_logprob runs as 'chunked'."), answer
    answer = paged_attention.explain(
        *((NUM_ROWS, 1, heads, head_dim), (32, 8192, kv_heads, 32, head_dim), 32),
        jnp.bfloat16,
        device=A100,
    )
    assert answer.startswith("paged attention runs as 'gathered'."), answer


@pytest.mark.parametrize("device", [H200, A100], ids=["h200", "a100"])
def test_many_blocks_are_copied_by_the_kernel(device):
    array = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    blocks = [Block(input=0, size=(1, 1024), start=(n, 0)) for n in range(256)]
    answer = explain_pack([array], blocks, dtype=jnp.bfloat16, device=device)
    assert answer.startswith("pack runs as 'mosaic'."), answer
    answer = explain_pack([array], blocks[:1], dtype=jnp.bfloat16, device=device)
    assert answer.startswith("pack runs as 'slices'."), answer


@models
def test_packed_rows_are_attended_by_tokamax_where_it_is(
    heads, kv_heads, head_dim, width, vocab_size, monkeypatch
):
    monkeypatch.setattr(tokamax, "is_installed", lambda: True)
    answer = attention.explain(
        (8, 4096, heads, head_dim),
        (8, 4096, kv_heads, head_dim),
        jnp.bfloat16,
        device=H200,
    )
    assert answer.startswith("attention runs as 'tokamax'."), answer
