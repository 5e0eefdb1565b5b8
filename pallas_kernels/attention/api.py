"""The attention functions models call, and the choice of an implementation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import blocked, reference

# Rows longer than this are attended block by block: the scores of a dense row take
# 4 H T² bytes, forward and again backward.
LONGEST_DENSE_ROW = 1024


def attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T N K"],
    value: Float[Array, "B T N K"],
    *,
    segment_ids: Int[Array, "B T"],
    causal: bool = True,
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H K"]:
    """Attend within the segments of packed rows.

        out_t = sum_s softmax_s(cap(scale x query_t · key_s)) value_s

    over the s of t's segment, s <= t if `causal`, and t - s < `window`. Query head h
    reads key and value head h // (H / N). Scores and their softmax are float32.

    Args:
        query: of every token.
        key: of every token.
        value: of every token.
        segment_ids: tokens see each other if and only if their ids are equal, padding
            (0) included, so that every token sees at least itself.
        causal: tokens see no later ones.
        window: a token sees itself and the `window - 1` tokens before it, at least 1;
            may be traced, as layers of a scanned stack differ. None has no limit.
        soft_cap: cap(x) = soft_cap x tanh(x / soft_cap); None leaves scores as they
            are.
        scale: of the scores; None is K**-0.5. A constant to gradients.
        implementation: "dense" holds the scores of a row, "blocked" those of a block;
            None chooses by length.

    Returns:
        One vector per token and query head, in the query's dtype.
    """
    num_tokens = query.shape[1]
    places = jnp.arange(num_tokens, dtype=jnp.int32)
    visibility = reference.Visibility(
        segment_ids, segment_ids, places, places, _checked_window(window)
    )
    form = reference.Form(causal, _checked_soft_cap(soft_cap))
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    return _attend(form, query, key, value, visibility, scale, implementation)


def cached_attention(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B N S K"],
    values: Float[Array, "B N S K"],
    *,
    start: Int[Array, ""],
    first_slot: Int[Array, " B"],
    window: int | Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    scale: float | Float[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H K"]:
    """Attend from the T tokens at slots `start` to `start + T` to a cache.

    Key slot j is visible to the token at slot i of sequence b if and only if
    first_slot[b] <= j <= i, and i - j < window. The outputs of tokens before the first
    slot are finite and mean nothing.

    Args:
        query: of the new tokens; their keys and values are in the cache already.
        keys: of every slot.
        values: of every slot.
        start: slot of the first query.
        first_slot: slot of each sequence's first token.
        window: as in `attention`, of slots.
        soft_cap: as in `attention`.
        scale: as in `attention`.
        implementation: as in `attention`.

    Returns:
        One vector per new token and query head, in the query's dtype.
    """
    num_tokens, num_slots = query.shape[1], keys.shape[2]
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    places = jnp.asarray(start, jnp.int32) + jnp.arange(num_tokens, dtype=jnp.int32)
    visibility = reference.Visibility(
        query_segments=(places[None, :] >= first_slot[:, None]).astype(jnp.int32),
        key_segments=(slots[None, :] >= first_slot[:, None]).astype(jnp.int32),
        query_places=places,
        key_places=slots,
        window=_checked_window(window),
    )
    form = reference.Form(True, _checked_soft_cap(soft_cap))
    keys, values = keys.astype(query.dtype), values.astype(query.dtype)
    return _attend(form, query, keys, values, visibility, scale, implementation)


def _checked_window(window: int | Array | None) -> Array | None:
    """Return the window as an array; raise ValueError if it is known and below 1."""
    if window is None:
        return None
    if isinstance(window, int) and window < 1:
        raise ValueError(
            f"The window is {window} tokens; it must be at least 1, the token itself."
            " None attends without a window."
        )
    return jnp.asarray(window, jnp.int32)


def _checked_soft_cap(soft_cap: float | None) -> float | None:
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(
            f"The soft cap is {soft_cap}; it must be positive. None attends without."
        )
    return soft_cap


def _attend(
    form: reference.Form,
    query: Array,
    key: Array,
    value: Array,
    visibility: reference.Visibility,
    scale: float | Array | None,
    implementation: str | None,
) -> Array:
    """Group the query heads by their key head, attend, and put them back."""
    batch, num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads do not split over {num_kv_heads} key heads. The"
            " number of query heads must be a multiple."
        )
    attend = _choose(implementation, num_tokens)
    split = (batch, num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scale = head_dim**-0.5 if scale is None else scale
    scale = jnp.asarray(scale, jnp.float32)
    out = attend(form, query.reshape(split), key, value, visibility, scale)
    return out.reshape(query.shape)


def _choose(implementation: str | None, num_tokens: int) -> Callable[..., Any]:
    """Return the function of an implementation; by the row's length if None."""
    if implementation is None:
        implementation = "dense" if num_tokens <= LONGEST_DENSE_ROW else "blocked"
    if implementation == "dense":
        return reference.dense
    if implementation == "blocked":
        return blocked.blocked
    raise ValueError(
        f"Attention has no implementation {implementation!r}; known are 'dense' and"
        " 'blocked', and None chooses by the length of the row."
    )
