"""Tests of `realjax/rl/kl.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.rl import kl
from realjax.rl.masking import Mean


def test_estimators_at_log_two():
    # x = ln 2: k1 = ln 2, k2 = (ln 2)² / 2, k3 = ½ - 1 + ln 2
    logprobs, ref_logprobs = jnp.log(jnp.array([[0.5]])), jnp.log(jnp.array([[0.25]]))
    log2 = np.log(2)
    np.testing.assert_allclose(kl.k1(logprobs, ref_logprobs), [[log2]], rtol=1e-6)
    np.testing.assert_allclose(
        kl.k2(logprobs, ref_logprobs), [[log2**2 / 2]], rtol=1e-6
    )
    np.testing.assert_allclose(kl.k3(logprobs, ref_logprobs), [[log2 - 0.5]], rtol=1e-6)


def test_k1_and_k3_have_the_kl_as_their_mean():
    policy = np.random.default_rng(0).dirichlet(np.ones(9))
    reference = np.random.default_rng(1).dirichlet(np.ones(9))
    exact = np.sum(policy * np.log(policy / reference))
    for estimator in (kl.k1, kl.k3):
        each = estimator(jnp.log(policy)[None], jnp.log(reference)[None])
        np.testing.assert_allclose(np.sum(policy * each[0]), exact, rtol=1e-5)


def test_k2_and_k3_are_never_negative_and_zero_for_equal_policies():
    x = jax.random.normal(jax.random.key(0), (50, 20)) * 10.0 ** jnp.arange(
        -8, 2
    ).repeat(2).reshape(1, 20)
    for estimator in (kl.k2, kl.k3):
        # Rounding of k3 near 0 is that of x itself.
        assert np.all(estimator(x, jnp.zeros_like(x)) >= -1e-7 * np.abs(x))
        np.testing.assert_array_equal(estimator(x, x), np.zeros(x.shape))


def mean(value, num_sequences):
    return Mean(jnp.float32(value * num_sequences), jnp.float32(num_sequences))


def test_kl_above_target_raises_the_coefficient():
    # KL 12 with target 6: the error 1 is clipped to 0.2; 256 sequences of 10000.
    #   0.1 · (1 + 0.2 · 0.0256) = 0.100512
    # ReaL gave the controller -0.1 · 12 instead of 12 and got 0.0995, every step.
    control = kl.KLControl(adaptive=True, target=6.0, horizon=10000.0)
    raised = kl.next_coefficient(control, 0.1, mean(12.0, 256))
    np.testing.assert_allclose(raised, 0.100512, rtol=1e-6)


@pytest.mark.parametrize(
    ("measured", "factor"),
    # Clipped at both ends, 0 at the target, proportional between.
    [(-1.0, 0.98), (0.0, 0.98), (5.4, 0.99), (6.0, 1.0), (6.6, 1.01), (60.0, 1.02)],
)
def test_coefficient_changes_by_a_fifth_at_most_over_the_horizon(measured, factor):
    control = kl.KLControl(adaptive=True, target=6.0, horizon=1000.0)
    found = kl.next_coefficient(control, jnp.float32(0.5), mean(measured, 100))
    np.testing.assert_allclose(found, 0.5 * factor, rtol=1e-5)


def test_controller_holds_a_kl_that_answers_to_it_at_its_target():
    # A policy whose KL is 1 / coefficient settles where 1 / coefficient = target.
    coef = jnp.float32(1.0)
    control = kl.KLControl(adaptive=True, target=4.0, horizon=1000.0)
    step = jax.jit(lambda c: kl.next_coefficient(control, c, mean(1 / c, 500)))
    for _ in range(200):
        coef = step(coef)
    np.testing.assert_allclose(coef, 0.25, rtol=1e-3)


def test_a_fixed_coefficient_stays_whatever_the_kl():
    found = kl.next_coefficient(kl.KLControl(), jnp.float32(0.25), mean(60.0, 10000))
    assert float(found) == 0.25
