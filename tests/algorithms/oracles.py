"""Ragged batches, and gradients by differences in float64, for tests of losses."""

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 8


def ragged(num_rows, *, seed=0, num_padding=0):
    """Masks of completions of unlike lengths, then rows of padding."""
    generator = np.random.default_rng(seed)
    mask = np.zeros((num_rows + num_padding, WIDTH), bool)
    for row in range(num_rows):
        start = generator.integers(1, 4)
        mask[row, start : start + generator.integers(1, WIDTH - 3)] = True
    return mask


def logprobs_like(mask, *, seed=0, scale=0.6):
    return -np.random.default_rng(seed).exponential(scale, mask.shape)


def as_arrays(batch):
    """In float32, as the trainer has them."""
    return {
        key: jnp.asarray(value, None if value.dtype == bool else jnp.float32)
        for key, value in batch.items()
    }


def check(loss, oracle, logprobs, batch):
    """Compare a loss and its gradient with an oracle in float64.

    Args:
        loss: `loss(logprobs, batch) -> (Mean, metrics)`.
        oracle: `oracle(logprobs, batch) -> float`, by NumPy.
        logprobs: [B, T].
        batch: of NumPy arrays.
    """
    arrays = as_arrays(batch)
    value = lambda x: loss(x, arrays)[0].value()
    found, gradient = jax.value_and_grad(value)(jnp.asarray(logprobs, jnp.float32))
    np.testing.assert_allclose(found, oracle(logprobs, batch), rtol=2e-4, atol=1e-6)
    expected = np.zeros_like(logprobs)
    for index in np.ndindex(*logprobs.shape):
        step = np.zeros_like(logprobs)
        step[index] = 1e-5
        up, down = oracle(logprobs + step, batch), oracle(logprobs - step, batch)
        expected[index] = (up - down) / 2e-5
    np.testing.assert_allclose(gradient, expected, rtol=2e-3, atol=2e-6)
    return found, gradient


def log_sigmoid(x):
    return -np.logaddexp(0, -x)
