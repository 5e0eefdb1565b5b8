"""The loops: some tokens at a time, and of the vocabulary some columns at a time.

              columns of the kernel on this device
            ┌────────┬────────┬────────┐
    chunk   │ block  │ block  │ block  │   each a float32 array [chunk, block], dropped
    of      └────────┴────────┴────────┘   when four numbers a token are read off it
    tokens  Σ: highest, total, weighted, target → log-probability, entropy

Devices that hold other columns have the same four numbers of the same tokens; a few
small collectives put them together. Where devices differ in their tokens too, a chunk
is gathered before its products and its gradient scattered after them, so that the
kernel and its gradient stay cut.

Where the kernel for Hopper runs (`mosaic_sm90`), a block is as wide as a copy of its
columns may be, and the logits of it are in no array; the gradient to them is one, in
the type of the hidden states.

Chunks are contiguous on one device. Where the compiler has cut the tokens in blocks
itself, chunk i of n has the tokens i, n + i, 2n + i, …: some of every block, and no
token moves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.linear_logprob import blocks
from pallas_kernels.linear_logprob.blocks import (
    Block,
    Parts,
    Rows,
    Scores,
    Static,
    constrained,
)


def score(static: Static, hidden, kernel, targets, kept) -> tuple[Scores, Array | None]:
    """Return the scores of every row, and the logits if they are to be kept."""
    if static.num_chunks is None:
        block = blocks.whole(kernel)
        logits = blocks.logits_of(static, block, hidden, kernel, kept)
        return blocks.combine(
            static, blocks.parts_of(static, block, logits, targets)
        ), logits

    def score_chunk(rows):
        hidden, targets, kept = rows

        def block_parts(block: Block) -> Parts:
            columns = blocks.columns_of(kernel, block)
            if static.kernel_blocks is not None:
                return blocks.kernel_parts_of(
                    static, block, hidden, columns, targets, kept
                )
            logits = blocks.logits_of(static, block, hidden, columns, kept)
            return blocks.parts_of(static, block, logits, targets)

        if static.block_size is None:
            parts = block_parts(blocks.whole(kernel))
        else:
            none = jnp.zeros(len(targets), jnp.float32)
            targeted = jnp.zeros_like(targets, jnp.float32)
            nothing = Parts(none + blocks.NOT_KEPT, none, none, targeted)

            def add(parts, index):
                more = block_parts(blocks.block_at(static, kernel, index))
                return blocks.merge(static, parts, more), None

            parts, _ = jax.lax.scan(add, nothing, blocks.indices(static, kernel))
        return blocks.combine(static, parts)

    return map_chunks(static, score_chunk, (hidden, targets, kept)), None


def gradients(static: Static, kernel, rows: Rows, logits=None):
    """Return the gradients to the hidden states and, float32, to the kernel.

    Args:
        static: as of `score`.
        kernel: as of `score`.
        rows: of all tokens on this device.
        logits: what `score` returned.
    """
    if static.num_chunks is None:
        block = blocks.whole(kernel)
        return blocks.block_gradient(static, block, kernel, rows, logits)
    dtype, num_tokens = rows.hidden.dtype, len(rows.hidden)

    def step(kernel_grad, rows):
        rows = _gather(static, rows)
        hidden_grad, kernel_grad = _chunk_gradient(static, kernel, rows, kernel_grad)
        return kernel_grad, _own_sum(static, hidden_grad.astype(dtype))

    zero = constrained(static, jnp.zeros(kernel.shape, jnp.float32))
    kernel_grad, hidden_grad = jax.lax.scan(step, zero, _split(static, rows))
    return _join(static, hidden_grad, num_tokens), kernel_grad


def map_chunks(static: Static, function, rows):
    """Return what a function says of each row, with some of them at a time.

    Args:
        static: as of `score`.
        function: of a chunk of rows, those of other devices that it gathers included.
        rows: arrays of all tokens on this device.
    """

    def of_chunk(rows):
        return _own(static, function(_gather(static, rows)))

    num_tokens = len(jax.tree.leaves(rows)[0])
    found = jax.lax.map(of_chunk, _split(static, rows))
    return _join(static, found, num_tokens)


def num_chunks(num_tokens: int, chunk_size: int) -> int:
    """Return the fewest chunks small enough; a few more if those are equal."""
    fewest = max(1, -(-num_tokens // chunk_size))
    equal = (n for n in range(fewest, 2 * fewest + 1) if num_tokens % n == 0)
    return next(equal, fewest)


def _split(static: Static, rows):
    """[T, …] -> [num_chunks, T / num_chunks, …]; short by some: padded with zeros."""
    count = static.num_chunks
    assert count is not None

    def split(x):
        missing = -len(x) % count
        if missing:
            x = jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:])))
        if static.constrain_kernel is None:
            return x.reshape(count, -1, *x.shape[1:])
        return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, rows)


def _join(static: Static, chunks, num_tokens: int):
    """Undo `_split`."""

    def join(x):
        if static.constrain_kernel is not None:
            x = jnp.swapaxes(x, 0, 1)
        return x.reshape(-1, *x.shape[2:])[:num_tokens]

    return jax.tree.map(join, chunks)


# -- some of the tokens ---------------------------------------------------------------


def _chunk_gradient(static: Static, kernel, rows: Rows, kernel_grad):
    """Return a chunk's gradient to its hidden states; add that to the kernel."""
    if static.block_size is None:
        block = blocks.whole(kernel)
        hidden_grad, more = blocks.block_gradient(static, block, kernel, rows)
        return hidden_grad, kernel_grad + more

    def add(sums, index):
        hidden_grad, kernel_grad = sums
        block = blocks.block_at(static, kernel, index)
        by_hidden, by_columns = blocks.block_gradient(
            static, block, blocks.columns_of(kernel, block), rows, dtype=jnp.float32
        )
        by_columns += blocks.columns_of(kernel_grad, block)
        kernel_grad = jax.lax.dynamic_update_slice_in_dim(
            kernel_grad, by_columns, block.start, axis=1
        )
        return (hidden_grad + by_hidden, kernel_grad), None

    zero = jnp.zeros(rows.hidden.shape, jnp.float32)
    sums, _ = jax.lax.scan(add, (zero, kernel_grad), blocks.indices(static, kernel))
    return sums


# -- tokens of other devices ---------------------------------------------------------


def _gather(static: Static, rows):
    if not static.gather_axes:
        return rows
    gather = lambda x: jax.lax.all_gather(x, static.gather_axes, axis=0, tiled=True)
    return jax.tree.map(gather, rows)


def _own(static: Static, rows):
    """Return this device's part of gathered rows."""
    if not static.gather_axes:
        return rows
    index, parts = (
        jax.lax.axis_index(static.gather_axes),
        jax.lax.axis_size(static.gather_axes),
    )

    def own(x):
        size = len(x) // parts
        return jax.lax.dynamic_slice_in_dim(x, index * size, size)

    return jax.tree.map(own, rows)


def _own_sum(static: Static, x):
    """Sum over the devices with other columns; return the rows of this device."""
    others = tuple(a for a in static.vocab_axes if a not in static.gather_axes)
    if static.gather_axes:
        x = jax.lax.psum_scatter(x, static.gather_axes, tiled=True)
    return jax.lax.psum(x, others) if others else x
