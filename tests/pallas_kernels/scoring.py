"""What the tests of `linear_logprob` share."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def pack(mask: np.ndarray) -> np.ndarray:
    """Return bit v % 32 of word v // 32, one row of words per row of the mask."""
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % 32)))
    words = padded.reshape(len(mask), -1, 32) * 2 ** np.arange(32)
    return words.sum(-1).astype(np.uint32)


@functools.cache
def gradient(call, **options):
    """Return a function of (hidden, kernel, targets, kept, g, h) to both gradients."""

    def loss(hidden, kernel, targets, kept, by_logprob, by_entropy):
        found = call(hidden, kernel, targets, kept=kept, temperature=0.7, **options)
        return jnp.sum(found[0] * by_logprob) + jnp.sum(found[1] * by_entropy)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


class Exact(NamedTuple):
    """Scores in float64, and the gradients of their weighted sum."""

    logprobs: np.ndarray
    entropy: np.ndarray
    log_normalizer: np.ndarray
    hidden_grad: np.ndarray
    kernel_grad: np.ndarray


def exact(
    hidden, kernel, targets, weights, *, mask=None, temperature=1.0, soft_cap=None
) -> Exact:
    """Score and differentiate by hand.

    Args:
        hidden: [T, D].
        kernel: [D, V].
        targets: [T].
        weights: three rows [T], of log-probabilities, entropies and log-normalizers;
            the log-probability of a target outside its set does not count.
        mask: [T, V], true where a token is kept.
        temperature: divides the logits.
        soft_cap: bounds them before.
    """
    hidden, kernel = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    rows, products = np.arange(len(hidden)), hidden @ kernel
    capped = products if soft_cap is None else soft_cap * np.tanh(products / soft_cap)
    slope = 1.0 if soft_cap is None else 1 - (capped / soft_cap) ** 2
    kept = np.ones_like(products, bool) if mask is None else mask
    logits = np.where(kept, capped / temperature, -np.inf)
    highest = logits.max(-1, keepdims=True)
    normalizer = highest + np.log(np.exp(logits - highest).sum(-1, keepdims=True))
    log_p = logits - normalizer
    p, finite = np.exp(log_p), np.where(kept, log_p, 0.0)
    entropy = -(p * finite).sum(-1)
    is_possible = kept[rows, targets]
    of_logprob, of_entropy, of_normalizer = (np.float64(w)[:, None] for w in weights)
    of_logprob = np.where(is_possible[:, None], of_logprob, 0.0)
    by_logit = -p * of_logprob - p * (finite + entropy[:, None]) * of_entropy
    by_logit += p * of_normalizer
    by_logit[rows, targets] += of_logprob[:, 0]
    by_product = by_logit * slope / temperature
    return Exact(
        logprobs=log_p[rows, targets],
        entropy=entropy,
        log_normalizer=normalizer[:, 0],
        hidden_grad=by_product @ kernel.T,
        kernel_grad=hidden.T @ by_product,
    )


def relative_error(found, expected) -> float:
    """Return the L2 norm of the difference over that of what was expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.array_equal(np.isfinite(found), np.isfinite(expected))
    found, expected = (np.where(np.isfinite(x), x, 0.0) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
