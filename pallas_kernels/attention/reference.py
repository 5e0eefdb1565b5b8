"""Attention in XLA: dense for short rows, by blocks for long ones.

Arrays lie heads first, and the G = H / N query heads of a key head are one more
dimension, so keys are never repeated and every product is of whole matrices:

    query [B, N, G, T, K] · key [B, N, S, K] -> scores [B, N, G, T, S]

Both forms keep only their inputs, the output and the logarithm of each query's sum for
the backward pass, which computes the weights anew (Dao et al. 2022,
https://arxiv.org/abs/2205.14135, appendix B.2). `blocked` maps over blocks of queries
and scans over blocks of keys with a running maximum and sum, so no array of T x S
exists, forward or backward.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

QUERY_BLOCK = 256
KEY_BLOCK = 512

# Added to the scores of keys out of sight: finite, so that nothing is ever NaN, and so
# low that a float32 score added to it is lost. A query that sees nothing in the first
# blocks gathers weights of 1 there, which the first key it does see shrinks to 0.
OUT_OF_SIGHT = -1e30


class Form(NamedTuple):
    """What is known of the attention before tracing."""

    causal: bool = True
    soft_cap: float | None = None


class Visibility(NamedTuple):
    """A query sees a key of its own segment, not too early and not too late.

    Not `window` places or more before it and, if causal, of no later place.
    """

    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    query_places: Int[Array, " T"]
    key_places: Int[Array, " S"]
    window: Int[Array, ""] | None = None

    def bias(self, causal: bool) -> Float[Array, "B 1 1 T S"]:
        """Return 0 where a query sees a key, `OUT_OF_SIGHT` elsewhere.

        XLA adds a bias to scores much faster on CPU than it selects by a mask.
        """
        sees_BTS = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        distance_TS = self.query_places[:, None] - self.key_places[None, :]
        if causal:
            sees_BTS = sees_BTS & (distance_TS >= 0)[None]
        if self.window is not None:
            sees_BTS = sees_BTS & (distance_TS < self.window)[None]
        bias_BTS = jnp.where(sees_BTS, 0, OUT_OF_SIGHT).astype(jnp.float32)
        return bias_BTS[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense(
    form: Form,
    query: Float[Array, "B N G T K"],
    key: Float[Array, "B N S K"],
    value: Float[Array, "B N S K"],
    visibility: Visibility,
    scale: Float[Array, ""],
) -> Float[Array, "B N G T K"]:
    """Attend with all scores of a row at once; `scale` is a constant to gradients."""
    return _dense_forward(form, query, key, value, visibility, scale)[0]


def _dense_forward(form: Form, query, key, value, visibility, scale):
    bias = visibility.bias(form.causal)
    state = _add_keys(form, _nothing_seen(query), query, key, value, bias, scale)
    out, log_total = _finish(state, query.dtype)
    return out, (query, key, value, visibility, scale, out, log_total)


def _dense_backward(form: Form, saved, out_bar):
    query, key, value, visibility, scale, out, log_total = saved
    rows = (log_total, _weighted(out, out_bar), out_bar)
    bias = visibility.bias(form.causal)
    bars = _gradients(form, query, key, value, bias, scale, *rows)
    query_bar, key_bar, value_bar = bars
    return (
        query_bar.astype(query.dtype),
        key_bar.astype(key.dtype),
        value_bar.astype(value.dtype),
        None,
        None,
    )


dense.defvjp(_dense_forward, _dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked(
    form: Form,
    query: Float[Array, "B N G T K"],
    key: Float[Array, "B N S K"],
    value: Float[Array, "B N S K"],
    visibility: Visibility,
    scale: Float[Array, ""],
) -> Float[Array, "B N G T K"]:
    """Attend block by block; equal to `dense` up to rounding.

    Blocks that no query sees, by their places, are skipped.
    """
    return _blocked_forward(form, query, key, value, visibility, scale)[0]


def _blocked_forward(form: Form, query, key, value, visibility, scale):
    keys = _key_blocks(key, value, visibility)

    def attend(block: tuple) -> tuple[Array, Array]:
        query, segments, places, in_sight = block

        def step(state: State, block: tuple) -> tuple[State, None]:
            (key, value, key_segments, key_places), is_seen = block

            def meet(state: State) -> State:
                sight = Visibility(
                    segments, key_segments, places, key_places, visibility.window
                )
                bias = sight.bias(form.causal)
                return _add_keys(form, state, query, key, value, bias, scale)

            return jax.lax.cond(is_seen, meet, lambda state: state, state), None

        state, _ = jax.lax.scan(step, _nothing_seen(query), (keys, in_sight))
        return _finish(state, query.dtype)

    queries = (*_query_blocks(query, visibility), _in_sight(form, visibility))
    out, log_total = jax.lax.map(attend, queries)
    out = _joined(out, 3, query.shape[3])
    log_total = _joined(log_total, 3, query.shape[3])
    return out, (query, key, value, visibility, scale, out, log_total)


def _blocked_backward(form: Form, saved, out_bar):
    query, key, value, visibility, scale, out, log_total = saved
    rows = (log_total, _weighted(out, out_bar), out_bar)
    queries = (
        *_query_blocks(query, visibility),
        _in_sight(form, visibility),
        *(_split(x, 3, QUERY_BLOCK) for x in rows),
    )
    keys = _key_blocks(key, value, visibility)

    def query_step(key_bars: tuple[Array, Array], block: tuple):
        query, segments, places, in_sight, *rows = block

        def key_step(query_bar: Array, block: tuple):
            (key, value, key_segments, key_places), key_bars, is_seen = block

            def add(bars: tuple) -> tuple:
                sight = Visibility(
                    segments, key_segments, places, key_places, visibility.window
                )
                bias = sight.bias(form.causal)
                more = _gradients(form, query, key, value, bias, scale, *rows)
                return tuple(x + y for x, y in zip(bars, more, strict=True))

            bars = (query_bar, *key_bars)
            query_bar, *key_bars = jax.lax.cond(is_seen, add, lambda bars: bars, bars)
            return query_bar, tuple(key_bars)

        query_bar = jnp.zeros(query.shape, jnp.float32)
        query_bar, key_bars = jax.lax.scan(
            key_step, query_bar, (keys, key_bars, in_sight)
        )
        return key_bars, query_bar

    zeros = jnp.zeros(keys[0].shape, jnp.float32)
    key_bars, query_bar = jax.lax.scan(query_step, (zeros, zeros), queries)
    return (
        _joined(query_bar, 3, query.shape[3]).astype(query.dtype),
        _joined(key_bars[0], 2, key.shape[2]).astype(key.dtype),
        _joined(key_bars[1], 2, value.shape[2]).astype(value.dtype),
        None,
        None,
    )


blocked.defvjp(_blocked_forward, _blocked_backward)


def _in_sight(form: Form, visibility: Visibility) -> Array:
    """Tell for each block of queries and of keys if places allow any sight: [I, J].

    From places alone: they are the same on all devices that share the rows, while
    segments would have to be compared across them.
    """
    places_IQ = _split(visibility.query_places, 0, QUERY_BLOCK, mode="edge")
    places_JK = _split(visibility.key_places, 0, KEY_BLOCK, mode="edge")
    seen_IJ = jnp.ones((len(places_IQ), len(places_JK)), bool)
    if form.causal:
        first_J, last_I = places_JK.min(axis=1), places_IQ.max(axis=1)
        seen_IJ = seen_IJ & (last_I[:, None] >= first_J[None, :])
    if visibility.window is not None:
        first_I, last_J = places_IQ.min(axis=1), places_JK.max(axis=1)
        near_IJ = first_I[:, None] - last_J[None, :] < visibility.window
        seen_IJ = seen_IJ & near_IJ
    return seen_IJ


class State(NamedTuple):
    """What queries know after the keys they have met so far; all float32."""

    maximum: Float[Array, "B N G T 1"]  # Of the scores.
    total: Float[Array, "B N G T 1"]  # Of exp(score - maximum).
    weighted: Float[Array, "B N G T K"]  # Sum of exp(score - maximum) x value.


def _nothing_seen(query: Array) -> State:
    column = (*query.shape[:4], 1)
    return State(
        maximum=jnp.full(column, OUT_OF_SIGHT, jnp.float32),
        total=jnp.zeros(column, jnp.float32),
        weighted=jnp.zeros(query.shape, jnp.float32),
    )


def _scores(form: Form, query: Array, key: Array, scale: Array) -> Array:
    """Return scale x query · key, softly capped, float32 [B, N, G, T, S]."""
    scores = _times(query, key, "bnik,bnjk->bnij") * scale
    if form.soft_cap is None:
        return scores
    return form.soft_cap * jnp.tanh(scores / form.soft_cap)


def _times(x: Array, y: Array, equation: str) -> Array:
    """Multiply [B, N, G, T, ·] by [B, N, ·, ·] with G and T as one dimension.

    So written, each product is a batch of plain matrix products.
    """
    groups = x.shape[2:4]
    merged = x.reshape(*x.shape[:2], -1, x.shape[-1])
    product = jnp.einsum(equation, merged, y, preferred_element_type=jnp.float32)
    return product.reshape(*x.shape[:2], *groups, -1)


def _add_keys(
    form: Form,
    state: State,
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    scale: Array,
) -> State:
    """Meet some more keys and values."""
    scores = _scores(form, query, key, scale) + bias
    maximum = jnp.maximum(state.maximum, scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - maximum)
    shrink = jnp.exp(state.maximum - maximum)
    update = _times(weights.astype(value.dtype), value, "bnij,bnjk->bnik")
    return State(
        maximum=maximum,
        total=state.total * shrink + weights.sum(axis=-1, keepdims=True),
        weighted=state.weighted * shrink + update,
    )


def _finish(state: State, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Return the output and the logarithm of the sum of exp(score)."""
    out = (state.weighted / state.total).astype(dtype)
    return out, state.maximum + jnp.log(state.total)


