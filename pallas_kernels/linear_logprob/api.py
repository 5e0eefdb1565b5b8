"""Log-probabilities of a linear layer without its logits in memory.

    logprob_t = log softmax_kept(hidden_t · kernel / temperature)[target_t]

The tokens are cut in chunks; a loop makes the logits of one chunk, keeps three numbers
per token, and drops them. The gradient makes them again. So the largest float32 array
is [chunk, V] forward and backward, next to the kernel's gradient [D, V].

Chunk i of n has the tokens i, n + i, 2n + i, …: where the tokens are sharded in
contiguous blocks, every chunk has some of every block and no token moves.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_logprob import reference
from pallas_kernels.linear_logprob.reference import Kept

Implementation = Literal["dense", "chunked"]

# Logits of one chunk. On a CPU (8 MiB) they stay in its cache; elsewhere (256 MiB) the
# matrix product keeps the device busy.
CHUNK_LOGITS_CPU = 2**21
CHUNK_LOGITS = 2**26
# A CPU cuts problems larger than this: making the logits again costs a third more.
DENSE_LOGITS_CPU = 2**22

# Finite, so that 0 · it is 0 and not NaN; the softmax of it is exactly 0.
_NOT_KEPT = -1e30


class _Static(NamedTuple):
    """What is known before tracing."""

    temperature: float
    num_chunks: int | None  # None: dense.
    constrain_kernel: Callable[[Array], Array]


class _Scores(NamedTuple):
    logprobs: Float[Array, " T"]
    entropy: Float[Array, " T"]
    log_normalizer: Float[Array, " T"]


def linear_logprob(
    hidden: Float[Array, "T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, " T"],
    *,
    temperature: float = 1.0,
    kept: Kept | None = None,
    chunk_size: int | None = None,
    constrain_kernel: Callable[[Array], Array] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Score one target per row, and measure the entropy of its distribution.

    The products take the type of `hidden` and accumulate in float32; everything after
    them is float32, the gradient of the kernel included. Works on sharded arrays under
    `jax.jit`: rows over any axes, the vocabulary over others. What is not used costs
    nothing: neither the entropy nor its gradient.

    Args:
        hidden: one vector per token.
        kernel: of the linear layer.
        targets: token ids to score.
        temperature: the logits are divided by it.
        kept: ids (int32, padded with -1) or bits (uint32) of the tokens each
            distribution is restricted to; an empty set is the whole vocabulary.
        chunk_size: most tokens of one chunk, over all devices; None takes
            `default_chunk_size`.
        constrain_kernel: applied to the kernel in the type of `hidden` before the loop,
            and to its gradient: a sharding constraint that gathers it once.
        implementation: "dense" makes all logits at once and keeps them for the
            gradient, "chunked" holds those of a chunk; None is "dense" where one chunk
            holds all tokens.

    Returns:
        Log-probabilities and entropies, float32, in nats. The log-probability of a
        target outside its set is -inf, and its gradient finite.
    """
    num_tokens, vocab_size = hidden.shape[0], kernel.shape[1]
    chunk_size = chunk_size or default_chunk_size(num_tokens, vocab_size)
    if implementation is None:
        implementation = "dense" if num_tokens <= chunk_size else "chunked"
    if implementation not in ("dense", "chunked"):
        raise ValueError(
            f"linear_logprob has no implementation {implementation!r}; known are"
            " 'dense' and 'chunked', and None chooses by the number of tokens."
        )
    is_chunked = implementation == "chunked"
    if not temperature > 0:
        raise ValueError(
            f"The temperature is {temperature}; it must be positive. Greedy tokens are"
            " scored at temperature 1."
        )
    static = _Static(
        temperature=float(temperature),
        num_chunks=_num_chunks(num_tokens, chunk_size) if is_chunked else None,
        constrain_kernel=constrain_kernel or _identity,
    )
    return _linear_logprob(static, hidden, kernel, targets, kept)


