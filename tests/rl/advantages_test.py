"""Tests of `realjax/rl/advantages.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.rl import advantages

gae = jax.jit(advantages.gae, static_argnames=("discount", "lambda_"))


def ragged(seed: int = 0, num_sequences: int = 6, num_tokens: int = 33):
    """Return completions that start and end anywhere, with NaN around them."""
    rng = np.random.default_rng(seed)
    shape = (num_sequences, num_tokens)
    starts = rng.integers(1, num_tokens // 2, num_sequences)
    ends = np.append(
        rng.integers(num_tokens // 2, num_tokens, num_sequences - 1), num_tokens
    )
    places = np.arange(num_tokens)[None]
    mask = (places >= starts[:, None]) & (places < ends[:, None])
    rewards, values = rng.normal(size=(2, *shape)).astype(np.float32)
    rewards[~mask] = values[~mask] = np.nan
    bootstrap = rng.normal(size=num_sequences).astype(np.float32)
    bootstrap[::2] = 0  # Ended by themselves.
    return rewards, values, mask, bootstrap


def oracle(rewards, values, mask, bootstrap, discount, lambda_):
    """Walk backward over each sequence, in float64."""
    found = np.zeros(mask.shape)
    for b in range(len(mask)):
        advantage, next_value = 0.0, float(bootstrap[b])
        for t in reversed(np.flatnonzero(mask[b])):
            delta = rewards[b, t] + discount * next_value - float(values[b, t])
            advantage = delta + discount * lambda_ * advantage
            next_value = float(values[b, t])
            found[b, t] = advantage
    return found


def test_gae_of_two_tokens():
    # γ = λ = 1/2; the completion is tokens 1 and 2, and ended by itself.
    #   δ₂ = 1 + 0 - 2 = -1            A₂ = -1
    #   δ₁ = 0 + ½ · 2 - 1 = 0         A₁ = 0 + ¼ · -1 = -¼
    # Cut instead, with a value of 4 after it:
    #   δ₂ = 1 + ½ · 4 - 2 = 1         A₂ = 1
    #   δ₁ = 0                         A₁ = ¼
    for bootstrap, expected in ((0.0, [0, -0.25, -1, 0]), (4.0, [0, 0.25, 1, 0])):
        found, targets = gae(
            jnp.array([[9.0, 0.0, 1.0, 9.0]]),
            jnp.array([[9.0, 1.0, 2.0, 9.0]]),
            jnp.array([[False, True, True, False]]),
            bootstrap_values=jnp.array([bootstrap]),
            discount=0.5,
            lambda_=0.5,
        )
        np.testing.assert_allclose(found, [expected])
        # A + V
        np.testing.assert_allclose(targets, [[0, expected[1] + 1, expected[2] + 2, 0]])


@pytest.mark.parametrize(
    ("discount", "lambda_"), [(1.0, 1.0), (0.9, 0.5), (0.9, 1.0), (1.0, 0.95)]
)
def test_gae_agrees_with_the_loop_over_each_sequence(discount, lambda_):
    rewards, values, mask, bootstrap = ragged()
    found, targets = gae(
        rewards,
        values,
        mask,
        bootstrap_values=bootstrap,
        discount=discount,
        lambda_=lambda_,
    )
    expected = oracle(rewards, values, mask, bootstrap, discount, lambda_)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(targets, np.where(mask, expected + values, 0), atol=1e-5)


def test_gae_with_lambda_one_is_return_minus_value():
    rewards, values = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    found, targets = gae(
        rewards,
        values,
        jnp.ones((3, 7), bool),
        bootstrap_values=jnp.zeros(3),
        discount=0.9,
        lambda_=1.0,
    )
    returns = np.stack([rewards[:, t:] @ 0.9 ** np.arange(7 - t) for t in range(7)], 1)
    np.testing.assert_allclose(targets, returns, atol=1e-5)
    np.testing.assert_allclose(found, returns - values, atol=1e-5)


def test_gae_with_lambda_zero_is_the_error_of_one_step():
    rewards, values = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    bootstrap = np.array([0.0, 1.0, -2.0], np.float32)
    found, _ = gae(
        rewards,
        values,
        jnp.ones((3, 7), bool),
        bootstrap_values=bootstrap,
        discount=1.0,
        lambda_=0.0,
    )
    next_values = np.concatenate([values[:, 1:], bootstrap[:, None]], axis=1)
    np.testing.assert_allclose(found, rewards + next_values - values, atol=1e-6)


def test_gae_of_zero_values_spreads_the_last_reward_by_powers_of_lambda():
    # What GRPO and ReMax do with one number per completion: γ = 1, V = 0.
    rewards = jnp.array([[0.0, 0.0, 0.0, 8.0]])
    found, _ = gae(
        rewards,
        jnp.zeros((1, 4)),
        jnp.array([[False, True, True, True]]),
        bootstrap_values=jnp.zeros(1),
        discount=1.0,
        lambda_=0.5,
    )
    np.testing.assert_allclose(found, [[0, 2, 4, 8]])


def test_gae_does_not_depend_on_padding():
    rewards, values, mask, bootstrap = ragged()
    wide = lambda x, fill: np.pad(x, ((0, 0), (3, 4)), constant_values=fill)
    narrow = gae(rewards, values, mask, bootstrap_values=bootstrap)
    padded = gae(
        wide(rewards, np.nan),
        wide(values, np.inf),
        wide(mask, False),
        bootstrap_values=bootstrap,
    )
    for a, b in zip(padded, narrow, strict=True):
        np.testing.assert_allclose(a[:, 3:-4], b, atol=1e-6)


def test_gae_of_a_padding_row_is_zero():
    found = gae(
        jnp.full((1, 5), jnp.nan),
        jnp.full((1, 5), jnp.nan),
        jnp.zeros((1, 5), bool),
        bootstrap_values=jnp.array([jnp.nan]),
    )
    for x in found:
        np.testing.assert_array_equal(x, np.zeros((1, 5)))
