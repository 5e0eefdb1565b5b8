"""Tests of `realjax/rl/normalization.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.rl import normalization

update = jax.jit(normalization.update)
normalize = jax.jit(normalization.normalize)
denormalize = jax.jit(normalization.denormalize)


def batches(num_batches: int, seed: int = 0, mean: float = 0.0, std: float = 1.0):
    """Return ragged batches of value targets, with NaN where nothing counts."""
    rng = np.random.default_rng(seed)
    for step in range(num_batches):
        x = rng.normal(mean + 0.1 * std * step, std, (4, 6)).astype(np.float32)
        mask = np.arange(6)[None] < rng.integers(0, 7, (4, 1))
        x[~mask] = np.nan
        yield x, mask


def oracle(kind: str, seen, decay: float):
    """Return mean and variance as ReaL computes them, in float64."""
    mean = square = weight = 0.0
    for x, mask in seen:
        counted = np.float64(x[mask])
        if not counted.size:
            continue
        if kind == "exp":
            mean = decay * mean + (1 - decay) * counted.mean()
            square = decay * square + (1 - decay) * np.mean(counted**2)
            weight = decay * weight + (1 - decay)
        else:
            mean, square = mean + counted.sum(), square + np.sum(counted**2)
            weight += counted.size
    return mean / weight, max(square / weight - (mean / weight) ** 2, 1e-2)


@pytest.mark.parametrize("kind", ["exp", "ma"])
def test_normalizer_is_the_identity_before_its_first_update(kind):
    # ReaL divided by its smallest deviation, 0.1, before it had seen anything: values
    # came out of denormalisation ten times too small. Not even the clip applies.
    state = normalization.init(kind)
    x = jnp.array([1.0, -3.0, 100.0])
    np.testing.assert_array_equal(normalize(state, x), x)
    np.testing.assert_array_equal(denormalize(state, x), x)


@pytest.mark.parametrize("kind", ["exp", "ma"])
def test_moments_of_the_first_batch_are_its_own(kind):
    # 1, 2, 6: mean 3, variance 14/3. No bias of the empty beginning is left.
    x, mask = jnp.array([[1.0, 2.0, 6.0, 99.0]]), jnp.array([[True, True, True, False]])
    state = update(normalization.init(kind), x, mask)
    np.testing.assert_allclose(state.mean, 3, rtol=1e-6)
    np.testing.assert_allclose(state.variance, 14 / 3, rtol=1e-6)
    std = np.sqrt(14 / 3)
    np.testing.assert_allclose(normalize(state, jnp.array(5.0)), 2 / std, rtol=1e-6)
    np.testing.assert_allclose(denormalize(state, jnp.array(2.0)), 3 + 2 * std)


@pytest.mark.parametrize("decay", [0.99995, 0.9])
def test_exponential_moments_are_the_debiased_running_means(decay):
    state = normalization.init("exp", decay=decay)
    for x, mask in batches(30):
        state = update(state, x, mask)
    mean, variance = oracle("exp", batches(30), decay)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(state.variance, variance, rtol=1e-5)


def test_cumulative_moments_are_those_of_all_tokens_seen():
    state = normalization.init("ma")
    for x, mask in batches(30):
        state = update(state, x, mask)
    counted = np.concatenate([np.float64(x[mask]) for x, mask in batches(30)])
    np.testing.assert_allclose(state.mean, counted.mean(), rtol=1e-5)
    np.testing.assert_allclose(state.variance, counted.var(), rtol=1e-5)
    np.testing.assert_allclose(oracle("ma", batches(30), 1.0)[0], counted.mean())
    assert state.weight == counted.size


@pytest.mark.parametrize("kind", ["exp", "ma"])
def test_small_deviations_around_a_large_mean_survive_float32(kind):
    # mean 1000, std 0.5: the mean square and the squared mean, a million each, differ
    # by 0.25, of which float32 keeps two digits at best.
    state = normalization.init(kind)
    for x, mask in batches(200, mean=1000.0, std=0.5):
        state = update(state, x, mask)
    mean, variance = oracle(kind, batches(200, mean=1000.0, std=0.5), 0.99995)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(state.variance, variance, rtol=1e-2)


def test_normalize_undoes_denormalize_inside_the_clip():
    state = normalization.init("exp")
    for x, mask in batches(3, mean=7.0, std=3.0):
        state = update(state, x, mask)
    x = jnp.linspace(-4.9, 4.9, 9)
    np.testing.assert_allclose(normalize(state, denormalize(state, x)), x, atol=1e-5)
    far = denormalize(state, jnp.array([-50.0, 50.0]))
    np.testing.assert_allclose(normalize(state, far), [-5, 5])


def test_constant_targets_are_divided_by_the_smallest_deviation():
    # The variance is taken as at least 1/100, so that a constant is not divided by 0.
    state = update(
        normalization.init("exp"), jnp.full((2, 3), 4.0), jnp.ones((2, 3), bool)
    )
    np.testing.assert_allclose(denormalize(state, jnp.array(1.0)), 4.1, rtol=1e-6)
    np.testing.assert_allclose(normalize(state, jnp.array(4.2)), 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["exp", "ma"])
def test_batch_in_which_nothing_counts_changes_nothing(kind):
    x, nothing = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    state = normalization.init(kind)
    assert update(state, x, nothing) == state
    state = update(state, jnp.ones((2, 3)), ~nothing)
    assert update(state, x, nothing) == state


def test_state_is_arrays_only_so_one_checkpoint_holds_it():
    state = normalization.init("exp")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert len(jax.tree.leaves(state)) == 4


def test_unknown_kind_and_useless_decay_are_refused():
    with pytest.raises(Exception, match="ema"):
        normalization.init("ema")
    with pytest.raises(ValueError, match=r"decay of the value normaliser is 1\.0"):
        normalization.init("exp", decay=1.0)


def test_kind_none_stays_the_identity():
    state = normalization.init("none")
    x = jnp.array([[3.0, -70.0]])
    for _ in range(3):
        state = normalization.update(state, x, jnp.ones((1, 2), bool))
    np.testing.assert_array_equal(normalization.normalize(state, x), x)
    np.testing.assert_array_equal(normalization.denormalize(state, x), x)
