"""What is read off the logits of some columns: sums, scores and gradients.

A block of columns is what is looked at together. Its logits are a float32 array, or are
in none where the kernel for Hopper makes them (`mosaic_sm90`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_logprob import mosaic_sm90, reference
from pallas_kernels.linear_logprob.tiles_sm90 import Blocks, Counted

# Finite, so that 0 · it is 0 and not NaN; the softmax of it is exactly 0.
NOT_KEPT = mosaic_sm90.NOT_KEPT
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
        kernel_blocks: sizes of the Mosaic kernel; None has XLA make the logits.
    """

    temperature: float
    soft_cap: float | None
    vocab_size: int
    num_chunks: int | None
    block_size: int | None = None
    constrain_kernel: Callable[[Array], Array] | None = None
    gather_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()
    kernel_blocks: Blocks | None = None


class Scores(NamedTuple):
    """What is kept of each token's logits.

    Attributes:
        logprobs: of the targets; one of each token, or several.
        entropy: of the distributions.
        log_normalizer: log of the sum of exp(logit / temperature), times the
            temperature: as a logit that is not divided.
    """

    logprobs: Float[Array, " T"] | Float[Array, "T K"]
    entropy: Float[Array, " T"]
    log_normalizer: Float[Array, " T"]


class Rows(NamedTuple):
    """What the gradients need of each token.

    Attributes:
        hidden, targets, kept: as `score` takes them.
        scores: what it returned.
        cotangents: of `scores`, one by one; None where unused.
    """

    hidden: Float[Array, "T D"]
    targets: Int[Array, " T"] | Int[Array, "T K"]
    kept: Any
    scores: Scores
    cotangents: list[Any]


class Block(NamedTuple):
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


class Parts(NamedTuple):
    """Sums over some columns, with weights exp((logit - highest) / temperature)."""

    highest: Float[Array, " T"]
    total: Float[Array, " T"]
    weighted: Float[Array, " T"]  # Σ weight · (logit - highest) / temperature
    # The logit of a target if it is among them, or 0.
    target: Float[Array, " T"] | Float[Array, "T K"]


def constrained(static: Static, kernel):
    """Return the kernel, or its gradient, with its sharding."""
    if static.constrain_kernel is None:
        return kernel
    return static.constrain_kernel(kernel)


# -- blocks of columns ---------------------------------------------------------------


def whole(kernel) -> Block:
    """Return the block that is all columns."""
    return Block(0, 0, kernel.shape[1], kernel.shape[1])


def block_at(static: Static, kernel, index) -> Block:
    """Return the block of an index."""
    size, width = kernel.shape[1], static.block_size
    assert width is not None
    start = jnp.minimum(index * width, size - width)
    return Block(start, index * width - start, width, size)


