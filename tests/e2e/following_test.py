"""A reference that follows the policy, in an algorithm without a critic."""

import jax
import numpy as np
import pytest

from realjax.algorithms import grpo
from realjax.rl import Sampling
from realjax.runtime.measures import to_numbers
from tests.runtime.small_rollouts import make_executor, prompts_of

pytestmark = pytest.mark.slow  # Five programs compile.


def run_steps(weight, num_steps=3):
    """Metrics, and policy and reference after each step, the first before any."""
    hp = grpo.GRPO(
        sampling=Sampling(max_new_tokens=8),
        completions_per_prompt=2,
        reference_ema=weight,
    )
    executor = make_executor(grpo.graph(hp), rollout="d1@0", train="d1@1")
    masters = lambda: [
        jax.device_get(executor.store.at_home(role)) for role in ("policy", "reference")
    ]
    numbers, found = [], [masters()]
    for step in range(1, num_steps + 1):
        metrics, _ = executor.run(prompts_of(step), step=step)
        numbers.append(to_numbers(metrics))
        found.append(masters())
    executor.close()
    return numbers, found


def test_the_reference_of_grpo_is_the_moving_average_of_its_policies():
    numbers, masters = run_steps(0.25)
    average = masters[0][1]
    for policy, reference in masters[1:]:
        average = jax.tree.map(lambda p, a: 0.25 * p + 0.75 * a, policy, average)
        jax.tree.map(
            lambda found, wanted: np.testing.assert_allclose(found, wanted, atol=1e-6),
            reference,
            average,
        )
        assert not np.allclose(policy["embedding"], reference["embedding"], atol=1e-4)
    # In the first step the two are the same, later the policy is ahead.
    assert abs(numbers[0]["objective/kl"]) < 1e-5
    assert all(one["objective/kl"] > 1e-4 for one in numbers[1:])


def test_a_reference_that_is_copied_leaves_no_kl_and_one_that_stays_leaves_more():
    copied, _ = run_steps(1.0)
    assert all(abs(one["objective/kl"]) < 1e-5 for one in copied)
    staying, masters = run_steps(0.0)
    np.testing.assert_array_equal(
        masters[-1][1]["embedding"], masters[0][1]["embedding"]
    )
    assert staying[-1]["objective/kl"] > 1e-4
