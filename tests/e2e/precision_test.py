"""PPO whose rollout, reference and reward have 8 bits: how far from float32 it is."""

import gc

import jax
import numpy as np
import pytest

from realjax.models.quantized import Quantized
from tests.e2e.tiny_ppo import PLAN, hyperparameters, make_executor, run_step

SMALL = {
    "weights": {"rollout": "int8"},
    "kv_dtype": {"rollout": "int8"},
    "role_weights": {"reference": "int8", "reward": "float8_e4m3fn"},
}


def matrices(tree):
    """How many arrays are quantized."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Quantized))
    return sum(isinstance(leaf, Quantized) for leaf in leaves)


def steps_of(allocations, num_steps, hp, **options):
    """Steps of a tiny PPO, and its executor."""
    executor = make_executor(hp, allocations, **options)
    try:
        return [run_step(executor, step + 1) for step in range(num_steps)], executor
    finally:
        executor.close()


@pytest.mark.slow
def test_a_step_in_8_bits_is_corrected_for_and_says_by_how_much():
    one = dict.fromkeys(PLAN, "d1")
    hp = hyperparameters(importance_cap=2.0, minibatches=2)
    (first, second), executor = steps_of(one, 2, hp, num_devices=1, **SMALL)
    for found in (first, second):
        # The trainer against itself before the update, and after it.
        assert found.updates["val/ratio"][0] == pytest.approx(1.0, abs=1e-6)
        assert abs(found.updates["val/ratio"][1] - 1) > 1e-4
        # One number a step, of the first minibatch: float32 with itself has 1e-6.
        (gap,), (kl,) = (
            found.updates[f"rollout_gap/{name}"] for name in ("logprob", "kl")
        )
        assert 1e-4 < gap < 0.05
        assert 0 < kl < 1e-3
        gaps = found.made["proximal_logprobs"] - found.made["old_logprobs"]
        gaps = np.abs(gaps[found.made["completion_mask"]])
        assert gap == pytest.approx(gaps.mean(), rel=0.5)
    assert second.num_compiled == 0
    # Frozen roles stay in 8 bits; of the policy only masters are left.
    held = lambda role: matrices(executor.store.at_home(role))
    assert (held("reference"), held("reward")) == (7, 7)
    assert held("policy") == held("critic") == 0


@pytest.fixture(scope="module")
def exact():
    return steps_of(PLAN, 1, hyperparameters())[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_the_first_step_is_near_that_of_float32_on_six_meshes(exact, cap):
    hp = hyperparameters(importance_cap=cap)
    (found,), _ = steps_of(PLAN, 1, hp, **SMALL)
    first = lambda step, name: step.updates[name][0]
    assert first(exact, "rollout_gap/logprob") < 1e-5
    assert first(found, "rollout_gap/logprob") > 1e-4
    for name, bound in {
        "policy/entropy_avg": 0.2,
        "policy/approxkl_avg": 1e-3,
        "policy/clipfrac_avg": 0.05,
        "val/ratio": 1e-6 if cap else 0.02,
        "rollout_gap/logprob": 0.05,
        "rollout_gap/kl": 1e-3,
        "grad_norm/policy": 0.5 * first(exact, "grad_norm/policy"),
    }.items():
        assert abs(first(found, name) - first(exact, name)) < bound, name
    # Other tokens, a few, of which scores and values are about the same.
    for name in ("objective/scores", "val/values"):
        assert found.numbers[name] == pytest.approx(exact.numbers[name], abs=0.4)
    is_same = found.made["tokens"] == exact.made["tokens"]
    assert 0.5 < is_same.mean()


@pytest.mark.slow
def test_copies_of_8_bits_are_gone_when_the_rollout_is_over():
    executor = make_executor(hyperparameters(), PLAN, **SMALL)
    try:
        run_step(executor, 1)
        assert not executor.store._copies
        kept = lambda: sum(
            array.nbytes
            for array in jax.live_arrays()
            if str(array.dtype) in ("int8", "uint8")
        )
        gc.collect()
        before = kept()
        run_step(executor, 2)
        gc.collect()
        assert kept() == before
    finally:
        executor.close()
