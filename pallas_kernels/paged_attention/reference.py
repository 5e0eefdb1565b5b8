"""Attention to pages in XLA: the pages of each row are gathered, then attended to.

    pages [L, P, N, S, K]  ->  [B, N, M, S, K]  =  [B, N, M x S, K]

S x K numbers, one head of one page, move at a time, and lie then as in a dense cache.

Nothing is transposed, neither the pool nor what is gathered from it. Gathering costs
most of the time, so only the columns of the table that are in use take part: one of a
few widths, chosen when the program runs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.paged_attention.partials import OUT_OF_SIGHT, Partials, combine

# More scores than these, 256 MiB in float32, are computed some queries at a time.
MOST_SCORES = 2**26

# A table is read up to one of so many even parts, or of halves of the first part; parts
# of fewer columns are not worth a program of their own.
_NUM_PARTS = 8
_FEWEST_COLUMNS = 4


class Pages(NamedTuple):
    """Keys and values of all layers, as they lie in memory.

    With scales, a key is what is stored times the scale of its token and head. Of
    uint8, what is stored are the bits of float8_e4m3fn.
    """

    keys: Shaped[Array, "L P N S K"]
    values: Shaped[Array, "L P N S K"]
    key_scales: Float[Array, "L P N S"] | None = None
    value_scales: Float[Array, "L P N S"] | None = None


class Rows(NamedTuple):
    """Which pages the rows have, and where their queries stand."""

    table: Int[Array, "B M"]
    first_page: Int[Array, " B"]
    start: Int[Array, " B"]
    window: Int[Array, ""] | None = None


class _Gathered(NamedTuple):
    """What the rows may see; J slots, those of no page at a position never reached."""

    keys: Float[Array, "B N J K"]
    values: Float[Array, "B N J K"]
    key_scales: Float[Array, "B N J"] | None
    value_scales: Float[Array, "B N J"] | None
    positions: Int[Array, "B J"]


def gathered(
    query: Float[Array, "B T H K"],
    pages: Pages,
    rows: Rows,
    *,
    layer: Int[Array, ""],
    num_pages: Int[Array, ""],
    scale: Float[Array, ""],
    soft_cap: float | None,
) -> Float[Array, "B T H K"]:
    """Attend to the pages in the first columns of the table, `num_pages` or more."""
    finish = lambda found: combine(found).astype(query.dtype)
    return _gathered(query, pages, rows, layer, num_pages, scale, soft_cap, finish)


def gathered_in_part(
    query: Float[Array, "B T H K"],
    pages: Pages,
    rows: Rows,
    *,
    layer: Int[Array, ""],
    num_pages: Int[Array, ""],
    scale: Float[Array, ""],
    soft_cap: float | None,
) -> Partials:
    """Return what the pages in the first columns of the table say."""
    finish = lambda found: found
    return _gathered(query, pages, rows, layer, num_pages, scale, soft_cap, finish)


def _gathered(
    query: Array,
    pages: Pages,
    rows: Rows,
    layer: Array,
    num_pages: Array,
    scale: Array,
    soft_cap: float | None,
    finish: Callable[[Partials], Any],
) -> Any:
    widths = _widths(rows.table.shape[1])

    def attend(width: int) -> Any:
        seen = _gather(pages, rows, layer, width, query.dtype)
        return _in_blocks(query, seen, rows, scale, soft_cap, finish)

    if len(widths) == 1:
        return attend(widths[0])
    index = sum((num_pages > width).astype(jnp.int32) for width in widths[:-1])
    return jax.lax.switch(index, [functools.partial(attend, width) for width in widths])


def _widths(num_columns: int) -> tuple[int, ...]:
    """Return the numbers of columns that a table may be read up to, the least first.

    Of 64 columns: 4, 8, 16, 24, 32, 40, 48, 56, 64.
    """
    part = max(-(-num_columns // _NUM_PARTS), _FEWEST_COLUMNS)
    widths = {min(part * count, num_columns) for count in range(1, _NUM_PARTS + 1)}
    while part >= 2 * _FEWEST_COLUMNS:
        part = -(-part // 2)
        widths.add(part)
    return tuple(sorted(widths))


def _gather(
    pages: Pages, rows: Rows, layer: Array, width: int, dtype: jnp.dtype
) -> _Gathered:
    """Read the pages in the first columns of the table."""
    num_heads, page_size = pages.keys.shape[2:4]
    table = rows.table[:, :width]
    # Where there is no page, page 0 is read and not seen.
    page_B1M = jnp.maximum(table, 0)[:, None]
    head_1N1 = jnp.arange(num_heads, dtype=jnp.int32)[None, :, None]

    def read(stack: Array) -> Array:
        found = stored(stack.at[layer, page_B1M, head_1N1].get(mode="clip"))
        return found.reshape(len(table), num_heads, -1, *stack.shape[4:])

    columns = rows.first_page[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    slots = jnp.arange(page_size, dtype=jnp.int32)[None, None]
    positions = columns[:, :, None] * page_size + slots
    # Later than any query: what is not there is not seen.
    never = jnp.iinfo(jnp.int32).max
    positions = jnp.where(table[:, :, None] >= 0, positions, never)
    return _Gathered(
        keys=read(pages.keys).astype(dtype),
        values=read(pages.values).astype(dtype),
        key_scales=None if pages.key_scales is None else read(pages.key_scales),
        value_scales=None if pages.value_scales is None else read(pages.value_scales),
        positions=positions.reshape(len(table), -1),
    )


def stored(x: Shaped[Array, "*dims"]) -> Shaped[Array, "*dims"]:
    """Return the numbers that are stored: of uint8, those of float8_e4m3fn."""
    if x.dtype == jnp.uint8:
        return jax.lax.bitcast_convert_type(x, jnp.float8_e4m3fn)
    return x


def _in_blocks(
    query: Float[Array, "B T H K"],
    seen: _Gathered,
    rows: Rows,
    scale: Array,
    soft_cap: float | None,
    finish: Callable[[Partials], Any],
) -> Any:
    """Attend from all queries at once, or from some at a time if scores are many."""
    batch, num_queries, num_heads, _ = query.shape
    positions = rows.start[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None]

    def attend(block: tuple[Array, Array]) -> Any:
        queries, places = block
        return finish(_attend(queries, places, seen, rows.window, scale, soft_cap))

    scores_of_one = batch * num_heads * seen.keys.shape[2]
    num_blocks = min(-(-num_queries * scores_of_one // MOST_SCORES), num_queries)
    if num_blocks == 1:
        return attend((query, positions))
    size = -(-num_queries // num_blocks)
    missing = -num_queries % size

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
        return jnp.swapaxes(x.reshape(batch, -1, size, *x.shape[2:]), 0, 1)

    def whole(x: Array) -> Array:
        x = jnp.swapaxes(x, 0, 1)
        return x.reshape(batch, -1, *x.shape[3:])[:, :num_queries]

    return jax.tree.map(whole, jax.lax.map(attend, (cut(query), cut(positions))))


def _attend(
    query: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    seen: _Gathered,
    window: Array | None,
    scale: Array,
    soft_cap: float | None,
) -> Partials:
    """Attend with all scores at once; they and their softmax are float32."""
    batch, num_queries, num_heads, head_dim = query.shape
    num_kv_heads = seen.keys.shape[1]
    split = (batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    query_BNGTK = jnp.transpose(query.reshape(split), (0, 2, 3, 1, 4))
    scores = _times(query_BNGTK, seen.keys, "bnik,bnjk->bnij") * scale
    if seen.key_scales is not None:
        scores = scores * seen.key_scales[:, :, None, None].astype(jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = scores + _bias(positions, seen.positions, window)
    maximum = scores.max(axis=-1)
    weights = jnp.exp(scores - maximum[..., None])
    total = weights.sum(axis=-1)
    if seen.value_scales is not None:
        weights = weights * seen.value_scales[:, :, None, None].astype(jnp.float32)
    sums = _times(weights.astype(query.dtype), seen.values, "bnij,bnjk->bnik")

    def of_tokens(x: Float[Array, "B N G T *dims"]) -> Float[Array, "B T H *dims"]:
        return jnp.moveaxis(x, 3, 1).reshape(*query.shape[:3], *x.shape[4:])

    return Partials(*map(of_tokens, (maximum, total, sums)))


def _bias(
    positions: Int[Array, "B T"], of_keys: Int[Array, "B J"], window: Array | None
) -> Float[Array, "B 1 1 T J"]:
    """Return 0 where a query sees a key, `OUT_OF_SIGHT` elsewhere."""
    distance_BTJ = positions[:, :, None] - of_keys[:, None, :]
    sees_BTJ = distance_BTJ >= 0
    if window is not None:
        sees_BTJ = sees_BTJ & (distance_BTJ < window)
    return jnp.where(sees_BTJ, 0, OUT_OF_SIGHT).astype(jnp.float32)[:, None, None]


def _times(x: Array, y: Array, equation: str) -> Array:
    """Multiply [B, N, G, T, ·] by [B, N, ·, ·] with G and T as one dimension."""
    merged = x.reshape(*x.shape[:2], -1, x.shape[-1])
    product = jnp.einsum(equation, merged, y, preferred_element_type=jnp.float32)
    return product.reshape(*x.shape[:4], -1)
