"""Tests of `realjax/rl/masking.py`."""

import jax
import jax.numpy as jnp
import numpy as np

from realjax.rl import masking


def ragged(seed: int = 0):
    """Return a batch with garbage outside its mask, and the numbers that count."""
    rng = np.random.default_rng(seed)
    x = rng.normal(3.0, 2.0, (4, 9)).astype(np.float32)
    mask = np.arange(9)[None] < np.array([[9], [4], [0], [1]])
    x[~mask] = rng.choice([np.nan, np.inf, -np.inf], (~mask).sum())
    return jnp.asarray(x), jnp.asarray(mask), np.float64(x[mask])


def test_mean_variance_and_whitening_of_three_numbers():
    # 1, 2, 6: mean 3, variance ((-2)² + (-1)² + 3²) / 3 = 14/3
    x, mask = jnp.array([[1.0, 2.0, 6.0, 99.0]]), jnp.array([[True, True, True, False]])
    np.testing.assert_allclose(masking.masked_sum(x, mask), 9)
    np.testing.assert_allclose(masking.masked_mean(x, mask), 3)
    np.testing.assert_allclose(masking.masked_variance(x, mask), 14 / 3, rtol=1e-6)
    std = np.sqrt(14 / 3) + 1e-5
    np.testing.assert_allclose(
        masking.whiten(x, mask), [[-2 / std, -1 / std, 3 / std, 0]], rtol=1e-6
    )


def test_garbage_outside_the_mask_is_never_looked_at():
    x, mask, counted = ragged()
    np.testing.assert_allclose(masking.masked_mean(x, mask), counted.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        masking.masked_variance(x, mask), counted.var(), rtol=1e-5
    )
    white = masking.whiten(x, mask)
    np.testing.assert_allclose(
        white[mask], (counted - counted.mean()) / (counted.std() + 1e-5), atol=1e-5
    )
    np.testing.assert_array_equal(white[~mask], 0)


def test_garbage_outside_the_mask_has_gradient_zero():
    x, mask, _ = ragged()
    weights = jax.random.normal(jax.random.key(0), x.shape)
    grad = jax.grad(lambda x: jnp.sum(masking.whiten(x, mask) * weights))(x)
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grad[~mask], 0)


def test_nothing_that_counts_gives_zero():
    x, mask = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    assert masking.masked_mean(x, mask) == 0
    assert masking.masked_variance(x, mask) == 0
    np.testing.assert_array_equal(masking.whiten(x, mask), np.zeros((2, 3)))
    grad = jax.grad(lambda x: jnp.sum(masking.whiten(x, mask)))(jnp.ones((2, 3)))
    np.testing.assert_array_equal(grad, np.zeros((2, 3)))


def test_means_of_microbatches_combine_to_the_mean_of_all():
    # (1 + 2 + 6) / 3 = 3, while the mean of the means 1 and 4 is 2.5.
    x, mask = jnp.array([1.0, 2.0, 6.0]), jnp.ones(3, bool)
    parts = [masking.Mean.over(x[:1], mask[:1]), masking.Mean.over(x[1:], mask[1:])]
    np.testing.assert_allclose(parts[0].combine(parts[1]).value(), 3)
    # As the sums that gradient accumulation adds up, leaf by leaf.
    added = jax.tree.map(lambda a, b: a + b, *parts)
    np.testing.assert_allclose(added.value(), 3)
    assert masking.Mean.over(x, jnp.zeros(3, bool)).value() == 0


def test_weighted_mean_weighs_each_number():
    # (0.5 · 1 + 0.5 · 2 + 1 · 6) / 2 = 3.75; a weight of 0 hides NaN.
    x, weights = jnp.array([1.0, 2.0, 6.0, jnp.nan]), jnp.array([0.5, 0.5, 1.0, 0.0])
    np.testing.assert_allclose(masking.masked_mean(x, weights), 3.75)


def test_share_of_true_is_their_mean():
    x = jnp.array([True, False, True, True])
    np.testing.assert_allclose(masking.masked_mean(x, jnp.ones(4, bool)), 0.75)


def test_whitened_constants_are_zero_and_never_nan():
    # ReaL took the variance as a difference of two sums: rounding made it negative for
    # 102 of 2000 constants. Without care for the mean's rounding they would not be NaN,
    # but as large as 1.
    rng = np.random.default_rng(0)
    constants = rng.normal(size=1000) * 10.0 ** rng.integers(-6, 7, 1000)
    x = jnp.asarray(np.tile(constants[:, None, None], (1, 5, 7)), jnp.float32)
    mask = jnp.asarray(rng.random((1000, 5, 7)) < 0.8)
    np.testing.assert_array_equal(jax.jit(jax.vmap(masking.whiten))(x, mask), 0 * x)


def test_whitening_of_large_nearly_equal_numbers_is_exact():
    # 10000 ± 1/8: the mean square and the squared mean agree in all digits of float32.
    x = jnp.array([10000.125, 9999.875] * 4)
    expected = np.array([1.0, -1.0] * 4) * 0.125 / (0.125 + 1e-5)
    np.testing.assert_allclose(
        masking.whiten(x, jnp.ones(8, bool)), expected, rtol=1e-6
    )
