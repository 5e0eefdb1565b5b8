"""Attention in XLA: dense for short rows, by blocks for long ones.

Both group the G = H / N query heads of a key head, so keys are never repeated:

    query [B, T, N, G, K] · key [B, S, N, K] -> scores [B, N, G, T, S]

`blocked` maps over blocks of queries and scans over blocks of keys with a running
maximum and sum (Rabe and Staats 2021, https://arxiv.org/abs/2112.05682); both loops
are checkpointed, so no array of T x S exists, forward or backward.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Where the axes of keys and values lie, in einsum letters: batch, s (place), n (key
# head), k (head width).
TOKEN_MAJOR = "bsnk"  # Of the rows of a batch.
HEAD_MAJOR = "bnsk"  # Of a cache.

QUERY_BLOCK = 256
KEY_BLOCK = 512
NOT_VISIBLE = -1e30


class Visibility(NamedTuple):
    """A query sees a key of its own segment, and if causal of no later place."""

    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    query_places: Int[Array, " T"]
    key_places: Int[Array, " S"]

    def mask(self, causal: bool) -> Bool[Array, "B 1 1 T S"]:
        """Return who sees whom."""
        mask_BTS = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if causal:
            before_TS = self.query_places[:, None] >= self.key_places[None, :]
            mask_BTS = mask_BTS & before_TS[None]
        return mask_BTS[:, None, None]


def dense(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B _ _ K"],
    value: Float[Array, "B _ _ K"],
    visibility: Visibility,
    *,
    causal: bool,
    keys: str,
) -> Float[Array, "B T H K"]:
    """Attend with all scores of a row at once."""
    query_BTNGK = _group(query, key, keys)
    scores_BNGTS = _scores(query_BTNGK, key, keys)
    scores_BNGTS = jnp.where(visibility.mask(causal), scores_BNGTS, NOT_VISIBLE)
    weights_BNGTS = jax.nn.softmax(scores_BNGTS, axis=-1).astype(value.dtype)
    out = jnp.einsum(f"bngts,{keys}->btngk", weights_BNGTS, value)
    return out.reshape(query.shape).astype(query.dtype)


def _group(query: Array, key: Array, keys: str) -> Array:
    """Split the query heads by the key head they read."""
    batch, num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[keys.index("n")]
    shape = (batch, num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return query.reshape(shape)


def _scores(query_BTNGK: Array, key: Array, keys: str) -> Array:
    """Return query · key / sqrt(K) as float32, [B, N, G, T, S]."""
    return jnp.einsum(
        f"btngk,{keys}->bngts",
        query_BTNGK * query_BTNGK.shape[-1] ** -0.5,
        key.astype(query_BTNGK.dtype),
        preferred_element_type=jnp.float32,
    )


def blocked(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B _ _ K"],
    value: Float[Array, "B _ _ K"],
    visibility: Visibility,
    *,
    causal: bool,
    keys: str,
) -> Float[Array, "B T H K"]:
    """Attend block by block; equal to `dense` up to rounding."""
    batch, num_tokens = query.shape[:2]
    query_BTNGK = _group(query, key, keys)
    axis = keys.index("s")
    # Padding belongs to segments nobody is in: keys to -1, queries to -2.
    query_blocks = (
        _blocks(query_BTNGK, 1, QUERY_BLOCK),
        _blocks(visibility.query_segments, 1, QUERY_BLOCK, fill=-2),
        _blocks(visibility.query_places, 0, QUERY_BLOCK),
    )
    key_blocks = (
        _blocks(key, axis, KEY_BLOCK),
        _blocks(value, axis, KEY_BLOCK),
        _blocks(visibility.key_segments, 1, KEY_BLOCK, fill=-1),
        _blocks(visibility.key_places, 0, KEY_BLOCK),
    )

    @jax.checkpoint
    def attend(query_block: tuple[Array, Array, Array]) -> Array:
        query, query_segments, query_places = query_block
        step = functools.partial(
            _add_key_block,
            query,
            query_segments,
            query_places,
            causal=causal,
            keys=keys,
        )
        shape_BNGQ = (batch, *query.shape[2:4], query.shape[1])
        running = Running(
            maximum=jnp.full(shape_BNGQ, NOT_VISIBLE, jnp.float32),
            total=jnp.zeros(shape_BNGQ, jnp.float32),
            weighted=jnp.zeros((*shape_BNGQ, query.shape[-1]), jnp.float32),
        )
        running, _ = jax.lax.scan(jax.checkpoint(step), running, key_blocks)
        # A query of padding saw nothing: its total is 0.
        total = jnp.where(running.total > 0, running.total, 1)
        out_BNGQK = running.weighted / total[..., None]
        return jnp.transpose(out_BNGQK, (0, 3, 1, 2, 4)).astype(query.dtype)

    out_blocks = jax.lax.map(attend, query_blocks)
    out = jnp.moveaxis(out_blocks, 0, 1).reshape(batch, -1, *query.shape[2:])
    return out[:, :num_tokens]


class Running(NamedTuple):
    """What a block of queries knows after some blocks of keys; all float32."""

    maximum: Float[Array, "B N G Q"]
    total: Float[Array, "B N G Q"]
    weighted: Float[Array, "B N G Q K"]


def _add_key_block(
    query: Array,
    query_segments: Array,
    query_places: Array,
    running: Running,
    key_block: tuple[Array, Array, Array, Array],
    *,
    causal: bool,
    keys: str,
) -> tuple[Running, None]:
    """Take one block of keys and values into the running softmax."""
    key, value, key_segments, key_places = key_block
    visibility = Visibility(query_segments, key_segments, query_places, key_places)
    mask = visibility.mask(causal)
    scores = jnp.where(mask, _scores(query, key, keys), NOT_VISIBLE)
    maximum = jnp.maximum(running.maximum, scores.max(axis=-1))
    # Where nothing was visible so far the maximum is NOT_VISIBLE itself and every
    # exponent 0: the mask keeps those ones out of the sums.
    weights = jnp.where(mask, jnp.exp(scores - maximum[..., None]), 0)
    shrink = jnp.exp(running.maximum - maximum)
    update = jnp.einsum(
        f"bngts,{keys}->bngtk",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return Running(
        maximum=maximum,
        total=running.total * shrink + weights.sum(axis=-1),
        weighted=running.weighted * shrink[..., None] + update,
    ), None


def _blocks(x: Array, axis: int, size: int, fill: int = 0) -> Array:
    """Split an axis into blocks, padded with `fill`; the blocks come first."""
    count = -(-x.shape[axis] // size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - x.shape[axis])
    padded = jnp.pad(x, padding, constant_values=fill)
    shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(padded.reshape(shape), axis, 0)
