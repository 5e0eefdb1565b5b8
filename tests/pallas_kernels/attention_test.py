"""Attention: what is seen, and that both implementations compute it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import api, attention, cached_attention, reference

IMPLEMENTATIONS = ("dense", "blocked")


def draw(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def draw_qkv(num_tokens, *, batch=2, heads=6, kv_heads=3, head_dim=10):
    return (
        draw(0, batch, num_tokens, heads, head_dim),
        draw(1, batch, num_tokens, kv_heads, head_dim),
        draw(2, batch, num_tokens, kv_heads, head_dim),
    )


def plain_attention(query, key, value, visible):
    """The definition: every query head with its own copy of its keys and values."""
    copies = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    scores = jnp.einsum("bthk,bshk->bhts", query, key) / query.shape[-1] ** 0.5
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), value)


def packed_visibility(segment_ids, causal):
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & jnp.tri(segment_ids.shape[1], dtype=bool)[None] if causal else same


def packed_segments(num_tokens):
    """Row 0: three sequences and padding; row 1: one sequence."""
    place = np.arange(num_tokens) / num_tokens
    first = np.select([place < 0.3, place < 0.35, place < 0.9], [1, 2, 3], 0)
    return jnp.asarray(np.stack([first, np.ones(num_tokens, int)]), jnp.int32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_alone_in_its_segment_returns_its_value(implementation):
    query, key, value = draw_qkv(3, heads=3)
    segment_ids = jnp.broadcast_to(jnp.arange(3), (2, 3))
    out = attention(
        query, key, value, segment_ids=segment_ids, implementation=implementation
    )
    np.testing.assert_allclose(out, value, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_keys_are_weighted_by_the_softmax_of_their_scores(implementation):
    # Head width 4: scores 2·1/√4 = 1 and 0, so the weights are e/(e+1) and 1/(e+1).
    query = jnp.asarray([[[[9.0, 0, 0, 0]], [[2.0, 0, 0, 0]]]])
    key = jnp.asarray([[[[1.0, 0, 0, 0]], [[0.0, 5, 0, 0]]]])
    value = jnp.asarray([[[[1.0, 0, 0, 0]], [[0.0, 1, 0, 0]]]])
    out = attention(
        query,
        key,
        value,
        segment_ids=jnp.ones((1, 2), jnp.int32),
        implementation=implementation,
    )
    share = np.e / (np.e + 1)
    expected = [[1, 0, 0, 0], [share, 1 - share, 0, 0]]
    np.testing.assert_allclose(out[0, :, 0], expected, atol=1e-6)


# 40 tokens are one padded block; 600 are three blocks of queries, two of keys.
@pytest.mark.parametrize("num_tokens", (40, 600))
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_and_gradients_are_those_of_the_definition(
    implementation, causal, num_tokens
):
    qkv = draw_qkv(num_tokens)
    segment_ids = packed_segments(num_tokens)
    weights = draw(3, *qkv[0].shape)

    def by_definition(query, key, value):
        visible = packed_visibility(segment_ids, causal)
        out = plain_attention(query, key, value, visible)
        return jnp.vdot(out, weights), out

    def by_implementation(query, key, value):
        out = attention(
            query,
            key,
            value,
            segment_ids=segment_ids,
            causal=causal,
            implementation=implementation,
        )
        return jnp.vdot(out, weights), out

    gradients = []
    for function in (by_definition, by_implementation):
        both = jax.jit(jax.grad(function, argnums=(0, 1, 2), has_aux=True))(*qkv)
        gradients.append(both)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *gradients)


def test_bfloat16_is_within_its_rounding_of_float32():
    qkv = draw_qkv(300)
    segment_ids = packed_segments(300)
    short = tuple(x.astype(jnp.bfloat16) for x in qkv)
    for implementation in IMPLEMENTATIONS:
        out = attention(*short, segment_ids=segment_ids, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        exact = attention(
            *(x.astype(jnp.float32) for x in short), segment_ids=segment_ids
        )
        # A weight and the output are each rounded by at most 2^-9 of up to about 4.
        np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


def test_a_long_row_makes_no_array_of_all_scores():
    num_tokens = 4096
    qkv = draw_qkv(8, batch=1, heads=2, kv_heads=1, head_dim=4)
    shapes = [jax.ShapeDtypeStruct((1, num_tokens, *x.shape[2:]), x.dtype) for x in qkv]
    segment_ids = jnp.ones((1, num_tokens), jnp.int32)

    def total(query, key, value):
        return attention(query, key, value, segment_ids=segment_ids).sum()

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*shapes).compile()
    # The scores of one row would take 2 heads x 4096² x 4 bytes = 134 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 20e6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cached_attention_sees_from_the_first_slot_to_its_own(implementation):
    num_slots, start, num_tokens = 12, 5, 3
    first_slot = jnp.asarray([0, 4])
    query = draw(0, 2, num_tokens, 6, 10)
    keys, values = draw(1, 2, 3, num_slots, 10), draw(2, 2, 3, num_slots, 10)
    out = cached_attention(
        query,
        keys,
        values,
        start=jnp.int32(start),
        first_slot=first_slot,
        implementation=implementation,
    )
    slot = np.arange(num_slots)
    own = start + np.arange(num_tokens)
    first = np.asarray(first_slot)[:, None, None]
    visible = jnp.asarray((slot >= first) & (slot <= own[None, :, None]))
    key, value = (jnp.swapaxes(x, 1, 2) for x in (keys, values))
    expected = plain_attention(query, key, value, visible)
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_before_the_first_slot_are_finite(implementation):
    query = draw(0, 1, 4, 2, 10)
    keys = draw(1, 1, 2, 6, 10)
    out = cached_attention(
        query,
        keys,
        keys,
        start=jnp.int32(0),
        first_slot=jnp.asarray([3]),
        implementation=implementation,
    )
    assert np.isfinite(out).all()


def test_a_cache_of_another_dtype_is_read_in_that_of_the_query():
    query = draw(0, 1, 1, 2, 10)
    keys = draw(1, 1, 2, 6, 10)
    slots = {"start": jnp.int32(5), "first_slot": jnp.asarray([0])}
    out = cached_attention(query, keys.astype(jnp.bfloat16), keys, **slots)
    assert out.dtype == query.dtype
    np.testing.assert_allclose(
        out, cached_attention(query, keys, keys, **slots), atol=0.02
    )


def test_long_rows_are_blocked_and_short_ones_dense():
    assert api._choose(None, api.LONGEST_DENSE_ROW) is reference.dense
    assert api._choose(None, api.LONGEST_DENSE_ROW + 1) is reference.blocked


def test_unknown_implementation_is_refused_by_name():
    query, key, value = draw_qkv(4)
    with pytest.raises(ValueError, match=r"'flash'.*'dense' and 'blocked'"):
        attention(
            query,
            key,
            value,
            segment_ids=jnp.ones((2, 4), jnp.int32),
            implementation="flash",
        )


def test_query_heads_that_do_not_split_are_refused():
    query, key, value = draw_qkv(4, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="4 query heads do not split over 3"):
        attention(query, key, value, segment_ids=jnp.ones((2, 4), jnp.int32))