def _weighted(out: Array, out_bar: Array) -> Array:
    """Return sum_s weight_s x the cotangent of weight_s, float32 [B, N, G, T, 1]."""
    product = out.astype(jnp.float32) * out_bar.astype(jnp.float32)
    return product.sum(axis=-1, keepdims=True)


def _gradients(
    form: Form,
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    scale: Array,
    log_total: Array,
    weighted: Array,
    out_bar: Array,
) -> tuple[Array, Array, Array]:
    """Return the cotangents of query, key and value, float32.

    weight_bar = out_bar · value,  score_bar = weight x (weight_bar - weighted),
    and the slope of cap tanh(x / cap) is 1 - tanh²(x / cap).
    """
    scores = _scores(form, query, key, scale)
    weights = jnp.exp(scores + bias - log_total)
    weight_bar = _times(out_bar, value, "bnik,bnjk->bnij")
    scores_bar = weights * (weight_bar - weighted) * scale
    if form.soft_cap is not None:
        scores_bar = scores_bar * (1 - jnp.square(scores / form.soft_cap))
    scores_bar = scores_bar.astype(query.dtype)
    return (
        _times(scores_bar, key, "bnij,bnjk->bnik"),
        _transposed_times(scores_bar, query),
        _transposed_times(weights.astype(out_bar.dtype), out_bar),
    )


