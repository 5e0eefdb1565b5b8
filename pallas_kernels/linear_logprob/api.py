"""Log-probabilities of a linear layer without its logits in memory.

    logprob_t = log softmax_kept(capped(hidden_t · kernel) / temperature)[target_t]

The tokens are cut in chunks, and for a large vocabulary the kernel's columns in blocks;
loops make the logits of one chunk and block, keep four numbers per token, and drop
them. The gradient makes them again. So the largest float32 array is [chunk, block]
forward and backward, next to the kernel's gradient [D, V].
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import device
from pallas_kernels.linear_logprob import chunked
from pallas_kernels.linear_logprob.chunked import Static
from pallas_kernels.linear_logprob.reference import Kept

Implementation = Literal["dense", "chunked"]

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


def linear_logprob(
    hidden: Float[Array, "T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, " T"],
    *,
    temperature: float = 1.0,
    kept: Kept | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    block_size: int | None = None,
    constrain_kernel: Callable[[Array], Array] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Score one target per row, and measure the entropy of its distribution.

    The products take the type of `hidden` and accumulate in float32; everything after
    them is float32, the gradient of the kernel included. What is not used costs
    nothing: neither the entropy nor its gradient. For arrays on several devices there
    is `sharded_linear_logprob`; this one works on them under `jax.jit` if
    `constrain_kernel` is given, and leaves the collectives to the compiler.

    Args:
        hidden: one vector per token.
        kernel: of the linear layer.
        targets: token ids to score.
        temperature: the logits are divided by it.
        kept: ids (int32, padded with -1) or bits (uint32) of the tokens each
            distribution is restricted to; an empty set is the whole vocabulary.
        soft_cap: logits become cap · tanh(logits / cap), before the division.
        vocab_size: columns of the kernel past it are padding and never count, nor get
            a gradient; None has no padding.
        chunk_size: most tokens of one chunk, over all devices; None takes
            `default_chunk_size`.
        block_size: most columns that are looked at together; None chooses.
        constrain_kernel: applied to the kernel in the type of `hidden` before the loop,
            and to its gradient: a sharding constraint that gathers it once.
        implementation: "dense" makes all logits at once and keeps them for the
            gradient, "chunked" holds those of a chunk; None is "dense" where one chunk
            and block hold all.

    Returns:
        Log-probabilities and entropies, float32, in nats. The log-probability of a
        target outside its set is -inf, and its gradient finite.
    """
    num_tokens, num_columns = hidden.shape[0], kernel.shape[1]
    chunk_size = chunk_size or default_chunk_size(num_tokens, num_columns)
    if block_size is None and constrain_kernel is None and device().platform != "cpu":
        # Blocks of a kernel that the compiler has cut would have to be gathered.
        block_size = BLOCK_SIZE
    if block_size is not None and block_size >= num_columns:
        block_size = None
    if implementation is None:
        is_dense = num_tokens <= chunk_size and block_size is None
        implementation = "dense" if is_dense else "chunked"
    is_chunked = implementation == "chunked"
    static = make_static(
        num_columns,
        temperature=temperature,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
        implementation=implementation,
    )._replace(
        num_chunks=chunked.num_chunks(num_tokens, chunk_size) if is_chunked else None,
        block_size=block_size if is_chunked else None,
        constrain_kernel=constrain_kernel,
    )
    return _linear_logprob(static, hidden, kernel, targets, kept)


def make_static(
    num_columns: int,
    *,
    temperature: float,
    soft_cap: float | None,
    vocab_size: int | None,
    implementation: str = "chunked",
) -> Static:
    """Check what every form takes.

    Raises:
        ValueError: a number that means nothing.
    """
    if implementation not in ("dense", "chunked"):
        raise ValueError(
            f"linear_logprob has no implementation {implementation!r}; known are"
            " 'dense' and 'chunked', and None chooses by the number of tokens."
        )
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


def default_chunk_size(num_tokens: int, vocab_size: int) -> int:
    """Return how many tokens to score at a time: all of them, if they are few."""
    if device().platform != "cpu":
        return CHUNK_TOKENS
    if num_tokens * vocab_size <= DENSE_LOGITS_CPU:
        return num_tokens
    return max(1, CHUNK_LOGITS_CPU // vocab_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_logprob(static: Static, hidden, kernel, targets, kept):
    scores, _ = chunked.score(
        static, hidden, _compute_kernel(static, hidden, kernel), targets, kept
    )
    return scores.logprobs, scores.entropy


def _forward(static: Static, hidden, kernel, targets, kept):
    hidden, targets, kept = jax.tree.map(lambda x: x.value, (hidden, targets, kept))
    master, kernel = kernel.value, _compute_kernel(static, hidden, kernel.value)
    scores, logits = chunked.score(static, hidden, kernel, targets, kept)
    # The gradient has the type of the kernel it is for; only its type is kept.
    like = jnp.zeros((0,), master.dtype)
    residuals = (hidden, kernel, targets, kept, scores, logits, like)
    return (scores.logprobs, scores.entropy), residuals


def _backward(static: Static, residuals, cotangents):
    hidden, kernel, targets, kept, scores, logits, like = residuals
    rows = chunked.Rows(hidden, targets, kept, scores, used(cotangents))
    hidden_grad, kernel_grad = chunked.gradients(static, kernel, rows, logits)
    kernel_grad = chunked.constrained(static, kernel_grad).astype(like.dtype)
    return hidden_grad, kernel_grad, None, None


_linear_logprob.defvjp(_forward, _backward, symbolic_zeros=True)


def used(cotangents) -> list[Array | None]:
    """Return None for the entropy, or the log-probability, if it is not used."""
    is_zero = [isinstance(c, jax.custom_derivatives.SymbolicZero) for c in cotangents]
    return [None if z else c for z, c in zip(is_zero, cotangents, strict=True)]


def _compute_kernel(static: Static, hidden, kernel):
    """Cast the kernel to the type of the products: whole, or later block by block."""
    if static.block_size is not None:
        return kernel
    return chunked.constrained(static, kernel.astype(hidden.dtype))