def default_chunk_size(num_tokens: int, vocab_size: int) -> int:
    """Return how many tokens to score at a time: all of them, if they are few."""
    if jax.default_backend() != "cpu":
        return max(1, CHUNK_LOGITS // vocab_size)
    if num_tokens * vocab_size <= DENSE_LOGITS_CPU:
        return num_tokens
    return max(1, CHUNK_LOGITS_CPU // vocab_size)


def _identity(kernel: Array) -> Array:
    return kernel


def _num_chunks(num_tokens: int, chunk_size: int) -> int:
    """Return the fewest chunks small enough; a few more if those are equal."""
    fewest = max(1, -(-num_tokens // chunk_size))
    equal = (n for n in range(fewest, 2 * fewest + 1) if num_tokens % n == 0)
    return next(equal, fewest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_logprob(static: _Static, hidden, kernel, targets, kept):
    kernel = static.constrain_kernel(kernel.astype(hidden.dtype))
    scores, _ = _score(static, hidden, kernel, targets, kept)
    return scores.logprobs, scores.entropy


def _forward(static: _Static, hidden, kernel, targets, kept):
    hidden, targets, kept = jax.tree.map(lambda x: x.value, (hidden, targets, kept))
    master, kernel = kernel.value, kernel.value.astype(hidden.dtype)
    kernel = static.constrain_kernel(kernel)
    scores, logits = _score(static, hidden, kernel, targets, kept)
    # The gradient has the type of the kernel it is for; only its type is kept.
    like = jnp.zeros((0,), master.dtype)
    residuals = (hidden, kernel, targets, kept, scores, logits, like)
    return (scores.logprobs, scores.entropy), residuals


def _backward(static: _Static, residuals, cotangents):
    hidden, kernel, targets, kept, scores, logits, like = residuals
    # A symbolic zero tells that the entropy, or the log-probability, is not used.
    is_zero = [isinstance(c, jax.custom_derivatives.SymbolicZero) for c in cotangents]
    cotangents = [None if z else c for z, c in zip(is_zero, cotangents, strict=True)]
    rows = (hidden, targets, kept, scores, cotangents)
    if static.num_chunks is None:
        hidden_grad, kernel_grad = _chunk_gradient(static, kernel, rows, logits)
    else:

        def step(kernel_grad, rows):
            hidden_grad, more = _chunk_gradient(static, kernel, rows)
            return kernel_grad + more, hidden_grad

        zero = static.constrain_kernel(jnp.zeros(kernel.shape, jnp.float32))
        chunks = _split(rows, static.num_chunks)
        kernel_grad, hidden_grad = jax.lax.scan(step, zero, chunks)
        hidden_grad = _join(hidden_grad, hidden.shape[0])
    kernel_grad = static.constrain_kernel(kernel_grad).astype(like.dtype)
    return hidden_grad, kernel_grad, None, None


_linear_logprob.defvjp(_forward, _backward, symbolic_zeros=True)


def _score(static: _Static, hidden, kernel, targets, kept):
    """Return the scores of every row, and the logits if they are to be kept."""
    if static.num_chunks is None:
        logits = _logits(static, hidden, kernel, kept)
        return _statistics(static, logits, targets), logits

    def score(rows):
        hidden, targets, kept = rows
        return _statistics(static, _logits(static, hidden, kernel, kept), targets)

    chunks = _split((hidden, targets, kept), static.num_chunks)
    return _join(jax.lax.map(score, chunks), hidden.shape[0]), None


def _logits(static: _Static, hidden, kernel, kept):
    """Return logits before the division by the temperature, those not kept at -1e30."""
    logits = reference.project(hidden, kernel)
    if kept is None:
        return logits
    # The barrier keeps shifts and masks of integers out of the loops over exponentials,
    # which a CPU would then not vectorise.
    mask = jax.lax.optimization_barrier(reference.is_kept(kept, kernel.shape[1]))
    return jnp.where(mask, logits, _NOT_KEPT)


def _statistics(static: _Static, logits, targets) -> _Scores:
    highest = jnp.max(logits, axis=-1, keepdims=True)
    below = (logits - highest) * (1.0 / static.temperature)
    weights = jnp.exp(below)
    total = jnp.sum(weights, axis=-1)
    log_total = jnp.log(total)
    target = jnp.take_along_axis(below, targets[:, None], axis=-1)[:, 0]
    return _Scores(
        logprobs=jnp.where(target < 0.5 * _NOT_KEPT, -jnp.inf, target - log_total),
        entropy=log_total - jnp.sum(weights * below, axis=-1) / total,
        log_normalizer=highest[:, 0] + static.temperature * log_total,
    )


def _chunk_gradient(static: _Static, kernel, rows, logits=None):
    """Return the gradients of some rows: to their hidden states, and to the kernel.

    d logprob / d logit_v = [v = target] - p_v
    d entropy / d logit_v = -p_v (log p_v + entropy)
    """
    hidden, targets, kept, scores, cotangents = rows
    if logits is None:
        logits = _logits(static, hidden, kernel, kept)
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
        grad = jax.vmap(lambda row, at, x: row.at[at].add(x))(grad, targets, by_logprob)
    grad = grad.astype(hidden.dtype)
    by_hidden = jnp.einsum(
        "tv,dv->td", grad, kernel, preferred_element_type=jnp.float32
    )
    by_kernel = jnp.einsum(
        "td,tv->dv", hidden, grad, preferred_element_type=jnp.float32
    )
    return by_hidden.astype(hidden.dtype), by_kernel


def _split(rows, num_chunks: int):
    """[T, …] -> [num_chunks, T / num_chunks, …]; short by some: padded with zeros."""

    def split(x):
        missing = -len(x) % num_chunks
        if missing:
            x = jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:])))
        return jnp.swapaxes(x.reshape(-1, num_chunks, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, rows)


def _join(chunks, num_tokens: int):
    """Undo `_split`."""

    def join(x):
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:num_tokens]

    return jax.tree.map(join, chunks)
