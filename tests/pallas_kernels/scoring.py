"""What the tests of `linear_logprob` share."""

import functools

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
