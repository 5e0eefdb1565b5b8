"""Attention in XLA with all scores of a row at once, and the arithmetic of a block.

Arrays lie heads first, and the G = H / N query heads of a key head are one more
dimension, so keys are never repeated and every product is of whole matrices:

    query [B, N, G, T, K] · key [B, N, S, K] -> scores [B, N, G, T, S]

The backward pass keeps only inputs, the output and the logarithm of each query's sum,
and computes the weights anew (Dao et al. 2022, https://arxiv.org/abs/2205.14135,
appendix B.2).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

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


def dense(
    form: Form,
    query: Float[Array, "B T N G K"],
    key: Float[Array, "B N S K"],
    value: Float[Array, "B N S K"],
    visibility: Visibility,
    scale: Float[Array, ""],
) -> Float[Array, "B T N G K"]:
    """Attend with all scores of a row at once; `scale` is a constant to gradients."""
    out: Any = _dense(form, heads_first(query), key, value, visibility, scale)
    return tokens_first(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(form: Form, query, key, value, visibility, scale):
    return _dense_forward(form, query, key, value, visibility, scale)[0]


def _dense_forward(form: Form, query, key, value, visibility, scale):
    bias = visibility.bias(form.causal)
    state = add_keys(form, nothing_seen(query), query, key, value, bias, scale)
    out, log_total = finish(state, query.dtype)
    return out, (query, key, value, visibility, scale, out, log_total)


def _dense_backward(form: Form, saved, out_bar):
    query, key, value, visibility, scale, out, log_total = saved
    rows = (log_total, weighted(out, out_bar), out_bar)
    bias = visibility.bias(form.causal)
    bars = gradients(form, query, key, value, bias, scale, *rows)
    query_bar, key_bar, value_bar = bars
    return (
        query_bar.astype(query.dtype),
        key_bar.astype(key.dtype),
        value_bar.astype(value.dtype),
        None,
        None,
    )


_dense.defvjp(_dense_forward, _dense_backward)


def heads_first(x: Float[Array, "B T N G K"]) -> Float[Array, "B N G T K"]:
    """Bring the tokens of a head together."""
    return jnp.transpose(x, (0, 2, 3, 1, 4))


def tokens_first(x: Float[Array, "B N G T K"]) -> Float[Array, "B T N G K"]:
    """Undo `heads_first`."""
    return jnp.transpose(x, (0, 3, 1, 2, 4))


class State(NamedTuple):
    """What queries know after the keys they have met so far; all float32."""

    maximum: Float[Array, "B N G T 1"]  # Of the scores.
    total: Float[Array, "B N G T 1"]  # Of exp(score - maximum).
    weighted: Float[Array, "B N G T K"]  # Sum of exp(score - maximum) x value.


def nothing_seen(query: Float[Array, "B N G T K"]) -> State:
    """Return the state of queries before the first key."""
    column = (*query.shape[:4], 1)
    return State(
        maximum=jnp.full(column, OUT_OF_SIGHT, jnp.float32),
        total=jnp.zeros(column, jnp.float32),
        weighted=jnp.zeros(query.shape, jnp.float32),
    )


def _scores(form: Form, query: Array, key: Array, scale: ArrayLike) -> Array:
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


def add_keys(
    form: Form,
    state: State,
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    scale: ArrayLike,
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


def finish(state: State, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Return the output and the logarithm of the sum of exp(score)."""
    out = (state.weighted / state.total).astype(dtype)
    return out, state.maximum + jnp.log(state.total)


def weighted(out: Array, out_bar: Array) -> Array:
    """Return sum_s weight_s x the cotangent of weight_s: float32, one per query."""
    product = out.astype(jnp.float32) * out_bar.astype(jnp.float32)
    return product.sum(axis=-1, keepdims=True)


def gradients(
    form: Form,
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    scale: ArrayLike,
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
