"""Tests of `pallas_kernels/sampling/sharded.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.sampling import sample, sharded_sample

B = 12
AXES = ("stage", "tensor")

FILTERS = {
    "top-p": {"top_p": 0.9, "kept": "bits", "temperature": 0.7},
    "top-k and top-p": {"top_k": 20, "top_p": 0.9, "kept": "ids"},
    "union": {"top_k": 20, "top_p": 0.5, "union": True, "kept": "ids"},
    "large top-k and top-p": {"top_k": 300, "top_p": 0.9, "kept": "bits"},
    "min-p": {"min_p": 0.05, "kept": "bits"},
    "nothing": {},
    "nothing, recorded": {"kept": "bits"},
}


def mesh_of(*shape: int):
    names = ("data", *AXES)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3)


def sharded(mesh, logits, uniforms, vocab_size, forbidden=None, **options):
    """Cut rows over data and the vocabulary over the other axes, and draw."""
    draw = functools.partial(
        sharded_sample, axes=AXES, vocab_size=vocab_size, **options
    )
    run = lambda x, u, f: tuple(draw(x, u, forbidden=f))
    bits, rows = options.get("kept") == "bits", P("data")
    cut = P("data", AXES)
    kept = None if "kept" not in options else cut if bits else rows
    return jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(cut, rows, cut if forbidden is not None else None),
            out_specs=(rows, rows, rows, kept),
            check_vma=False,
        )
    )(logits, uniforms, forbidden)


def assert_drawn_alike(found, expected):
    tokens, logprobs, entropy, kept = found
    np.testing.assert_array_equal(tokens, expected.tokens)
    np.testing.assert_allclose(logprobs, expected.logprobs, atol=1e-5)
    np.testing.assert_allclose(entropy, expected.entropy, atol=1e-5)
    if expected.kept is not None:
        words = expected.kept.shape[1]
        np.testing.assert_array_equal(kept[:, :words], expected.kept)
        assert not np.any(np.asarray(kept)[:, words:])


FAST = (("top-p", (1, 1, 8)), ("union", (2, 2, 2)), ("nothing", (2, 2, 2)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(n, s, marks=() if (n, s) in FAST else pytest.mark.slow)
        for n in FILTERS
        for s in ((2, 2, 2), (1, 1, 8))
    ],
)
def test_parts_of_the_vocabulary_draw_as_the_whole(name, shape):
    # 8 parts of 96 tokens: every other one begins amid a block. 740 of them are real,
    # and the second half of the rows has many ties.
    logits = 2 * jax.random.normal(jax.random.key(0), (B, 768))
    logits = jnp.concatenate([logits[: B // 2], jnp.round(logits[B // 2 :])])
    uniforms = jax.random.uniform(jax.random.key(1), (B, 2))
    options = FILTERS[name]
    expected = sample(logits[:, :740], uniforms, **options)
    assert_drawn_alike(
        sharded(mesh_of(*shape), logits, uniforms, 740, **options), expected
    )


@pytest.mark.parametrize("name", ["top-p", "nothing, recorded"])
def test_forbidden_tokens_of_a_part_are_those_of_the_whole(name):
    logits = jax.random.normal(jax.random.key(0), (B, 768))
    forbidden = jax.random.bernoulli(jax.random.key(2), 0.3, logits.shape)
    uniforms = jax.random.uniform(jax.random.key(1), (B, 2))
    options = FILTERS[name]
    expected = sample(logits, uniforms, forbidden=forbidden, **options)
    mesh = mesh_of(2, 1, 4)
    found = sharded(mesh, logits, uniforms, 768, forbidden, **options)
    assert_drawn_alike(found, expected)


def test_equal_logits_are_kept_by_the_lower_id_across_parts():
    logits, uniforms = jnp.zeros((2, 768)), jnp.full((2, 2), 0.999)
    options = {"top_k": 290, "kept": "bits"}
    tokens, _, _, kept = sharded(mesh_of(1, 2, 4), logits, uniforms, 768, **options)
    ones = np.unpackbits(np.asarray(kept).view(np.uint8), axis=1, bitorder="little")
    np.testing.assert_array_equal(ones, np.arange(768)[None] < [[290]] * 2)
    np.testing.assert_array_equal(tokens, [289, 289])


@pytest.mark.parametrize("name", ["top-p", "top-k and top-p"])
def test_logits_are_not_gathered(name):
    size, vocab_size = 16, 16384
    logits = jax.ShapeDtypeStruct((size, vocab_size), jnp.float32)
    uniforms = jax.ShapeDtypeStruct((size, 2), jnp.float32)
    run = functools.partial(
        sharded, mesh_of(1, 1, 8), vocab_size=vocab_size, **FILTERS[name]
    )
    text = jax.jit(run).lower(logits, uniforms).compile().as_text()
    assert text is not None
    assert "all-reduce" in text or "all-gather" in text
    assert f"f32[{size},{vocab_size}]" not in text


def test_words_that_two_parts_would_share_are_refused():
    logits, uniforms = jnp.zeros((2, 8 * 40)), jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="Parts of 40 tokens do not fill words"):
        sharded(mesh_of(1, 1, 8), logits, uniforms, 320, top_p=0.5, kept="bits")
