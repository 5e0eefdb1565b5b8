"""Attention: what is seen, and that both implementations compute it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import api

IMPLEMENTATIONS = ("dense", "blocked")

# Compiled whole, which takes less than operation by operation.
STATIC = ("soft_cap", "scale", "implementation")
attention = jax.jit(
    api.attention, static_argnames=(*STATIC, "causal", "window", "is_packed")
)


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def draw_qkv(num_tokens, *, batch=2, heads=6, kv_heads=3, head_dim=10):
    return (
        draw(0, batch, num_tokens, heads, head_dim),
        draw(1, batch, num_tokens, kv_heads, head_dim),
        draw(2, batch, num_tokens, kv_heads, head_dim),
    )


def plain_attention(query, key, value, visible, *, scale=None, soft_cap=None):
    """The definition, in float64: every query head with its own keys and values."""
    copies = query.shape[2] // key.shape[2]
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, copies, axis=2) for x in (key, value))
    scores = np.einsum("bthk,bshk->bhts", query, key)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    scores = np.where(np.asarray(visible)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhts,bshk->bthk", weights, value)


def plain_gradients(query, key, value, visible, out_bar, *, scale=None, soft_cap=None):
    """The chain rule through `plain_attention`, step by step, in float64."""
    num_kv_heads, copies = key.shape[2], query.shape[2] // key.shape[2]
    query, key, value, out_bar = (
        np.asarray(x, np.float64) for x in (query, key, value, out_bar)
    )
    key, value = (np.repeat(x, copies, axis=2) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = np.einsum("bthk,bshk->bhts", query, key) * scale
    slope = np.ones_like(scores)
    if soft_cap is not None:
        slope = 1 / np.cosh(scores / soft_cap) ** 2
        scores = soft_cap * np.tanh(scores / soft_cap)
    scores = np.where(np.asarray(visible)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    weights_bar = np.einsum("bthk,bshk->bhts", out_bar, value)
    mean = (weights * weights_bar).sum(axis=-1, keepdims=True)
    scores_bar = weights * (weights_bar - mean) * slope * scale
    fold = lambda x: x.reshape(*x.shape[:2], num_kv_heads, copies, -1).sum(axis=3)
    return (
        np.einsum("bhts,bshk->bthk", scores_bar, key),
        fold(np.einsum("bhts,bthk->bshk", scores_bar, query)),
        fold(np.einsum("bhts,bthk->bshk", weights, out_bar)),
    )


def packed_visibility(segment_ids, causal, window=None):
    segment_ids = np.asarray(segment_ids)
    visible = segment_ids[:, :, None] == segment_ids[:, None, :]
    place = np.arange(segment_ids.shape[1])
    distance = place[:, None] - place
    if causal:
        visible = visible & (distance >= 0)
    return visible if window is None else visible & (distance < window)


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
# Windows are shorter than the segments; keys have 1, 2, 3 and 8 queries.
CASES = [
    {"num_tokens": 40, "causal": False},
    {"num_tokens": 600, "window": 50, "heads": 3, "kv_heads": 1},
    {"num_tokens": 600, "window": 300, "soft_cap": 0.5},
]
MORE_CASES = [
    {"num_tokens": 40},
    {"num_tokens": 600},
    {"num_tokens": 600, "causal": False},
    {"num_tokens": 600, "window": 7, "causal": False, "heads": 2, "kv_heads": 2},
    {"num_tokens": 600, "soft_cap": 1.5, "scale": 0.7, "heads": 8, "kv_heads": 1},
]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)],
    ids=str,
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_and_gradients_are_those_of_the_definition(implementation, case):
    case = dict(case)
    num_tokens, causal = case.pop("num_tokens"), case.pop("causal", True)
    heads = {key: case.pop(key) for key in ("heads", "kv_heads") if key in case}
    qkv = draw_qkv(num_tokens, **heads)
    segment_ids, out_bar = packed_segments(num_tokens), draw(3, *qkv[0].shape)

    @jax.jit
    def both(qkv, out_bar):
        call = functools.partial(
            attention,
            segment_ids=segment_ids,
            causal=causal,
            implementation=implementation,
            **case,
        )
        out, transposed = jax.vjp(call, *qkv)
        return out, transposed(out_bar)

    out, gradients = both(qkv, out_bar)
    visible = packed_visibility(segment_ids, causal, case.pop("window", None))
    expected = plain_attention(*qkv, visible, **case)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    expected = plain_gradients(*qkv, visible, out_bar, **case)
    for x, y in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_chain_rule_of_these_tests_is_the_slope_of_their_definition():
    qkv, out_bar = draw_qkv(5), draw(3, 2, 5, 6, 10)
    visible = packed_visibility(packed_segments(5), True, 3)
    options = {"soft_cap": 1.5, "scale": 0.7}
    gradients = plain_gradients(*qkv, visible, out_bar, **options)
    for place in range(3):
        step = 1e-4 * np.asarray(draw(4 + place, *qkv[place].shape), np.float64)
        ends = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) for x in qkv]
            moved[place] = moved[place] + sign * step
            out = plain_attention(*moved, visible, **options)
            ends.append(np.vdot(out, np.asarray(out_bar, np.float64)))
        slope = np.vdot(gradients[place], step)
        np.testing.assert_allclose((ends[0] - ends[1]) / 2, slope, atol=1e-9)


@pytest.mark.parametrize(
    "implementation", [pytest.param("dense", marks=pytest.mark.slow), "blocked"]
)
def test_window_and_scale_may_differ_by_the_layer_of_a_scan(implementation):
    query, key, value = draw_qkv(600, batch=1)
    segment_ids = packed_segments(600)[:1]
    call = functools.partial(
        api.attention, segment_ids=segment_ids, implementation=implementation
    )

    def total(query, key, value):
        def layer(_, of_layer):
            window, scale = of_layer
            return None, call(query, key, value, window=window, scale=scale)

        of_layers = (jnp.asarray([3, 400]), jnp.asarray([0.2, 0.5]))
        _, outs = jax.lax.scan(layer, None, of_layers)
        return outs.sum(), outs

    gradients, outs = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(
        query, key, value
    )
    ones, expected = np.ones_like(query), []
    for window, scale, out in zip((3, 400), (0.2, 0.5), outs, strict=True):
        visible = packed_visibility(segment_ids, True, window)
        plain = plain_attention(query, key, value, visible, scale=scale)
        np.testing.assert_allclose(out, plain, atol=3e-6)
        expected.append(plain_gradients(query, key, value, visible, ones, scale=scale))
    for x, y in zip(gradients, map(sum, zip(*expected, strict=True)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_blocks_out_of_sight_are_not_read():
    # A block that is skipped may hold anything: here NaN, at keys that are too late
    # or left of the window for each of the queries that are looked at.
    num_tokens, window = 2048, 100
    query, key, value = draw_qkv(num_tokens, batch=1, heads=1, kv_heads=1, head_dim=4)
    looked_at = slice(1536, 1792)  # A block of queries; it sees keys 1437 to 1791.
    key, value = (x.at[:, :1024].set(jnp.nan) for x in (key, value))
    segment_ids = jnp.ones((1, num_tokens), jnp.int32)
    out = attention(
        query,
        key,
        value,
        segment_ids=segment_ids,
        window=window,
        implementation="blocked",
    )
    assert np.isfinite(out[:, looked_at]).all()
    assert np.isnan(out[:, :1024]).all()
    query, key, value = draw_qkv(num_tokens, batch=1, heads=1, kv_heads=1, head_dim=4)
    key, value = (x.at[:, 512:].set(jnp.nan) for x in (key, value))
    out = attention(
        query, key, value, segment_ids=segment_ids, implementation="blocked"
    )
    assert np.isfinite(out[:, :512]).all()
    assert np.isnan(out[:, 512:]).all()


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


def test_rows_and_heads_of_a_mesh_attend_by_themselves():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("data", None, "tensor"))
    qkv = draw_qkv(600, heads=8, kv_heads=4)
    segment_ids, out_bar = packed_segments(600), draw(3, *qkv[0].shape)

    def both(qkv, out_bar, segment_ids):
        call = lambda *qkv: api.attention(
            *qkv, segment_ids=segment_ids, window=300, implementation="blocked"
        )
        out, transposed = jax.vjp(call, *qkv)
        return out, transposed(out_bar)

    alone = jax.jit(both)(qkv, out_bar, segment_ids)
    rows = jax.device_put((qkv, out_bar), sharding)
    segment_ids = jax.device_put(segment_ids, NamedSharding(mesh, P("data")))
    program = jax.jit(both, out_shardings=sharding).lower(*rows, segment_ids).compile()
    shared = program(*rows, segment_ids)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), shared, alone
    )
    collectives = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    assert not re.search(collectives, program.as_text())


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


def array_sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (out.aval.size for out in equation.outvars)
        is_program = lambda node: hasattr(getattr(node, "jaxpr", node), "eqns")
        for inner in jax.tree.leaves(equation.params, is_leaf=is_program):
            if is_program(inner):
                yield from array_sizes(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_layers_keeps_no_visibility_of_all_queries_and_keys(remat):
    num_tokens = 4096

    def total(kernels, x, segment_ids):
        def layer(x, kernel):
            heads = (x @ kernel)[:, :, None]
            options = {"segment_ids": segment_ids, "implementation": "blocked"}
            return attention(heads, heads, heads, **options)[:, :, 0], None

        step = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(step, x, kernels)[0].sum()

    program = jax.make_jaxpr(jax.grad(total))(
        jax.ShapeDtypeStruct((3, 4, 4), jnp.float32),
        jax.ShapeDtypeStruct((1, num_tokens, 4), jnp.float32),
        jax.ShapeDtypeStruct((1, num_tokens), jnp.int32),
    )
    # JAX takes out of the scan what is the same in all layers: all blocks at once.
    assert max(array_sizes(program.jaxpr)) < num_tokens**2 // 16


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


def test_windows_and_caps_that_leave_nothing_are_refused():
    query, key, value = draw_qkv(4)
    call = functools.partial(
        attention, query, key, value, segment_ids=jnp.ones((2, 4), jnp.int32)
    )
    with pytest.raises(ValueError, match="window is 0 tokens; it must be at least 1"):
        call(window=0)
    with pytest.raises(ValueError, match=r"soft cap is 0\.0; it must be positive"):
        call(soft_cap=0.0)
