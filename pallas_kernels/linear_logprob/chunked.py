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

Chunks are contiguous on one device. Where the compiler has cut the tokens in blocks
itself, chunk i of n has the tokens i, n + i, 2n + i, …: some of every block, and no
token moves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_logprob import reference

# Finite, so that 0 · it is 0 and not NaN; the softmax of it is exactly 0.
NOT_KEPT = -1e30
# exp of it is exactly 0, and its product with a count is finite.
_FAR_BELOW = -1e4


class Static(NamedTuple):
    """What is known before tracing.

    Attributes:
        temperature: divides the logits.
        soft_cap: bounds them before.
        vocab_size: columns of the whole kernel past it are padding.
        num_chunks: of the tokens; None makes all logits at once and keeps them.
        block_size: columns of this device that are looked at together; None: all.
        constrain_kernel: a sharding constraint on the kernel and its gradient; None
            where the arrays are one device's.
        gather_axes: mesh axes that split both the tokens and the columns.
        vocab_axes: mesh axes that split the columns, slowest first.
    """

    temperature: float
    soft_cap: float | None
    vocab_size: int
    num_chunks: int | None
    block_size: int | None = None
    constrain_kernel: Callable[[Array], Array] | None = None
    gather_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()


class Scores(NamedTuple):
    """What is kept of each token's logits."""

    logprobs: Float[Array, " T"]
    entropy: Float[Array, " T"]
    log_normalizer: Float[Array, " T"]


class Rows(NamedTuple):
    """What the gradients need of each token.

    Attributes:
        hidden, targets, kept: as `score` takes them.
        scores: what it returned.
        cotangents: of log-probabilities and entropies; None where unused.
    """

    hidden: Float[Array, "T D"]
    targets: Int[Array, " T"]
    kept: Any
    scores: Scores
    cotangents: list[Any]


class _Block(NamedTuple):
    """Columns of this device's kernel that are looked at together.

    Attributes:
        start: first of them; a Python number where the block is the whole.
        num_done: how many of them belong to an earlier block: the last block is moved
            to the left so that all are equally wide.
        width: how many.
        num_columns: of this device's kernel.
    """

    start: Array | int
    num_done: Array | int
    width: int
    num_columns: int


class _Parts(NamedTuple):
    """Sums over some columns, with weights exp((logit - highest) / temperature)."""

    highest: Float[Array, " T"]
    total: Float[Array, " T"]
    weighted: Float[Array, " T"]  # Σ weight · (logit - highest) / temperature
    target: Float[Array, " T"]  # The target's logit if it is among them, or 0.


def score(static: Static, hidden, kernel, targets, kept) -> tuple[Scores, Any]:
    """Return the scores of every row, and the logits if they are to be kept."""
    if static.num_chunks is None:
        block = _whole(kernel)
        logits = _logits(static, block, hidden, kernel, kept)
        return _combine(static, _parts(static, block, logits, targets)), logits

    def score_chunk(rows):
        hidden, targets, kept = _gather(static, rows)

        def block_parts(block: _Block) -> _Parts:
            logits = _logits(static, block, hidden, _columns(kernel, block), kept)
            return _parts(static, block, logits, targets)

        if static.block_size is None:
            parts = block_parts(_whole(kernel))
        else:
            none = jnp.zeros_like(targets, jnp.float32)
            nothing = _Parts(none + NOT_KEPT, none, none, none)

            def add(parts, index):
                more = block_parts(_block(static, kernel, index))
                return _merge(static, parts, more), None

            parts, _ = jax.lax.scan(add, nothing, _indices(static, kernel))
        return _own(static, _combine(static, parts))

    chunks = _split(static, (hidden, targets, kept))
    scores = jax.lax.map(score_chunk, chunks)
    return _join(static, scores, hidden.shape[0]), None


