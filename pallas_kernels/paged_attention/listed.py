"""Attention of one token a row, in XLA: pages in use are listed and met one by one.

    table        [7 2 9]  [4 · ·]  [1 3 ·]        rows 0, 1 and 2
    pages         7 2 9    4        1 3           some at a time
    row           0 0 0    1        2 2

What a page says (the largest score, the sum of weights, the weighted values) does not
depend on others, and is put together row by row at the end. So the cost is that of the
pages in use, whoever has the most, and a row's result is the same beside any others.
A loop of some pages at a time stays in a CPU's cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.reference import OUT_OF_SIGHT, Pages, Rows, stored

PAGES_AT_A_TIME = 32


class _Listed(NamedTuple):
    """Pages in use, row by row, and then those that only fill up."""

    pages: Int[Array, " J"]
    rows: Int[Array, " J"]
    columns: Int[Array, " J"]
    count: Int[Array, ""]


class _Found(NamedTuple):
    """What each page says to the queries of its row; all float32."""

    maximum: Float[Array, "J N G"]  # Of the scores.
    total: Float[Array, "J N G"]  # Of exp(score - maximum).
    weighted: Float[Array, "J N G K"]  # Sum of exp(score - maximum) x value.


def listed(
    query: Float[Array, "B 1 H K"],
    pages: Pages,
    rows: Rows,
    *,
    layer: Int[Array, ""],
    num_pages: Int[Array, ""],
    scale: Float[Array, ""],
    soft_cap: float | None,
) -> Float[Array, "B 1 H K"]:
    """Attend to the pages in use; how many columns have some is of no interest."""
    del num_pages
    batch, _, num_heads, head_dim = query.shape
    num_kv_heads = pages.keys.shape[2]
    split = (batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    query_BNGK = query.reshape(split)
    in_use = _list(rows, pages.keys.shape[3])
    found = _meet(query_BNGK, pages, rows, in_use, layer, scale, soft_cap)
    # A row's pages stand together, in order; what fills up belongs to no row.
    owner = jnp.where(jnp.arange(len(in_use.rows)) < in_use.count, in_use.rows, batch)
    by_row = {"num_segments": batch, "indices_are_sorted": True}
    maximum = jax.ops.segment_max(found.maximum, owner, **by_row)
    maximum = jnp.maximum(maximum, OUT_OF_SIGHT)  # Rows without a page have -inf.
    of_row = jnp.take(maximum, owner, axis=0, mode="clip")
    shrink = jnp.exp(jnp.minimum(found.maximum - of_row, 0.0))
    total = jax.ops.segment_sum(found.total * shrink, owner, **by_row)
    weighted = found.weighted * shrink[..., None]
    weighted = jax.ops.segment_sum(weighted, owner, **by_row)
    out = weighted / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return out.astype(query.dtype).reshape(query.shape)


def _list(rows: Rows, page_size: int) -> _Listed:
    """List the pages that a query sees some of."""
    batch, num_columns = rows.table.shape
    column = jnp.arange(num_columns, dtype=jnp.int32)[None]
    first = (rows.first_page[:, None] + column) * page_size  # Position in the sequence.
    is_seen = (rows.table >= 0) & (first <= rows.start[:, None])
    if rows.window is not None:
        is_seen &= first + page_size > rows.start[:, None] - rows.window + 1
    size = batch * num_columns
    room = -(-size // PAGES_AT_A_TIME) * PAGES_AT_A_TIME
    (place,) = jnp.nonzero(is_seen.reshape(-1), size=room, fill_value=0)
    place = place.astype(jnp.int32)
    return _Listed(
        pages=jnp.take(rows.table.reshape(-1), place),
        rows=place // num_columns,
        columns=place % num_columns,
        count=jnp.sum(is_seen, dtype=jnp.int32),
    )


def _meet(
    query: Float[Array, "B N G K"],
    pages: Pages,
    rows: Rows,
    in_use: _Listed,
    layer: Array,
    scale: Array,
    soft_cap: float | None,
) -> _Found:
    """Let the query of each row meet its pages, some pages at a time."""
    size, (_, *heads, head_dim) = len(in_use.pages), query.shape
    empty = jnp.zeros((size, *heads), jnp.float32)
    found = _Found(empty, empty, jnp.zeros((size, *heads, head_dim), jnp.float32))
    slots = jnp.arange(pages.keys.shape[3], dtype=jnp.int32)[None]

    def meet(index: Array, found: _Found) -> _Found:
        begin = index * PAGES_AT_A_TIME

        def some(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, begin, PAGES_AT_A_TIME)

        page, row, column = map(some, in_use[:3])
        of_row = lambda x: jnp.take(x, row, axis=0)
        read = lambda stack: stored(stack.at[layer, page].get(mode="clip"))
        keys, values = (read(x).astype(query.dtype) for x in pages[:2])
        scores = _times("pngk,pnsk->pngs", of_row(query), keys) * scale
        if pages.key_scales is not None:
            scores *= read(pages.key_scales)[:, :, None].astype(jnp.float32)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        position = (of_row(rows.first_page) + column)[:, None] * slots.shape[1] + slots
        distance = of_row(rows.start)[:, None] - position
        sees = distance >= 0
        if rows.window is not None:
            sees &= distance < rows.window
        bias = jnp.where(sees, 0, OUT_OF_SIGHT).astype(jnp.float32)
        scores += bias[:, None, None]
        maximum = scores.max(axis=-1)
        weights = jnp.exp(scores - maximum[..., None])
        total = weights.sum(axis=-1)
        if pages.value_scales is not None:
            weights *= read(pages.value_scales)[:, :, None].astype(jnp.float32)
        weighted = _times("pngs,pnsk->pngk", weights.astype(query.dtype), values)
        put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, begin, 0)
        return jax.tree.map(put, found, _Found(maximum, total, weighted))

    num_turns = -(-in_use.count // PAGES_AT_A_TIME)
    return jax.lax.fori_loop(0, num_turns, meet, found)


def _times(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
