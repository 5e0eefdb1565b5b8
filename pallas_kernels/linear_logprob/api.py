"""Log-probabilities of a linear layer without its logits in memory.

    logprob_t = log softmax_kept(capped(hidden_t · kernel) / temperature)[target_t]

Of each token one target is scored, or several, as a teacher's most likely ones.

mosaic     on Hopper: logits stay in registers; blocks are cast one at a time
dense      all logits at once, kept for the gradient: few tokens, on a CPU
chunked    the logits of some tokens and some columns at a time: everything else

The tokens are cut in chunks, and for a large vocabulary the kernel's columns in blocks;
loops make the logits of one chunk and block, keep four numbers per token, and drop
them. The gradient makes them again. So the largest array is [chunk, block] forward and
backward, next to the kernel's gradient [D, V].
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import _dispatch, _tuning
from pallas_kernels._dispatch import Device
from pallas_kernels.linear_logprob import chunked, mosaic_sm90
from pallas_kernels.linear_logprob.blocks import Rows, Scores, Static, constrained
from pallas_kernels.linear_logprob.reference import Kept
from pallas_kernels.linear_logprob.request import Request

# Logits of one chunk. On a CPU (8 MiB) they stay in its cache.
CHUNK_LOGITS_CPU = 2**21
# A CPU cuts problems larger than this: making the logits again costs a third more.
DENSE_LOGITS_CPU = 2**22
# Elsewhere, tokens of a chunk. The float32 kernel is read, and its gradient read and
# written, once a chunk: with 8192 tokens that is a few hundredths of the products' time
# on an H200 by its data sheet (4.8 TB/s, 990 TFLOP/s).
CHUNK_TOKENS = 2**13
# Columns of a block: float32 logits of 128 MiB.
BLOCK_SIZE = 2**12
# Of the Mosaic kernel: at most 128 MiB for a copy of some columns in the type of the
# products, and 64 MiB for the bits of sets, one per token and column, which are made
# from ids by way of another array of that size.
COPY_BYTES = 2**27
SET_BYTES = 2**26
# Gradients to the logits of one chunk and block, in 16 bits: 64 MiB with the above.
GRADIENT_BLOCK_SIZE = 2**12


class Cut(NamedTuple):
    """How much is looked at together.

    Attributes:
        chunk_size: most tokens; None is all of them, with the logits kept.
        block_size: most columns; None is all of them.
        kernel_blocks: of the Mosaic kernel, if it does the work.
    """

    chunk_size: int | None
    block_size: int | None
    kernel_blocks: mosaic_sm90.Blocks | None = None


class Plan(NamedTuple):
    """How scores are made, and how their gradients."""

    forward: Static
    backward: Static


def linear_logprob(
    hidden: Float[Array, "T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, " T"] | Int[Array, "T K"],
    *,
    temperature: float = 1.0,
    kept: Kept | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    block_size: int | None = None,
    constrain_kernel: Callable[[Array], Array] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, " T"] | Float[Array, "T K"], Float[Array, " T"]]:
    """Score the targets of each row, and measure the entropy of its distribution.

    The products take the type of `hidden` and accumulate in float32; everything after
    them is float32, the gradient of the kernel included, but for the gradients to the
    logits, which its products take in the type of `hidden`. What is not used costs
    nothing: neither the entropy nor its gradient. For arrays on several devices there
    is `sharded_linear_logprob`; this one works on them under `jax.jit` if
    `constrain_kernel` is given, and leaves the collectives to the compiler.

    Args:
        hidden: one vector per token.
        kernel: of the linear layer.
        targets: token ids to score, one of each token or several.
        temperature: the logits are divided by it.
        kept: ids (int32, padded with -1) or bits (uint32) of the tokens each
            distribution is restricted to; an empty set is the whole vocabulary.
        soft_cap: logits become cap · tanh(logits / cap), before the division.
        vocab_size: columns of the kernel past it are padding and never count, nor get
            a gradient; None has no padding.
        chunk_size: most tokens whose logits, their gradients or their sets' bits are in
            memory together, over all devices; None takes `default_chunk_size`.
        block_size: most columns that are looked at together; None chooses.
        constrain_kernel: applied to the kernel in the type of `hidden` before the loop,
            and to its gradient: a sharding constraint that gathers it once.
        implementation: "mosaic" is the kernel for Hopper, "dense" makes all logits at
            once and keeps them for the gradient, "chunked" holds those of a chunk; None
            chooses, see `explain`.

    Returns:
        Log-probabilities and entropies, float32, in nats. The log-probability of a
        target outside its set is -inf, and its gradient finite.

    Raises:
        ValueError: a number that means nothing, or no implementation has that name, or
            the one asked for cannot do this.
    """
    scores = linear_scores(
        hidden,
        kernel,
        targets,
        temperature=temperature,
        kept=kept,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        block_size=block_size,
        constrain_kernel=constrain_kernel,
        implementation=implementation,
    )
    return scores.logprobs, scores.entropy


def linear_scores(
    hidden: Float[Array, "T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, " T"] | Int[Array, "T K"],
    *,
    temperature: float = 1.0,
    kept: Kept | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    block_size: int | None = None,
    constrain_kernel: Callable[[Array], Array] | None = None,
    implementation: str | None = None,
) -> Scores:
    """Score as `linear_logprob` does, and return the log-normalizers too.

    Args:
        hidden: as for `linear_logprob`, like all others.
        kernel: likewise.
        targets: likewise.
        temperature: likewise.
        kept: likewise.
        soft_cap: likewise.
        vocab_size: likewise.
        chunk_size: likewise.
        block_size: likewise.
        constrain_kernel: likewise.
        implementation: likewise.

    Returns:
        Log-probabilities, entropies and log-normalizers log Σ exp(logit / temperature)
        over the kept tokens, each with its gradients.
    """
    request = Request(
        num_tokens=hidden.shape[0],
        width=hidden.shape[1],
        num_columns=kernel.shape[1],
        dtype=hidden.dtype,
        kernel_dtype=kernel.dtype,
        device=_dispatch.device(),
        has_sets=kept is not None,
        has_several=targets.ndim > 1,
        is_cut=constrain_kernel is not None,
        chunk_size=chunk_size,
        block_size=block_size,
    )
    cuts = _choose(request, implementation).function(request)
    static = make_static(
        kernel.shape[1],
        temperature=temperature,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
    )._replace(constrain_kernel=constrain_kernel)
    return scores_of(static, cuts, hidden, kernel, targets, kept)


def explain(
    hidden_shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    device: Device | None = None,
    implementation: str | None = None,
    kernel_dtype: DTypeLike = jnp.float32,
    **options: bool | int | None,
) -> str:
    """Say which implementation scores so, and why none of those before it.

    Args:
        hidden_shape: [T, D].
        kernel_shape: [D, V].
        dtype: of the hidden states.
        device: the one to score on; None is the one of this process.
        implementation: as in `linear_logprob`.
        kernel_dtype: of the kernel.
        **options: `has_sets`, `is_cut`, `chunk_size` and `block_size` of `Request`.
    """
    request = Request(
        num_tokens=hidden_shape[0],
        width=hidden_shape[1],
        num_columns=kernel_shape[1],
        dtype=dtype,
        kernel_dtype=kernel_dtype,
        device=device or _dispatch.device(),
        **options,  # pyright: ignore[reportArgumentType]  # The class checks names.
    )
    return _choose(request, implementation).explanation


def _choose(request: Request, implementation: str | None) -> _dispatch.Choice:
    return _dispatch.choose(
        "linear_logprob", _IMPLEMENTATIONS, request, name=implementation
    )


def make_static(
    num_columns: int,
    *,
    temperature: float,
    soft_cap: float | None,
    vocab_size: int | None,
) -> Static:
    """Check what every form takes.

    Raises:
        ValueError: a number that means nothing.
    """
    if not temperature > 0:
        raise ValueError(
            f"The temperature is {temperature}; it must be positive. Greedy tokens are"
            " scored at temperature 1."
        )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(
            f"The soft cap of the logits is {soft_cap}; it must be positive, or None"
            " for no cap."
        )
    vocab_size = num_columns if vocab_size is None else vocab_size
    if not 0 < vocab_size <= num_columns:
        raise ValueError(
            f"The vocabulary has {vocab_size} tokens and the kernel {num_columns}"
            " columns. Give a kernel with a column for each token."
        )
    return Static(
        temperature=float(temperature),
        soft_cap=None if soft_cap is None else float(soft_cap),
        vocab_size=vocab_size,
        num_chunks=1,
    )


def default_chunk_size(
    num_tokens: int, vocab_size: int, *, device: Device | None = None
) -> int:
    """Return how many tokens to score at a time: all of them, if they are few."""
    device = device or _dispatch.device()
    if device.platform != "cpu":
        return CHUNK_TOKENS
    if num_tokens * vocab_size <= DENSE_LOGITS_CPU:
        return num_tokens
    return max(1, CHUNK_LOGITS_CPU // vocab_size)


def apply_cut(static: Static, cut: Cut, num_tokens: int, num_columns: int) -> Static:
    """Return what is known before tracing, with the numbers of one pass."""
    block_size, is_chunked = cut.block_size, cut.chunk_size is not None
    if block_size is not None and block_size >= num_columns:
        block_size = None
    return static._replace(
        num_chunks=chunked.num_chunks(num_tokens, cut.chunk_size or 1)
        if is_chunked
        else None,
        block_size=block_size if is_chunked else None,
        kernel_blocks=cut.kernel_blocks,
    )


def kernel_blocks(request: Request) -> mosaic_sm90.Blocks:
    """Return the block sizes of the Mosaic kernel."""
    dtypes, shape = tuning_of(request)
    return _tuning.tuned(
        "linear_logprob",
        mosaic_sm90.default_blocks(request),
        device=request.device,
        dtypes=dtypes,
        shape=shape,
    )


def tuning_of(request: Request) -> tuple[tuple[DTypeLike, ...], tuple[int, ...]]:
    """Return what block sizes depend on: types and a shape."""
    return (request.dtype,), (request.num_tokens, request.width, request.num_columns)


def is_ready(request: Request) -> bool:
    """Return whether the Mosaic kernel can read the columns where they are."""
    is_aligned = mosaic_sm90.padded_columns(request.num_columns) == request.num_columns
    return is_aligned and request.kernel_dtype == request.dtype


def even_block_size(num_columns: int, most: int) -> int:
    """Return a width of blocks that the Mosaic kernel can read, all about as wide.

    Args:
        num_columns: of the kernel.
        most: columns of a block, at least 64.
    """
    num_blocks = max(1, -(-num_columns // most))
    block_size = mosaic_sm90.padded_columns(-(-num_columns // num_blocks))
    if block_size > num_columns:  # One more block, and no copy of all to pad it.
        num_blocks += 1
        block_size = mosaic_sm90.padded_columns(-(-num_columns // num_blocks))
    return block_size


def set_chunk_size(num_columns: int) -> int:
    """Return of how many tokens the bits of their sets may be in memory."""
    return max(1, SET_BYTES // (4 * -(-num_columns // 32)))


# -- the implementations: each says how much it looks at together, forward and backward


def mosaic_cuts(
    request: Request, blocks: mosaic_sm90.Blocks | None = None
) -> tuple[Cut, Cut]:
    """Return how the Mosaic kernel is run, by default with `kernel_blocks`."""
    blocks = blocks or kernel_blocks(request)
    itemsize = jnp.dtype(request.dtype).itemsize
    block_size = request.block_size
    if block_size is None and not is_ready(request):
        # The narrower a block, the fewer bits of its sets there are with the copy.
        copy_bytes = COPY_BYTES // 2 if request.has_sets else COPY_BYTES
        most = max(mosaic_sm90.ALIGNMENT, copy_bytes // (itemsize * request.width))
        block_size = even_block_size(request.num_columns, most)
    chunk_size = max(1, request.num_tokens)
    if request.has_sets:
        num_columns = min(request.num_columns, block_size or request.num_columns)
        most = min(chunk_size, set_chunk_size(num_columns))
        chunk_size = min(most, request.chunk_size or most)
    forward = Cut(chunk_size, block_size, blocks)
    backward = Cut(
        request.chunk_size or CHUNK_TOKENS,
        request.block_size or even_block_size(request.num_columns, GRADIENT_BLOCK_SIZE),
        blocks,
    )
    return forward, backward


def _mosaic_unsupported(request: Request) -> str | None:
    if request.is_cut:
        return (
            "it works on the arrays of one device, and constrain_kernel leaves cutting"
            " them to the compiler; sharded_linear_logprob runs it on each"
        )
    return mosaic_sm90.unsupported(request)


def _dense(request: Request) -> tuple[Cut, Cut]:
    return Cut(None, None), Cut(None, None)


def chunked_cut(request: Request) -> Cut:
    """Return how much the loops look at together."""
    chunk_size = request.chunk_size or default_chunk_size(
        request.num_tokens, request.num_columns, device=request.device
    )
    block_size = request.block_size
    if block_size is None and not request.is_cut and request.device.platform != "cpu":
        # Blocks of a kernel that the compiler has cut would have to be gathered.
        block_size = BLOCK_SIZE
    return Cut(chunk_size, block_size)


def _chunked(request: Request) -> tuple[Cut, Cut]:
    return chunked_cut(request), chunked_cut(request)


def _dense_unwise(request: Request) -> str | None:
    chunk_size, block_size, _ = chunked_cut(request)
    assert chunk_size is not None
    if request.num_tokens > chunk_size:
        return f"{request.num_tokens} tokens are more than a chunk of {chunk_size}"
    if block_size is not None and block_size < request.num_columns:
        return f"{request.num_columns} columns are more than a block of {block_size}"
    return None


_IMPLEMENTATIONS = (
    _dispatch.Implementation(
        name="mosaic", function=mosaic_cuts, unsupported=_mosaic_unsupported
    ),
    _dispatch.Implementation(name="dense", function=_dense, unwise=_dense_unwise),
    _dispatch.Implementation(name="chunked", function=_chunked),
)


def scores_of(
    static: Static, cuts: tuple[Cut, Cut], hidden, kernel, targets, kept
) -> Scores:
    """Score with given numbers of what is looked at together, forward and backward."""
    sizes = hidden.shape[0], kernel.shape[1]
    plan = Plan(*(apply_cut(static, cut, *sizes) for cut in cuts))
    return _linear_scores(plan, hidden, kernel, targets, kept)


# -- the function with gradients -----------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_scores(plan: Plan, hidden, kernel, targets, kept):
    compute_kernel = _compute_kernel(plan, hidden, kernel)
    scores, _ = chunked.score(plan.forward, hidden, compute_kernel, targets, kept)
    return public(plan.forward, scores)


def _forward(plan: Plan, hidden, kernel, targets, kept):
    hidden, targets, kept = jax.tree.map(lambda x: x.value, (hidden, targets, kept))
    master, kernel = kernel.value, _compute_kernel(plan, hidden, kernel.value)
    scores, logits = chunked.score(plan.forward, hidden, kernel, targets, kept)
    # The gradient has the type of the kernel it is for; only its type is kept.
    like = jnp.zeros((0,), master.dtype)
    residuals = (hidden, kernel, targets, kept, scores, logits, like)
    return public(plan.forward, scores), residuals


def _backward(plan: Plan, residuals, cotangents):
    hidden, kernel, targets, kept, scores, logits, like = residuals
    rows = Rows(hidden, targets, kept, scores, used(cotangents))
    hidden_grad, kernel_grad = chunked.gradients(plan.backward, kernel, rows, logits)
    kernel_grad = constrained(plan.backward, kernel_grad).astype(like.dtype)
    return hidden_grad, kernel_grad, None, None


_linear_scores.defvjp(_forward, _backward, symbolic_zeros=True)


def public(static: Static, scores: Scores) -> Scores:
    """Return scores with the normalizer of divided logits."""
    scale = 1.0 / static.temperature
    return scores._replace(log_normalizer=scores.log_normalizer * scale)


def used(cotangents) -> list[Array | None]:
    """Return None for what of the scores is not used."""
    is_zero = [isinstance(c, jax.custom_derivatives.SymbolicZero) for c in cotangents]
    return [None if z else c for z, c in zip(is_zero, cotangents, strict=True)]


def _compute_kernel(plan: Plan, hidden, kernel):
    """Cast the kernel to the type of the products: whole, or later block by block."""
    if plan.forward.block_size is not None:
        return kernel
    return constrained(plan.forward, kernel.astype(hidden.dtype))
