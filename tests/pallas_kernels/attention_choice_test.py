"""Which implementation attends, why, and what cuDNN is asked for."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._dispatch import Device
from pallas_kernels.attention import api, attention, cudnn, explain, tokamax

CPU = Device(platform="cpu")
H200 = Device(platform="gpu", compute_capability=(9, 0))
A100 = Device(platform="gpu", compute_capability=(8, 0))

through_xla = jax.jit(
    functools.partial(cudnn.attend, through="xla"), static_argnames=("window",)
)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def draw_qkv(num_tokens, *, batch=2):
    """Of six heads, 10 wide, with three key heads."""
    heads = (6, 3, 3)
    return tuple(draw(seed, batch, num_tokens, n, 10) for seed, n in enumerate(heads))


def explain_row(num_tokens=512, head_dim=128, dtype=jnp.bfloat16, **options):
    shape = (2, num_tokens, 8, head_dim)
    return explain(shape, shape, dtype, **({"device": H200} | options))


def test_long_rows_are_blocked_and_short_ones_dense():
    longest = api.LONGEST_DENSE_ROW
    assert explain_row(longest).startswith("attention runs as 'dense'.")
    answer = explain_row(longest + 1)
    assert answer.startswith("attention runs as 'blocked'.")
    assert "Not as 'dense': rows have 1025 tokens, more than 1024." in answer


def test_many_short_rows_are_blocked():
    # 256 rows of 1024 tokens and 32 heads: 2^33 scores.
    rows, keys = (256, 1024, 32, 128), (256, 1024, 8, 128)
    answer = explain(rows, keys, jnp.bfloat16, device=H200)
    assert answer.startswith("attention runs as 'blocked'.")
    assert f"there are {2**33} scores, more than {2**30}" in answer
    few = (2, 1024, 32, 128), (2, 1024, 8, 128)
    answer = explain(*few, jnp.bfloat16, device=H200)
    assert answer.startswith("attention runs as 'dense'.")


def test_cudnn_attends_rows_of_one_segment_on_a_gpu():
    answer = explain_row(is_packed=False, window=100, scale=0.1)
    assert answer == "attention runs as 'cudnn'."
    wide = explain_row(is_packed=False, head_dim=256)
    assert wide.startswith("attention runs as 'cudnn'")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_packed": True}, "rows are packed"),
        ({"causal": False}, "this is not causal"),
        ({"device": CPU}, "this is compiled for cpu"),
        ({"device": Device(platform="gpu", is_present=False)}, "has no GPU"),
        ({"dtype": jnp.float32}, "not in float32"),
        ({"head_dim": 20}, "heads are 20 wide; cuDNN takes multiples of 8 up to 256"),
        ({"head_dim": 256, "device": A100}, "multiples of 8 up to 128"),
        ({"soft_cap": 50.0}, "does not cap scores, here at 50.0"),
        ({"window": "traced"}, "the window is traced"),
        ({"scale": "traced"}, "the scale is traced"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_reason_against_cudnn_is_said(options, reason):
    answer = explain_row(**({"is_packed": False} | options))
    assert not answer.startswith("attention runs as 'cudnn'")
    assert reason in answer
    with pytest.raises(ValueError, match=re.escape(reason)):
        explain_row(**({"is_packed": False} | options), implementation="cudnn")


def test_an_implementation_asked_for_by_name_is_refused_with_the_reason():
    query, key, value = draw_qkv(4)
    with pytest.raises(ValueError, match=r"compiled for cpu.*chooses one"):
        attention(
            query,
            key,
            value,
            segment_ids=jnp.ones((2, 4), jnp.int32),
            is_packed=False,
            implementation="cudnn",
        )


def test_the_call_to_cudnn_means_what_dense_computes():
    # JAX computes the same call without cuDNN: the same window, scale and causality.
    qkv, out_bar = draw_qkv(40), draw(3, 2, 40, 6, 10)
    segment_ids = jnp.ones((2, 40), jnp.int32).at[1, 25:].set(0)
    is_token = (segment_ids != 0)[:, :, None, None]
    options = {"segment_ids": segment_ids, "window": 7, "scale": 0.3}
    call = functools.partial(cudnn.attend, through="xla", **options)
    plain = functools.partial(attention, implementation="dense", **options)
    # Cotangents of padding must not reach the tokens of the segment.
    masked = jnp.where(is_token, out_bar, 0)

    @jax.jit
    def both(qkv, out_bar, masked):
        out, transposed = jax.vjp(call, *qkv)
        expected, plainly_transposed = jax.vjp(plain, *qkv)
        return (out, *transposed(out_bar)), (expected, *plainly_transposed(masked))

    (out, *bars), (expected, *expected_bars) = both(qkv, out_bar, masked)
    np.testing.assert_allclose(out, jnp.where(is_token, expected, 0), atol=1e-6)
    for x, y in zip(bars, expected_bars, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_window_longer_than_the_row_is_none_to_cudnn():
    qkv, segment_ids = draw_qkv(9), jnp.ones((2, 9), jnp.int32)
    call = functools.partial(through_xla, *qkv, segment_ids=segment_ids)
    np.testing.assert_array_equal(call(window=9), call())
    assert np.abs(call(window=8) - call()).max() > 1e-3


def test_rows_of_more_than_one_segment_are_not_attended_as_one():
    segment_ids = jnp.asarray(
        [[1, 1, 1, 1], [3, 3, 0, 0], [0, 0, 0, 0], [1, 1, 2, 2], [0, 1, 1, 1]]
    )
    is_single = cudnn.has_one_segment(segment_ids)
    np.testing.assert_array_equal(is_single, [True, True, True, False, False])
    assert not cudnn.has_one_segment(jnp.asarray([[1, 0, 1, 0]]))[0]
    query, key, value = draw_qkv(4, batch=5)
    out = through_xla(query, key, value, segment_ids=segment_ids)
    is_finite = np.isfinite(out).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(is_finite, is_single)
    np.testing.assert_array_equal(out[1, 2:], 0)


def test_tokamax_attends_packed_rows_on_hopper_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(tokamax, "is_installed", lambda: True)
    for head_dim in (64, 128):
        answer = explain_row(head_dim=head_dim, window="traced", soft_cap=30.0)
        assert answer.startswith("attention runs as 'tokamax'.")
    for options, reason in (
        ({"device": A100}, "its kernel is taken on Hopper"),
        ({"device": CPU}, "needs an NVIDIA GPU, and this is for cpu"),
        ({"dtype": jnp.float32}, "not in float32"),
        ({"head_dim": 80}, "heads are 80 wide; it takes 64, 128"),
        ({"causal": False}, "this is not causal"),
        ({"scale": "traced"}, "the scale is traced"),
    ):
        answer = explain_row(**options)
        assert not answer.startswith("attention runs as 'tokamax'."), options
        assert reason in answer
    monkeypatch.setattr(tokamax, "is_installed", lambda: False)
    assert "`pip install realjax[tokamax]`" in explain_row()


def test_the_first_key_of_a_query_says_segments_and_windows():
    segment_ids = jnp.asarray([[3, 3, 3, 5, 5, 0, 0], [1, 1, 1, 1, 1, 1, 2]], jnp.int32)
    whole = [[0, 0, 0, 3, 3, 5, 5], [0, 0, 0, 0, 0, 0, 6]]
    np.testing.assert_array_equal(tokamax.first_key(segment_ids, None), whole)
    near = [[0, 0, 1, 3, 3, 5, 5], [0, 0, 1, 2, 3, 4, 6]]
    for window in (2, jnp.int32(2)):
        np.testing.assert_array_equal(tokamax.first_key(segment_ids, window), near)
