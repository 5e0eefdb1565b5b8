"""The paged pool of keys and values, which sequences share.

    keys, values  [layer, page, kv head, slot, head dim]

A page holds S = `page_size` tokens of one sequence, in all layers. A sequence has the
pages that a row of `table` lists, in order; -1 is none. With S = 4 and first_page = 1:

    position       0 1 2 3 | 4 5 6 7 | 8 9
    table[b]        dropped     7        2     -1

On a mesh the pages are cut over the axes of rows, as the rows are, and the heads over
tensor. Ids of pages count within the part of their row, so that everything here is
done without a word between devices.

A pool of 8 bits keeps one scale for each token and head: x is scale x what is stored.
Floats of 8 bits are stored as their bits, uint8: to write some of an array of such
floats, XLA for the CPU would make a larger type of all of it, and back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float, Int, PyTree, Shaped
from realjax.models import quantized
from realjax.models.axes import OF_ROWS, PAGE_SCALES, PAGES
from realjax.models.config import ModelConfig
from realjax.models.partition import WHOLE, Partition

DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
"""Types of a pool; those of 8 bits have scales."""

_SCALE_DTYPE = jnp.dtype(jnp.float32)


class Pool(NamedTuple):
    """Keys and values of every layer and page; scales where they are of 8 bits.

    In the order that `paged_attention` takes them.
    """

    keys: Shaped[Array, "L P N S K"]
    values: Shaped[Array, "L P N S K"]
    key_scales: Float[Array, "L P N S"] | None = None
    value_scales: Float[Array, "L P N S"] | None = None

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.keys.shape[3]


def empty(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: DTypeLike,
    partition: Partition = WHOLE,
) -> Pool:
    """Make a pool of zeros.

    It holds the key and value heads as often as the partition repeats them, so that it
    can be cut where they are.

    Args:
        config: of the model.
        num_pages: on all parts of the rows together, which must divide it.
        page_size: tokens of a page.
        dtype: one of `DTYPES`.
        partition: how the pool is cut.

    Raises:
        ValueError: there is no pool of that type.
    """
    dtype = _checked(dtype)
    heads = partition.num_kv_heads(config.num_kv_heads)
    shape = (config.num_layers, num_pages, heads, page_size)
    stored = jnp.uint8 if dtype == jnp.float8_e4m3fn else dtype
    stack = lambda: partition.constrain(
        jnp.zeros((*shape, config.head_dim), stored), PAGES
    )
    if dtype.name not in quantized.DTYPES:
        return Pool(stack(), stack())
    scales = lambda: partition.constrain(jnp.zeros(shape, _SCALE_DTYPE), PAGE_SCALES)
    return Pool(stack(), stack(), scales(), scales())


def page_bytes(
    config: ModelConfig,
    page_size: int,
    dtype: DTypeLike,
    partition: Partition = WHOLE,
) -> int:
    """Count the bytes of one page of `empty`, over all devices that have a part."""
    dtype = _checked(dtype)
    of_head = config.head_dim * dtype.itemsize
    if dtype.name in quantized.DTYPES:
        of_head += _SCALE_DTYPE.itemsize
    heads = partition.num_kv_heads(config.num_kv_heads)
    return 2 * config.num_layers * heads * page_size * of_head


def axes_of(pool: Pool) -> PyTree:
    """Return a tree like the pool's, with the logical axes of each array."""
    return jax.tree.map(lambda stack: PAGES[: stack.ndim], pool)


def write(
    pool: Pool,
    layer: Int[Array, ""],
    table: Int[Array, "B M"],
    first_page: Int[Array, " B"],
    start: Int[Array, " B"],
    counts: Int[Array, " B"],
    key: Float[Array, "B T N K"],
    value: Float[Array, "B T N K"],
) -> Pool:
    """Write one layer's keys and values of the next tokens of every row.

    Pages are those of one part of the rows: on a mesh, call it through
    `Partition.locally`.

    Args:
        pool: as it is.
        layer: of the keys and values.
        table: pages of each row; none of those written to is in two rows.
        first_page: pages of the row before those in its table.
        start: position of each row's first token given.
        counts: tokens given of each row; those after them are padding, and nothing is
            written for them, nor for tokens whose page is not in the table.
        key: of each token.
        value: of each token.
    """
    _, num_pages, _, page_size, _ = pool.keys.shape
    num_tokens, num_columns = key.shape[1], table.shape[1]
    token = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    position = start[:, None] + token
    column = position // page_size - first_page[:, None]
    page = jnp.take_along_axis(table, jnp.clip(column, 0, num_columns - 1), axis=1)
    is_kept = (token < counts[:, None]) & (page >= 0)
    is_kept &= (column >= 0) & (column < num_columns)
    # No two tokens have the same place, those that are dropped included, so that none
    # waits for another.
    nowhere = num_pages + jnp.arange(page.size, dtype=jnp.int32)
    page = jnp.where(is_kept, page, nowhere.reshape(page.shape))
    slot = position % page_size

    def put(stack: Array, new: Array) -> Array:
        # Not seen as [L x P, …]: the compiler may then want the heads elsewhere in
        # memory, and copy the pool twice in every layer.
        places = stack.at[layer, page, :, slot]
        new = new.astype(stack.dtype)
        return places.set(new, mode="drop", unique_indices=True)

    # A slot out of sight counts with a weight of 0, which leaves nothing of a number,
    # but a NaN: one that stayed would spread to whoever has the page next.
    key, value = (jnp.where(jnp.isfinite(x), x, 0) for x in (key, value))
    if pool.key_scales is None or pool.value_scales is None:
        return Pool(put(pool.keys, key), put(pool.values, value))
    key, key_scales = _quantized(key, pool.keys.dtype)
    value, value_scales = _quantized(value, pool.values.dtype)
    return Pool(
        put(pool.keys, key),
        put(pool.values, value),
        put(pool.key_scales, key_scales),
        put(pool.value_scales, value_scales),
    )


def copy_pages(
    pool: Pool,
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
    partition: Partition = WHOLE,
) -> Pool:
    """Copy pages to other pages, in all layers.

    Args:
        pool: as it is.
        sources: pages to read; all are read before any is written.
        targets: pages to write, each at most once; -1 where there is nothing to copy.
            On a mesh, as the sources, cut like rows: each part of the rows has as many,
            with ids of its own.
        partition: how the pool is cut.
    """

    def copy(pool: Pool, sources: Array, targets: Array) -> Pool:
        num_pages = pool.keys.shape[1]
        nowhere = num_pages + jnp.arange(len(targets), dtype=jnp.int32)
        targets = jnp.where((targets >= 0) & (sources >= 0), targets, nowhere)

        def put(stack: Array) -> Array:
            copied = jnp.take(stack, sources, axis=1, mode="clip")
            return stack.at[:, targets].set(copied, mode="drop", unique_indices=True)

        return jax.tree.map(put, pool)

    axes = axes_of(pool)
    local = partition.locally(copy, (axes, OF_ROWS, OF_ROWS), axes)
    return local(pool, sources, targets)


def _checked(dtype: DTypeLike) -> jnp.dtype:
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(
            f"There is no pool of pages of {dtype.name}. Types are {', '.join(DTYPES)}."
        )
    return dtype


def _quantized(
    x: Float[Array, "B T N K"], stored: jnp.dtype
) -> tuple[Array, Float[Array, "B T N"]]:
    """Return what is stored of x, and a scale for each token and head."""
    name = "float8_e4m3fn" if stored == jnp.uint8 else "int8"
    found = quantized.in_eight_bits(x, name, (x.ndim - 1,))
    return found.values, found.scale