def gradients(static: Static, kernel, rows: Rows, logits=None):
    """Return the gradients to the hidden states and, float32, to the kernel.

    Args:
        static: as of `score`.
        kernel: as of `score`.
        rows: of all tokens on this device.
        logits: what `score` returned.
    """
    if static.num_chunks is None:
        block = _whole(kernel)
        return _block_gradient(static, block, kernel, rows, logits)
    dtype, num_tokens = rows.hidden.dtype, len(rows.hidden)

    def step(kernel_grad, rows):
        rows = _gather(static, rows)
        hidden_grad, kernel_grad = _chunk_gradient(static, kernel, rows, kernel_grad)
        return kernel_grad, _own_sum(static, hidden_grad.astype(dtype))

    zero = constrained(static, jnp.zeros(kernel.shape, jnp.float32))
    kernel_grad, hidden_grad = jax.lax.scan(step, zero, _split(static, rows))
    return _join(static, hidden_grad, num_tokens), kernel_grad


def constrained(static: Static, kernel):
    """Return the kernel, or its gradient, with its sharding."""
    if static.constrain_kernel is None:
        return kernel
    return static.constrain_kernel(kernel)


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


# -- blocks of columns ---------------------------------------------------------------


def _whole(kernel) -> _Block:
    return _Block(0, 0, kernel.shape[1], kernel.shape[1])


def _block(static: Static, kernel, index) -> _Block:
    size, width = kernel.shape[1], static.block_size
    assert width is not None
    start = jnp.minimum(index * width, size - width)
    return _Block(start, index * width - start, width, size)


