"""The grouped product in XLA, one block of rows at a time.

    rows      0 0 0 0 0 1 2 2 2 2 . .      groups of 5, 1, 0 and 4 rows; 2 of none
    blocks    [0    ] [0  ]                blocks of 3 rows: a group begins with one,
                        [1    ]            and what reaches into the next is left alone
                          [2    ] [2  ]

`jax.lax.ragged_dot` is on CPU and GPU a product of all rows with all matrices, masked:
E times the work. Here a group of n rows takes ceil(n / block) blocks, whatever the
others take, and the loop ends with the last of them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# A group ends in the middle of a block, so that half a block per group is wasted work;
# small blocks read a matrix again for few rows.
SMALLEST_BLOCK = 16
LARGEST_BLOCK = 1024

# A GPU waits for each answer to whether the loop goes on; so it is asked once for some
# blocks, of which the last may be empty.
BLOCKS_PER_ROUND = 8


class _Blocks(NamedTuple):
    """Where blocks lie; those past the last have no rows."""

    group: Int[Array, " blocks"]
    start: Int[Array, " blocks"]
    num_rows: Int[Array, " blocks"]
    num_rounds: Int[Array, ""]


def default_block_rows(num_rows: int, num_groups: int) -> int:
    """Return half a group's rows, if all groups are equal, as a power of two."""
    half = max(1, num_rows // (2 * num_groups))
    rounded = 1 << (half - 1).bit_length()
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, rounded))


def blocked(
    x: Float[Array, "T D"],
    kernels: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    *,
    block_rows: int | None = None,
) -> Float[Array, "T F"]:
    """Multiply block by block; `block_rows` is None for `default_block_rows`."""
    num_rows, num_groups = x.shape[0], kernels.shape[0]
    if not num_rows:
        return jnp.zeros((0, kernels.shape[2]), x.dtype)
    block_rows = block_rows or default_block_rows(num_rows, num_groups)
    return _blocked(min(block_rows, num_rows), x, kernels, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(block_rows: int, x, kernels, group_sizes):
    return _forward(block_rows, x, kernels, group_sizes)[0]


def _forward(block_rows: int, x, kernels, group_sizes):
    blocks = _lay(group_sizes, x.shape[0], block_rows)
    narrow = kernels.astype(x.dtype)

    def multiply(block: Array, out: Array) -> Array:
        start, is_own = _rows(blocks, block, block_rows, x.shape[0])
        rows = jax.lax.dynamic_slice_in_dim(x, start, block_rows)
        product = _times(rows, narrow[blocks.group[block]], "td,df->tf")
        return _write(out, product, start, is_own)

    out = jnp.zeros((x.shape[0], kernels.shape[2]), x.dtype)
    out = _for_each(blocks, multiply, out)
    return out, (x, kernels, group_sizes)


def _backward(block_rows: int, saved, out_bar):
    x, kernels, group_sizes = saved
    blocks = _lay(group_sizes, x.shape[0], block_rows)
    narrow = kernels.astype(x.dtype)

    def multiply(block: Array, bars: tuple[Array, Array]) -> tuple[Array, Array]:
        x_bar, kernels_bar = bars
        start, is_own = _rows(blocks, block, block_rows, x.shape[0])
        rows = jax.lax.dynamic_slice_in_dim(x, start, block_rows)
        rows_bar = jax.lax.dynamic_slice_in_dim(out_bar, start, block_rows)
        group = blocks.group[block]
        product = _times(rows_bar, narrow[group], "tf,df->td")
        x_bar = _write(x_bar, product, start, is_own)
        # Both: a row of no group may hold anything, and NaN x 0 is NaN.
        rows, rows_bar = (jnp.where(is_own, x, 0) for x in (rows, rows_bar))
        more = _times(rows, rows_bar, "td,tf->df")
        return x_bar, kernels_bar.at[group].add(more)

    zeros = (jnp.zeros_like(x), jnp.zeros(kernels.shape, jnp.float32))
    x_bar, kernels_bar = _for_each(blocks, multiply, zeros)
    return x_bar, kernels_bar.astype(kernels.dtype), None


_blocked.defvjp(_forward, _backward)


def _lay(group_sizes: Array, num_rows: int, block_rows: int) -> _Blocks:
    """Cut the rows of every group into blocks.

    n_1, …, n_E rows with n_1 + … + n_E <= T take at most T // block + E blocks.
    """
    num_groups = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    count = -(-sizes // block_rows)
    last = jnp.cumsum(count)
    most = num_rows // block_rows + num_groups
    block = jnp.arange(-(-most // BLOCKS_PER_ROUND) * BLOCKS_PER_ROUND, dtype=jnp.int32)
    group = jnp.searchsorted(last, block, side="right").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    end = jnp.cumsum(sizes)[group]
    place = block - (last - count)[group]
    start = jnp.minimum(end - sizes[group] + place * block_rows, end)
    return _Blocks(
        group=group,
        start=start,
        num_rows=jnp.minimum(end - start, block_rows),
        num_rounds=-(-last[-1] // BLOCKS_PER_ROUND),
    )


def _rows(
    blocks: _Blocks, block: Array, block_rows: int, num_rows: int
) -> tuple[Array, Array]:
    """Return the first row to read for a block, and which of them are its own.

    At the end of the rows that is earlier than the block's start.
    """
    start = blocks.start[block]
    first = jnp.minimum(start, num_rows - block_rows)
    row = first + jnp.arange(block_rows, dtype=jnp.int32)
    is_own = (row >= start) & (row < start + blocks.num_rows[block])
    return first, is_own[:, None]


def _write(out: Array, product: Array, start: Array, is_own: Array) -> Array:
    """Write a block's own rows."""
    before = jax.lax.dynamic_slice_in_dim(out, start, len(product))
    rows = jnp.where(is_own, product.astype(out.dtype), before)
    return jax.lax.dynamic_update_slice_in_dim(out, rows, start, axis=0)


def _for_each[Carry](
    blocks: _Blocks, body: Callable[[Array, Carry], Carry], carry: Carry
) -> Carry:
    """Fold the blocks that have rows, in rounds of `BLOCKS_PER_ROUND`."""

    def round_(number: Array, carry: Carry) -> Carry:
        first = number * BLOCKS_PER_ROUND
        return jax.lax.fori_loop(
            0, BLOCKS_PER_ROUND, lambda i, carry: body(first + i, carry), carry
        )

    return jax.lax.fori_loop(0, blocks.num_rounds, round_, carry)


def _times(x: Array, y: Array, equation: str) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
