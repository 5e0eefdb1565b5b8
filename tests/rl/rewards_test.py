"""Tests of `realjax/rl/rewards.py`."""

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.rl import rewards

MASK = jnp.array([[False, True, True, False], [False, True, True, True]])
LOGPROBS = jnp.array([[9.0, -1.0, -2.0, 9.0], [9.0, -1.0, -1.0, -1.0]])
REF_LOGPROBS = jnp.array([[9.0, -3.0, -1.0, -9.0], [9.0, -1.0, -1.0, -1.5]])
SCORES = jnp.array([5.0, 7.0])
TRUNCATED = jnp.array([False, True])


def token_rewards(kl_coef=0.1):
    return rewards.token_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=kl_coef)


def test_score_goes_to_the_last_completion_token_and_kl_to_every_one():
    # -0.1 · (-1 + 3) = -0.2, -0.1 · (-2 + 1) = 0.1; -0.1 · (-1 + 1.5) = -0.05
    found, kl = token_rewards()
    expected_kl = [[0, -0.2, 0.1, 0], [0, 0, 0, -0.05]]
    np.testing.assert_allclose(kl, expected_kl, atol=1e-7)
    np.testing.assert_allclose(found, [[0, -0.2, 5.1, 0], [0, 0, 0, 6.95]], rtol=1e-6)


@pytest.mark.parametrize(
    ("truncated", "last"), [("keep", 7.0), ("zero", 0.0), (-2.0, -2.0), (0, 0.0)]
)
def test_truncated_completion_keeps_loses_or_swaps_its_score(truncated, last):
    shaping = rewards.ScoreShaping(truncated=truncated)
    found = rewards.shape_scores(shaping, SCORES, TRUNCATED)
    np.testing.assert_allclose(found, [5.0, last])  # The first ended by itself.


def test_rewards_of_a_sequence_add_up_to_its_score_minus_the_penalty():
    found, kl = token_rewards(kl_coef=jnp.float32(0.3))
    np.testing.assert_allclose(found.sum(1), SCORES + kl.sum(1), rtol=1e-6)
    x = np.where(MASK, LOGPROBS - REF_LOGPROBS, 0)
    np.testing.assert_allclose(kl.sum(1), -0.3 * x.sum(1), rtol=1e-6)


def test_padding_rows_and_garbage_outside_the_mask_give_zero():
    nothing = jnp.zeros_like(MASK)
    found, kl = rewards.token_rewards(
        jnp.array([jnp.nan, jnp.nan]),
        LOGPROBS * jnp.nan,
        REF_LOGPROBS,
        nothing,
        kl_coef=0.1,
    )
    np.testing.assert_array_equal(found, np.zeros((2, 4)))
    np.testing.assert_array_equal(kl, np.zeros((2, 4)))


def test_scores_are_shifted_then_scaled_then_clipped():
    # (3 - 1) · 10 = 20 -> 15;  (1.5 - 1) · 10 = 5;  (-9 - 1) · 10 = -100 -> -15
    shaping = rewards.ScoreShaping(scaling=10.0, bias=1.0, clip=15.0)
    ended = jnp.zeros(3, bool)
    found = rewards.shape_scores(shaping, jnp.array([3.0, 1.5, -9.0]), ended)
    np.testing.assert_allclose(found, [15, 5, -15])


def test_unknown_treatment_of_truncated_scores_is_refused():
    with pytest.raises(Exception, match="drop"):
        rewards.ScoreShaping(truncated="drop")