def _indices(static: Static, kernel):
    assert static.block_size is not None
    return jnp.arange(-(-kernel.shape[1] // static.block_size), dtype=jnp.int32)


def _columns(kernel, block: _Block):
    if block.width == block.num_columns:
        return kernel
    return jax.lax.dynamic_slice_in_dim(kernel, block.start, block.width, axis=1)


def _first_id(static: Static, block: _Block):
    """Return the token id of a block's first column."""
    if not static.vocab_axes:
        return block.start
    return jax.lax.axis_index(static.vocab_axes) * block.num_columns + block.start


def _logits(static: Static, block: _Block, hidden, columns, kept):
    """Return capped logits before the division by the temperature; or -1e30."""
    logits = reference.project(hidden, columns)
    logits = reference.capped_logits(logits, static.soft_cap)
    mask = _is_counted(static, block, kept)
    return logits if mask is None else jnp.where(mask, logits, NOT_KEPT)


def _is_counted(static: Static, block: _Block, kept):
    """Return which logits count, [T, block] or [1, block]; None if all do."""
    is_part = bool(static.vocab_axes) or static.block_size is not None
    width, place = block.width, jnp.arange(block.width, dtype=jnp.int32)[None, :]
    mask = None
    if kept is not None and not is_part:
        mask = reference.is_kept(kept, static.vocab_size)
        mask = jnp.pad(mask, ((0, 0), (0, width - static.vocab_size)))
    elif is_part or width > static.vocab_size:
        first = _first_id(static, block)
        if kept is not None:
            mask = reference.is_kept_between(kept, first, width, static.vocab_size)
        else:
            mask = first + place < static.vocab_size
        mask &= place >= block.num_done
    if mask is None:
        return None
    # The barrier keeps shifts and masks of integers out of the loops over exponentials,
    # which a CPU would then not vectorise.
    return jax.lax.optimization_barrier(mask)


def _place(static: Static, block: _Block, targets):
    """Return where in a block a target is, and whether it is there."""
    place = targets - _first_id(static, block)
    return place, (place >= block.num_done) & (place < block.width)


# -- sums over the vocabulary --------------------------------------------------------


def _parts(static: Static, block: _Block, logits, targets) -> _Parts:
    highest = jnp.max(logits, axis=-1, keepdims=True)
    below = (logits - highest) * (1.0 / static.temperature)
    weights = jnp.exp(below)
    place, is_here = _place(static, block, targets)
    place = jnp.clip(place, 0, block.width - 1)
    target = jnp.take_along_axis(logits, place[:, None], axis=-1)[:, 0]
    return _Parts(
        highest=highest[:, 0],
        total=jnp.sum(weights, axis=-1),
        weighted=jnp.sum(weights * below, axis=-1),
        target=jnp.where(is_here, target, 0.0),
    )


def _raise_to(static: Static, parts: _Parts, highest) -> tuple[Array, Array]:
    """Return total and weighted sum with weights relative to a higher logit."""
    shift = (parts.highest - highest) * (1.0 / static.temperature)
    shift = jnp.maximum(shift, _FAR_BELOW)
    scale = jnp.exp(shift)
    return scale * parts.total, scale * (parts.weighted + shift * parts.total)


def _merge(static: Static, a: _Parts, b: _Parts) -> _Parts:
    highest = jnp.maximum(a.highest, b.highest)
    (total_a, weighted_a), (total_b, weighted_b) = (
        _raise_to(static, parts, highest) for parts in (a, b)
    )
    return _Parts(
        highest, total_a + total_b, weighted_a + weighted_b, a.target + b.target
    )


def _combine(static: Static, parts: _Parts) -> Scores:
    """Return the scores from the sums over all columns, of all devices."""
    highest, total, weighted, target = parts
    if static.vocab_axes:
        highest = jax.lax.pmax(highest, static.vocab_axes)
        total, weighted = _raise_to(static, parts, highest)
        total, weighted, target = jax.lax.psum(
            (total, weighted, target), static.vocab_axes
        )
    log_total = jnp.log(total)
    below = (target - highest) * (1.0 / static.temperature)
    is_possible = target > 0.5 * NOT_KEPT
    return Scores(
        logprobs=jnp.where(is_possible, below - log_total, -jnp.inf),
        entropy=log_total - weighted / total,
        log_normalizer=highest + static.temperature * log_total,
    )


# -- gradients -----------------------------------------------------------------------


def _chunk_gradient(static: Static, kernel, rows: Rows, kernel_grad):
    """Return a chunk's gradient to its hidden states; add that to the kernel."""
    if static.block_size is None:
        block = _whole(kernel)
        hidden_grad, more = _block_gradient(static, block, kernel, rows)
        return hidden_grad, kernel_grad + more

    def add(sums, index):
        hidden_grad, kernel_grad = sums
        block = _block(static, kernel, index)
        by_hidden, by_columns = _block_gradient(
            static, block, _columns(kernel, block), rows, dtype=jnp.float32
        )
        by_columns += _columns(kernel_grad, block)
        kernel_grad = jax.lax.dynamic_update_slice_in_dim(
            kernel_grad, by_columns, block.start, axis=1
        )
        return (hidden_grad + by_hidden, kernel_grad), None

    zero = jnp.zeros(rows.hidden.shape, jnp.float32)
    sums, _ = jax.lax.scan(add, (zero, kernel_grad), _indices(static, kernel))
    return sums


def _block_gradient(
    static: Static, block: _Block, columns, rows: Rows, logits=None, dtype=None
):
    """Return the gradients of some rows: to their hidden states, and to some columns.

    d logprob / d logit_v = [v = target] - p_v
    d entropy / d logit_v = -p_v (log p_v + entropy)
    d logit / d product = 1 - (logit / cap)², where logit = cap tanh(product / cap)
    """
    hidden, targets, kept, scores, cotangents = rows
    if logits is None:
        logits = _logits(static, block, hidden, columns, kept)
    scale = 1.0 / static.temperature
    by_logprob, by_entropy = (c if c is None else c * scale for c in cotangents)
    logprobs = (logits - scores.log_normalizer[:, None]) * scale
    factor = jnp.zeros_like(logprobs[:, :1])
    if by_logprob is not None:
        factor = factor + by_logprob[:, None]
    if by_entropy is not None:
        factor = factor + by_entropy[:, None] * (logprobs + scores.entropy[:, None])
    grad = -jnp.exp(logprobs) * factor
    if by_logprob is not None:
        place, is_here = _place(static, block, targets)
        place = jnp.where(is_here, place, block.width)  # Out of range, and dropped.
        grad = jax.vmap(lambda row, at, x: row.at[at].add(x, mode="drop"))(
            grad, place, by_logprob
        )
    if static.soft_cap is not None:
        # Of a logit that does not count, -1e30, the square would be infinite.
        ratio = jnp.clip(logits * (1.0 / static.soft_cap), -1.0, 1.0)
        grad = grad * (1.0 - ratio * ratio)
    grad = grad.astype(hidden.dtype)
    by_hidden = jnp.einsum(
        "tv,dv->td",
        grad,
        columns.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    by_columns = jnp.einsum(
        "td,tv->dv", hidden, grad, preferred_element_type=jnp.float32
    )
    return by_hidden.astype(dtype or hidden.dtype), by_columns


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
