"""Tests of `realjax/rl/losses.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.rl import losses, masking


def test_surrogate_of_ratios_inside_and_outside_the_trusted_range():
    # ε = 0.2. Ratio, advantage -> -A ρ, -A clip(ρ), the larger:
    #   1.5  +1 -> -1.5, -1.2 -> -1.2 clipped       1.5  -1 -> 1.5, 1.2 -> 1.5
    #   0.5  +1 -> -0.5, -0.8 -> -0.5               0.5  -1 -> 0.5, 0.8 -> 0.8 clipped
    #   1.1  +2 -> -2.2, -2.2 -> -2.2
    ratio = jnp.array([[1.5, 1.5, 0.5, 0.5, 1.1]])
    advantages = jnp.array([[1.0, -1.0, 1.0, -1.0, 2.0]])
    loss, clipped = losses.clipped_surrogate(jnp.log(ratio), advantages, clip_ratio=0.2)
    np.testing.assert_allclose(loss, [[-1.2, 1.5, -0.5, 0.8, -2.2]], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[True, False, False, True, False]])


def test_gradient_of_the_surrogate_at_ratio_one_is_that_of_the_policy_gradient():
    # d/dlogp of -A exp(logp - old) at logp = old is -A; 0 where the ratio is clipped.
    old = -jnp.ones((1, 3))
    advantages = jnp.array([[1.0, -2.0, 3.0]])

    def loss(logprobs):
        return losses.clipped_surrogate(logprobs - old, advantages, clip_ratio=0.2)[0]

    grad = jax.grad(lambda x: loss(x).sum())
    np.testing.assert_allclose(grad(old), -advantages)
    np.testing.assert_allclose(grad(old + 0.5), [[0, 2 * np.exp(0.5), 0]], rtol=1e-6)


def test_surrogate_agrees_with_the_formula_on_ragged_rows():
    rng = np.random.default_rng(0)
    logprobs, old, advantages = rng.normal(size=(3, 5, 11)).astype(np.float32)
    mask = np.arange(11)[None] < rng.integers(1, 12, (5, 1))
    surrogate = jax.jit(losses.clipped_surrogate, static_argnames="clip_ratio")
    loss, clipped = surrogate(logprobs - old, advantages, clip_ratio=0.3)
    losses_, clips = [], []
    for b, t in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(np.float64(logprobs[b, t]) - old[b, t])
        plain = -advantages[b, t] * ratio
        near = -advantages[b, t] * min(max(ratio, 0.7), 1.3)
        losses_.append(max(plain, near))
        clips.append(plain < near)
    mean = jax.jit(masking.masked_mean)
    np.testing.assert_allclose(mean(loss, mask), np.mean(losses_), rtol=1e-5)
    np.testing.assert_allclose(mean(clipped, mask), np.mean(clips), rtol=1e-5)


def test_value_loss_trusts_a_change_of_at_most_the_range():
    # old 0, ε = 0.2, target 1. Value -> ½ (V - 1)², ½ (near - 1)², the larger:
    #   0.1 -> 0.405, 0.405                1.0 -> 0, ½ · 0.8² = 0.32 clipped
    #  -0.5 -> 1.125, ½ · 1.2² = 0.72      0.2 -> 0.32, 0.32
    loss, clipped = losses.clipped_value(
        jnp.array([[0.1, 1.0, -0.5, 0.2]]),
        jnp.zeros((1, 4)),
        jnp.ones((1, 4)),
        clip_range=0.2,
    )
    np.testing.assert_allclose(loss, [[0.405, 0.32, 1.125, 0.32]], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [[False, True, False, False]])


def test_huber_value_loss_is_linear_beyond_delta():
    # δ = 10: ½ · 9² = 40.5 and 10 · (30 - 5) = 250, where the square has 450.
    values, targets = jnp.array([[9.0, 30.0, -30.0]]), jnp.zeros((1, 3))
    options = {"clip_range": 1e9}
    loss, _ = losses.clipped_value(values, values, targets, kind="huber", **options)
    np.testing.assert_allclose(loss, [[40.5, 250, 250]])
    loss, _ = losses.clipped_value(values, values, targets, kind="mse", **options)
    np.testing.assert_allclose(loss, [[40.5, 450, 450]])
    loss, _ = losses.clipped_value(
        values, values, targets, kind="huber", huber_delta=1.0, **options
    )
    np.testing.assert_allclose(loss, [[8.5, 29.5, 29.5]])


def test_huber_gradient_is_clipped_at_delta():
    target = jnp.zeros((1, 1))
    loss = lambda v: losses.clipped_value(
        v, v, target, clip_range=1e9, kind="huber", huber_delta=2.0
    )[0].sum()
    for value, slope in ((1.5, 1.5), (7.0, 2.0), (-7.0, -2.0), (0.0, 0.0)):
        np.testing.assert_allclose(jax.grad(loss)(jnp.full((1, 1), value)), [[slope]])


def test_unknown_value_loss_is_refused():
    x = jnp.zeros((1, 1))
    with pytest.raises(Exception, match="mae"):
        losses.clipped_value(x, x, x, clip_range=0.2, kind="mae")


def test_pairwise_loss_of_three_pairs():
    # -log σ(0) = ln 2;  -log σ(ln 3) = ln(4/3);  -log σ(-ln 3) = ln 4
    log3 = np.log(3)
    scores = jnp.array([5.0, 5.0, log3, 0.0, 0.0, log3])
    np.testing.assert_allclose(
        losses.pairwise_logistic(scores), np.log([2, 4 / 3, 4]), rtol=1e-6
    )


def test_pairwise_loss_is_finite_for_any_difference():
    scores = jnp.array([1e4, -1e4, -1e4, 1e4])
    np.testing.assert_allclose(losses.pairwise_logistic(scores), [0, 2e4])
    grad = jax.grad(lambda s: losses.pairwise_logistic(s).sum())(scores)
    np.testing.assert_allclose(grad, [0, 0, -1, 1])


def test_odd_number_of_scores_is_refused():
    with pytest.raises(ValueError, match="5 scores are not pairs"):
        losses.pairwise_logistic(jnp.zeros(5))