def _transposed_times(matrix: Array, x: Array) -> Array:
    """Sum matrix [B, N, G, T, S] x [B, N, G, T, K] over G and T: [B, N, S, K].

    XLA would transpose the matrix, K times as large as `x`, to make a plain product of
    this; the barriers have it transpose `x` and the product instead.
    """
    batch = matrix.shape[:2]
    x_BNKI = jnp.swapaxes(x.reshape(*batch, -1, x.shape[-1]), 2, 3)
    product_BNKS = jnp.einsum(
        "bnki,bnij->bnkj",
        jax.lax.optimization_barrier(x_BNKI),
        matrix.reshape(*batch, -1, matrix.shape[-1]),
        preferred_element_type=jnp.float32,
    )
    return jnp.swapaxes(jax.lax.optimization_barrier(product_BNKS), 2, 3)


def _query_blocks(query: Array, visibility: Visibility) -> tuple[Array, ...]:
    return (
        _split(query, 3, QUERY_BLOCK),
        _split(visibility.query_segments, 1, QUERY_BLOCK, padding=-2),
        _split(visibility.query_places, 0, QUERY_BLOCK),
    )


def _key_blocks(key: Array, value: Array, visibility: Visibility) -> tuple[Array, ...]:
    return (
        _split(key, 2, KEY_BLOCK),
        _split(value, 2, KEY_BLOCK),
        _split(visibility.key_segments, 1, KEY_BLOCK, padding=-1),
        _split(visibility.key_places, 0, KEY_BLOCK),
    )


def _split(
    x: Array, axis: int, size: int, padding: int = 0, mode: str = "constant"
) -> Array:
    """Split an axis into padded blocks, which become the first axis.

    Padding of queries and of keys is in segments of its own: -2 and -1.
    """
    count = -(-x.shape[axis] // size)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * size - x.shape[axis])
    options = {"constant_values": padding} if mode == "constant" else {}
    padded = jnp.pad(x, widths, mode=mode, **options)
    shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(padded.reshape(shape), axis, 0)


def _joined(blocks: Array, axis: int, length: int) -> Array:
    """Undo `_split`."""
    x = jnp.moveaxis(blocks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
