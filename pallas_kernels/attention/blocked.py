"""Attention over blocks of queries and of keys, for rows too long to be `dense`.

                keys  ->
    queries   [ 1        ]     Blocks 1, 2, … are met in turn, with a running maximum
       |      [ 2  3     ]     and sum; those that lie above the diagonal, or left of a
       v      [ .  4  5  ]     window, are skipped.

No array of all queries by all keys exists, forward or backward. Whole rows keep the
layout they come in: blocks are cut from them and written to them one at a time, so that
besides inputs and outputs there are only the float32 gradients of keys and values.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention import reference
from pallas_kernels.attention.reference import Form, Visibility

QUERY_BLOCK = 256
KEY_BLOCK = 512

# Padding of queries and of keys is in segments of its own.
_QUERY_PADDING = -2
_KEY_PADDING = -1


class _Bars(NamedTuple):
    """Cotangents; of keys and values float32, as all queries add to them."""

    query: Array
    key: Array
    value: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked(
    form: Form,
    query: Float[Array, "B T N G K"],
    key: Float[Array, "B N S K"],
    value: Float[Array, "B N S K"],
    visibility: Visibility,
    scale: Float[Array, ""],
) -> Float[Array, "B T N G K"]:
    """Attend block by block; equal to `reference.dense` up to rounding."""
    return _forward(form, query, key, value, visibility, scale)[0]


def _forward(form: Form, query, key, value, visibility, scale):
    # What depends on the rows alone is the same in all layers, and JAX would take it
    # out of a scan over them: the visibility of all blocks, kept at once. Through the
    # barrier it depends on the layer too.
    query, visibility = jax.lax.optimization_barrier((query, visibility))
    heads = query.shape[2:4]
    rows, keys, values, sight = _padded(query, key, value, visibility)
    in_sight_IJ = _in_sight(form, sight)
    num_query_blocks, num_key_blocks = in_sight_IJ.shape

    def attend(written: tuple[Array, Array], i: Array):
        query_i = _query_block(rows, i, heads)

        def meet(state: reference.State, j: Array):
            def add(state: reference.State) -> reference.State:
                keys_j, values_j = _key_block(keys, j), _key_block(values, j)
                bias = _sight_block(sight, i, j).bias(form.causal)
                pair = (query_i, keys_j, values_j, bias)
                return reference.add_keys(form, state, *pair, scale)

            return jax.lax.cond(in_sight_IJ[i, j], add, _unchanged, state), None

        nothing = reference.nothing_seen(query_i)
        state, _ = jax.lax.scan(meet, nothing, jnp.arange(num_key_blocks))
        out_i, log_total_i = reference.finish(state, query.dtype)
        out, log_total = written
        return (_write(out, out_i, i), _write(log_total, log_total_i, i)), None

    log_total = jnp.zeros((*rows.shape[:2], heads[0] * heads[1]), jnp.float32)
    (out, log_total), _ = jax.lax.scan(
        attend, (jnp.zeros_like(rows), log_total), jnp.arange(num_query_blocks)
    )
    out = out[:, : query.shape[1]].reshape(query.shape)
    return out, (query, key, value, visibility, scale, out, log_total)


def _backward(form: Form, saved, out_bar):
    query, key, value, visibility, scale, out, log_total = saved
    heads = query.shape[2:4]
    weighted = _padded_rows(reference.weighted(out, out_bar))
    rows, keys, values, sight = _padded(query, key, value, visibility)
    all_rows = (rows, log_total, weighted, _padded_rows(out_bar))
    in_sight_IJ = _in_sight(form, sight)
    num_query_blocks, num_key_blocks = in_sight_IJ.shape

    def query_step(bars: _Bars, i: Array) -> tuple[_Bars, None]:
        query_i, *rows_i = (_query_block(x, i, heads) for x in all_rows)

        def key_step(bars: _Bars, j: Array) -> tuple[_Bars, None]:
            def add(bars: _Bars) -> _Bars:
                keys_j, values_j = _key_block(keys, j), _key_block(values, j)
                bias = _sight_block(sight, i, j).bias(form.causal)
                pair = (query_i, keys_j, values_j, bias)
                more = reference.gradients(form, *pair, scale, *rows_i)
                return _Bars(*(x + y for x, y in zip(bars, more, strict=True)))

            block = _Bars(
                bars.query, _key_block(bars.key, j), _key_block(bars.value, j)
            )
            block = jax.lax.cond(in_sight_IJ[i, j], add, _unchanged, block)
            key_bar = _write_keys(bars.key, block.key, j)
            value_bar = _write_keys(bars.value, block.value, j)
            return _Bars(block.query, key_bar, value_bar), None

        start = bars._replace(query=jnp.zeros(query_i.shape, jnp.float32))
        end, _ = jax.lax.scan(key_step, start, jnp.arange(num_key_blocks))
        return end._replace(query=_write(bars.query, end.query, i)), None

    zeros = jnp.zeros(keys.shape, jnp.float32)
    bars = _Bars(jnp.zeros_like(rows), zeros, zeros)
    bars, _ = jax.lax.scan(query_step, bars, jnp.arange(num_query_blocks))
    return (
        bars.query[:, : query.shape[1]].reshape(query.shape),
        bars.key[:, :, : key.shape[2]].astype(key.dtype),
        bars.value[:, :, : key.shape[2]].astype(value.dtype),
        None,
        None,
    )


blocked.defvjp(_forward, _backward)


def _in_sight(form: Form, sight: Visibility) -> Bool[Array, "I J"]:
    """Tell for each block of queries and of keys whether places allow any sight.

    From places alone: they are the same on all devices that share the rows, while
    segments would have to be compared across devices.
    """
    places_IQ = sight.query_places.reshape(-1, QUERY_BLOCK)
    places_JK = sight.key_places.reshape(-1, KEY_BLOCK)
    seen_IJ = jnp.ones((len(places_IQ), len(places_JK)), bool)
    if form.causal:
        first_J, last_I = places_JK.min(axis=1), places_IQ.max(axis=1)
        seen_IJ = seen_IJ & (last_I[:, None] >= first_J[None, :])
    if sight.window is not None:
        first_I, last_J = places_IQ.min(axis=1), places_JK.max(axis=1)
        seen_IJ = seen_IJ & (first_I[:, None] - last_J[None, :] < sight.window)
    return seen_IJ


def _padded(query: Array, key: Array, value: Array, visibility: Visibility):
    """Pad to whole blocks. Places repeat the last, which adds no block to sight."""
    query_segments, key_segments, query_places, key_places, window = visibility
    sight = Visibility(
        _pad(query_segments, 1, QUERY_BLOCK, constant_values=_QUERY_PADDING),
        _pad(key_segments, 1, KEY_BLOCK, constant_values=_KEY_PADDING),
        _pad(query_places, 0, QUERY_BLOCK, mode="edge"),
        _pad(key_places, 0, KEY_BLOCK, mode="edge"),
        window,
    )
    keys, values = _pad(key, 2, KEY_BLOCK), _pad(value, 2, KEY_BLOCK)
    return _padded_rows(query), keys, values, sight


def _pad(x: Array, axis: int, size: int, **options) -> Array:
    """Lengthen an axis to a multiple of `size`."""
    missing = -x.shape[axis] % size
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, **options)


def _padded_rows(x: Float[Array, "B T N G K"]) -> Float[Array, "B T2 NGK"]:
    """Pad the tokens to whole blocks, each with its heads in one dimension.

    XLA lays out arrays as the blocks cut from them are used, and would copy whole rows
    to bring heads first; it does not see through the merged dimension.
    """
    return _pad(x.reshape(*x.shape[:2], -1), 1, QUERY_BLOCK)


def _query_block(x: Array, i: Array, heads: tuple[int, ...]) -> Array:
    """Cut a block [B, N, G, T, K] from rows."""
    block = jax.lax.dynamic_slice_in_dim(x, i * QUERY_BLOCK, QUERY_BLOCK, axis=1)
    return reference.heads_first(block.reshape(*block.shape[:2], *heads, -1))


def _write(x: Array, block: Array, i: Array) -> Array:
    """Write a block [B, N, G, T, K] to rows."""
    block = reference.tokens_first(block).astype(x.dtype)
    block = block.reshape(*block.shape[:2], -1)
    return jax.lax.dynamic_update_slice_in_dim(x, block, i * QUERY_BLOCK, axis=1)


def _key_block(x: Array, j: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, j * KEY_BLOCK, KEY_BLOCK, axis=2)


def _write_keys(x: Array, block: Array, j: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block, j * KEY_BLOCK, axis=2)


def _sight_block(sight: Visibility, i: Array, j: Array) -> Visibility:
    cut = jax.lax.dynamic_slice_in_dim
    return Visibility(
        query_segments=cut(sight.query_segments, i * QUERY_BLOCK, QUERY_BLOCK, axis=1),
        key_segments=cut(sight.key_segments, j * KEY_BLOCK, KEY_BLOCK, axis=1),
        query_places=cut(sight.query_places, i * QUERY_BLOCK, QUERY_BLOCK),
        key_places=cut(sight.key_places, j * KEY_BLOCK, KEY_BLOCK),
        window=sight.window,
    )


def _unchanged(x):
    return x