def indices(static: Static, kernel):
    """Return the indices of all blocks."""
    assert static.block_size is not None
    return jnp.arange(-(-kernel.shape[1] // static.block_size), dtype=jnp.int32)


def columns_of(kernel, block: Block):
    """Return a block's columns of the kernel."""
    if block.width == block.num_columns:
        return kernel
    return jax.lax.dynamic_slice_in_dim(kernel, block.start, block.width, axis=1)


def first_id(static: Static, block: Block):
    """Return the token id of a block's first column."""
    if not static.vocab_axes:
        return block.start
    return jax.lax.axis_index(static.vocab_axes) * block.num_columns + block.start


def logits_of(static: Static, block: Block, hidden, columns, kept):
    """Return capped logits before the division by the temperature; or -1e30."""
    logits = reference.project(hidden, columns)
    logits = reference.capped_logits(logits, static.soft_cap)
    mask = _is_counted(static, block, kept)
    return logits if mask is None else jnp.where(mask, logits, NOT_KEPT)


def _is_counted(static: Static, block: Block, kept):
    """Return which logits count, [T, block] or [1, block]; None if all do."""
    is_part = bool(static.vocab_axes) or static.block_size is not None
    width, place = block.width, jnp.arange(block.width, dtype=jnp.int32)[None, :]
    mask = None
    if kept is not None and not is_part:
        mask = reference.is_kept(kept, static.vocab_size)
        mask = jnp.pad(mask, ((0, 0), (0, width - static.vocab_size)))
    elif is_part or width > static.vocab_size:
        first = first_id(static, block)
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


def _place(static: Static, block: Block, targets):
    """Return where in a block a target is, and whether it is there."""
    place = targets - first_id(static, block)
    return place, (place >= block.num_done) & (place < block.width)


def _compute_columns(hidden, columns):
    """Return columns in the type of the products, as many as copies need."""
    columns = columns.astype(hidden.dtype)
    missing = mosaic_sm90.padded_columns(columns.shape[1]) - columns.shape[1]
    return jnp.pad(columns, ((0, 0), (0, missing))) if missing else columns


def _counted(static: Static, block: Block, kept) -> Counted:
    """Return which logits of a block count, as the Mosaic kernel takes it."""
    first = first_id(static, block)
    if kept is not None:
        words = reference.words_between(
            kept, first, block.width, static.vocab_size, num_left_out=block.num_done
        )
        return Counted(words=jax.lax.bitcast_convert_type(words, jnp.int32))
    is_part = bool(static.vocab_axes) or static.block_size is not None
    is_padded = block.width != mosaic_sm90.padded_columns(block.width)
    if not is_part and not is_padded and static.vocab_size == block.width:
        return Counted()
    last = jnp.clip(static.vocab_size - first, 0, block.width)
    return Counted(bounds=jnp.stack([block.num_done, last]).astype(jnp.int32))


def _kernel_places(static: Static, block: Block, targets):
    place, is_here = _place(static, block, targets)
    return jnp.where(is_here, place, mosaic_sm90.NOWHERE)


# -- sums over the vocabulary --------------------------------------------------------


def parts_of(static: Static, block: Block, logits, targets) -> Parts:
    """Return the sums over a block from its logits."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    below = (logits - highest) * (1.0 / static.temperature)
    weights = jnp.exp(below)
    place, is_here = _place(static, block, targets)
    place = jnp.clip(place, 0, block.width - 1).reshape(len(logits), -1)
    target = jnp.take_along_axis(logits, place, axis=-1).reshape(targets.shape)
    return Parts(
        highest=highest[:, 0],
        total=jnp.sum(weights, axis=-1),
        weighted=jnp.sum(weights * below, axis=-1),
        target=jnp.where(is_here, target, 0.0),
    )


def _raise_to(static: Static, parts: Parts, highest) -> tuple[Array, Array]:
    """Return total and weighted sum with weights relative to a higher logit."""
    shift = (parts.highest - highest) * (1.0 / static.temperature)
    shift = jnp.maximum(shift, _FAR_BELOW)
    scale = jnp.exp(shift)
    return scale * parts.total, scale * (parts.weighted + shift * parts.total)


def merge(static: Static, a: Parts, b: Parts) -> Parts:
    """Return the sums over both."""
    highest = jnp.maximum(a.highest, b.highest)
    (total_a, weighted_a), (total_b, weighted_b) = (
        _raise_to(static, parts, highest) for parts in (a, b)
    )
    return Parts(
        highest, total_a + total_b, weighted_a + weighted_b, a.target + b.target
    )


def kernel_parts_of(
    static: Static, block: Block, hidden, columns, targets, kept
) -> Parts:
    """Return the sums over a block without its logits in memory."""
    assert static.kernel_blocks is not None
    found = mosaic_sm90.sums(
        hidden,
        _compute_columns(hidden, columns),
        _kernel_places(static, block, targets),
        _counted(static, block, kept),
        temperature=static.temperature,
        soft_cap=static.soft_cap,
        blocks=static.kernel_blocks,
    )
    parts = Parts(*(found[:, i] for i in range(len(Parts._fields))))
    highest = jnp.max(parts.highest, axis=0)
    total, weighted = _raise_to(static, parts, highest[None])
    return Parts(highest, total.sum(0), weighted.sum(0), parts.target.sum(0))


def combine(static: Static, parts: Parts) -> Scores:
    """Return the scores from the sums over all columns, of all devices."""
    highest, total, weighted, target = parts
    if static.vocab_axes:
        highest = jax.lax.pmax(highest, static.vocab_axes)
        total, weighted = _raise_to(static, parts, highest)
        total, weighted, target = jax.lax.psum(
            (total, weighted, target), static.vocab_axes
        )
    log_total = jnp.log(total)
    of_targets = lambda x: x if target.ndim == 1 else x[:, None]
    below = (target - of_targets(highest)) * (1.0 / static.temperature)
    is_possible = target > 0.5 * NOT_KEPT
    return Scores(
        logprobs=jnp.where(is_possible, below - of_targets(log_total), -jnp.inf),
        entropy=log_total - weighted / total,
        log_normalizer=highest + static.temperature * log_total,
    )


# -- gradients -----------------------------------------------------------------------


def block_gradient(
    static: Static, block: Block, columns, rows: Rows, logits=None, dtype=None
):
    """Return the gradients of some rows, to hidden states and to some columns."""
    hidden = rows.hidden
    if static.kernel_blocks is not None:
        grad = _kernel_logit_gradient(static, block, columns, rows)
    else:
        grad = _logit_gradient(static, block, columns, rows, logits)
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


class _Weights(NamedTuple):
    """Of each row, what the gradient to its logits is made of.

        gradient_v = ([v = target] at_target - p_v (constant + slope log p_v))

    With several targets, the first term is a sum over them.

    Attributes:
        at_target: None where it is zero.
        constant: likewise.
        slope: likewise.
    """

    at_target: Float[Array, " T"] | Float[Array, "T K"] | None
    constant: Float[Array, " T"] | None
    slope: Float[Array, " T"] | None


def _weights(static: Static, rows: Rows) -> _Weights:
    """Return the derivatives of what was scored.

    d logprob / d logit_v = [v = target] - p_v
    d entropy / d logit_v = -p_v (log p_v + entropy)
    d log_normalizer / d logit_v = p_v, the one of divided logits
    """
    scale = 1.0 / static.temperature
    by_logprob, by_entropy, by_normalizer = (
        c if c is None else c * scale for c in rows.cotangents
    )
    terms = []
    if by_logprob is not None:
        terms.append(by_logprob if by_logprob.ndim == 1 else by_logprob.sum(axis=1))
    if by_entropy is not None:
        terms.append(by_entropy * rows.scores.entropy)
    if by_normalizer is not None:
        terms.append(-by_normalizer)
    at_target = by_logprob
    if at_target is not None:
        # The logit of an impossible target is not its own: it is that of no token.
        at_target = jnp.where(rows.scores.logprobs == -jnp.inf, 0.0, at_target)
    return _Weights(at_target, sum(terms[1:], terms[0]) if terms else None, by_entropy)


def _kernel_logit_gradient(static: Static, block: Block, columns, rows: Rows):
    """Return the gradient to the products, from logits that are in no array."""
    assert static.kernel_blocks is not None
    weights, none = _weights(static, rows), jnp.zeros_like(rows.scores.log_normalizer)
    of_rows = [none if x is None else x for x in weights[:2]]
    if weights.slope is not None:
        of_rows.append(weights.slope)
    grad = mosaic_sm90.logit_gradient(
        rows.hidden,
        _compute_columns(rows.hidden, columns),
        _kernel_places(static, block, rows.targets),
        _counted(static, block, rows.kept),
        [rows.scores.log_normalizer, *of_rows],
        temperature=static.temperature,
        soft_cap=static.soft_cap,
        blocks=static.kernel_blocks,
    )
    return grad[:, : block.width]


def _logit_gradient(static: Static, block: Block, columns, rows: Rows, logits):
    """Return the gradient to the products, in the type of the hidden states.

    d logit / d product = 1 - (logit / cap)², where logit = cap tanh(product / cap)
    """
    if logits is None:
        logits = logits_of(static, block, rows.hidden, columns, rows.kept)
    at_target, constant, slope = _weights(static, rows)
    scale = 1.0 / static.temperature
    logprobs = (logits - rows.scores.log_normalizer[:, None]) * scale
    factor = jnp.zeros_like(logprobs[:, :1])
    if constant is not None:
        factor = factor + constant[:, None]
    if slope is not None:
        factor = factor + slope[:, None] * logprobs
    grad = -jnp.exp(logprobs) * factor
    if at_target is not None:
        place, is_here = _place(static, block, rows.targets)
        place = jnp.where(is_here, place, block.width)  # Out of range, and dropped.
        grad = jax.vmap(lambda row, at, x: row.at[at].add(x, mode="drop"))(
            grad, place, at_target
        )
    if static.soft_cap is not None:
        # Of a logit that does not count, -1e30, the square would be infinite.
        ratio = jnp.clip(logits * (1.0 / static.soft_cap), -1.0, 1.0)
        grad = grad * (1.0 - ratio * ratio)
    return grad.astype(rows.hidden.dtype)
