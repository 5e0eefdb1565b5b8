"""Tests of `realjax/rl/importance.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.rl import importance

OLD = jnp.log(jnp.array([[0.5, 0.2, 0.1, 0.9]]))
NEW = jnp.log(jnp.array([[0.25, 0.3, 0.4, 0.9]]))
MASK = jnp.array([[True, True, True, False]])


def test_weights_are_ratios_up_to_the_cap():
    # 0.25 / 0.5, 0.3 / 0.2, 0.4 / 0.1 and 1; the third is above 2.
    found = importance.truncated_weights(NEW, OLD, cap=2.0)
    np.testing.assert_allclose(found, [[0.5, 1.5, 2.0, 1.0]], rtol=1e-5)
    # A cap below 1 holds for tokens on which both agree, too.
    found = importance.truncated_weights(NEW, OLD, cap=0.75)
    np.testing.assert_allclose(found, [[0.5, 0.75, 0.75, 0.75]], rtol=1e-5)


def test_a_weight_is_finite_however_unlikely_the_token_was():
    far = importance.truncated_weights(
        jnp.zeros((1, 2)), jnp.array([[-1e4, 1e4]]), cap=3.0
    )
    np.testing.assert_allclose(far, [[3.0, 0.0]], rtol=1e-6)


def test_weights_are_exactly_one_where_sampler_and_trainer_agree():
    np.testing.assert_array_equal(importance.truncated_weights(OLD, OLD, cap=2.0), 1.0)


def test_a_cap_of_0_corrects_nothing():
    np.testing.assert_array_equal(importance.truncated_weights(NEW, OLD, cap=0.0), 1.0)


def test_weights_have_no_gradient():
    total = lambda logprobs: importance.truncated_weights(logprobs, OLD, cap=2.0).sum()
    np.testing.assert_array_equal(jax.grad(total)(NEW), 0.0)


def test_gaps_are_those_of_tokens_that_count():
    means = importance.gap(NEW, OLD, MASK)
    ratio = np.array([0.5, 1.5, 4.0])
    np.testing.assert_allclose(
        means["rollout_gap/logprob"].value(), np.abs(np.log(ratio)).mean(), rtol=1e-5
    )
    # k3 of KL(sampler ‖ trainer), with x = -log ratio: ratio - 1 - log ratio.
    np.testing.assert_allclose(
        means["rollout_gap/kl"].value(), (ratio - 1 - np.log(ratio)).mean(), rtol=1e-5
    )
    assert means["rollout_gap/kl"].weight == 3
    largest = importance.largest_gap(NEW, OLD, MASK)
    np.testing.assert_allclose(largest, np.log(4), rtol=1e-5)
    assert importance.largest_gap(NEW, OLD, jnp.zeros_like(MASK)) == 0


@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_the_kl_estimate_is_that_of_the_distributions(scale):
    # Over a million draws of the sampler's own, of 8 tokens.
    generator = np.random.default_rng(0)
    logits = generator.normal(size=8)
    log_softmax = lambda x: x - np.log(np.exp(x).sum())
    sampler = log_softmax(logits)
    trainer = log_softmax(logits + scale * generator.normal(size=8))
    exact = (np.exp(sampler) * (sampler - trainer)).sum()
    drawn = generator.choice(8, (1, 10**6), p=np.exp(sampler))
    found = importance.gap(
        jnp.asarray(trainer[drawn], jnp.float32),
        jnp.asarray(sampler[drawn], jnp.float32),
        jnp.ones(drawn.shape, bool),
    )["rollout_gap/kl"]
    np.testing.assert_allclose(found.value(), exact, rtol=0.02)
