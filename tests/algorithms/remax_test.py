"""Tests of `remax.py`, `raft.py` and `reinforce_pp.py`: against NumPy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from realjax import rl
from realjax.algorithms import raft, reinforce_pp, remax, rloo
from realjax.functions import Delivery
from tests.algorithms.oracles import as_arrays, check, logprobs_like, ragged


def rollout():
    mask = ragged(5, num_padding=1)
    generator = np.random.default_rng(4)
    return {
        "completion_mask": mask,
        "is_truncated": np.arange(6) == 2,
        "scores": generator.normal(size=6),
        "greedy_scores": generator.normal(size=6),
        "greedy_is_truncated": np.arange(6) == 3,
        "old_logprobs": logprobs_like(mask, seed=1),
        "ref_logprobs": logprobs_like(mask, seed=2),
    }


def test_remax_is_its_formula():
    batch = rollout()
    hp = remax.ReMax(kl_coef=0.3, score=rl.ScoreShaping(truncated=-1.0))
    mask, expected = batch["completion_mask"], np.zeros(batch["old_logprobs"].shape)
    for row in range(5):
        score = -1.0 if batch["is_truncated"][row] else batch["scores"][row]
        baseline = batch["greedy_scores"][row]
        baseline = -1.0 if batch["greedy_is_truncated"][row] else baseline
        kl = batch["old_logprobs"][row] - batch["ref_logprobs"][row]
        for t in np.flatnonzero(mask[row]):
            to_come = kl[t:][mask[row][t:]].sum()
            expected[row, t] = score - baseline - 0.3 * to_come
    outputs, metrics = remax.advantages(as_arrays(batch), hp=hp)
    np.testing.assert_allclose(outputs["advantages"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        metrics["objective/greedy_scores"].value(),
        batch["greedy_scores"][:5].mean(),
        rtol=1e-5,
    )
    batch |= {"advantages": expected, "entropy": np.zeros(mask.shape)}

    def oracle(logprobs, batch):
        return -(expected * logprobs)[mask].sum() / 5

    bound = functools.partial(remax.policy_loss, hp=hp)
    check(bound, oracle, batch["old_logprobs"], batch)


def test_a_policy_that_is_as_good_as_its_greedy_self_learns_nothing():
    batch = rollout() | {"greedy_is_truncated": rollout()["is_truncated"]}
    batch["greedy_scores"] = batch["scores"]
    outputs, _ = remax.advantages(as_arrays(batch), hp=remax.ReMax(kl_coef=0.0))
    np.testing.assert_array_equal(outputs["advantages"], 0.0)


def test_remax_with_the_other_of_two_as_baseline_is_rloo():
    scores = jnp.asarray([1.0, 4.0])
    mask = jnp.ones((2, 3), bool)
    none = jnp.zeros(2, bool)
    batch = {"completion_mask": mask, "is_truncated": none, "scores": scores}
    greedy = {"greedy_scores": scores[::-1], "greedy_is_truncated": none}
    one, _ = remax.advantages(batch | greedy, hp=remax.ReMax(kl_coef=0.0))
    hp = rloo.RLOO(completions_per_prompt=2, kl_coef=0.0)
    other, _ = rloo.advantages(batch, hp=hp)
    np.testing.assert_allclose(one["advantages"], other["advantages"])


def test_remax_generates_twice_and_names_what_is_greedy():
    graph = remax.graph(remax.ReMax())
    generating = [n for n, c in graph.calls.items() if "tokens" in n or "roll" in n]
    assert generating == ["rollout"]
    baseline = graph.calls["baseline"].function
    assert baseline.sampling.greedy
    assert not graph.calls["rollout"].function.sampling.greedy
    assert graph.parents("reward_baseline") == {"baseline"}
    assert graph.parents("advantages") >= {"reward", "reward_baseline", "reference"}


def test_the_best_of_a_group_are_kept_and_of_equal_ones_the_first():
    # Groups of three; the last has one row of padding, which never counts.
    scores = jnp.asarray([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, -9.0, -8.0, 0.0])
    counts = jnp.asarray([True] * 8 + [False])
    best = rl.advantages.best_of_group(scores, counts, group_size=3)
    assert np.flatnonzero(best).tolist() == [1, 3, 7]
    two = rl.advantages.best_of_group(scores, counts, group_size=3, num_best=2)
    assert np.flatnonzero(two).tolist() == [1, 2, 3, 4, 6, 7]


def test_raft_learns_from_the_best_alone():
    mask = ragged(4)
    batch = {
        "completion_mask": mask,
        "is_truncated": np.zeros(4, bool),
        "scores": np.array([1.0, 2.0, 4.0, 3.0]),
    }
    outputs, metrics = raft.selection(
        as_arrays(batch), hp=raft.RAFT(completions_per_prompt=2)
    )
    learned = mask & np.array([False, True, True, False])[:, None]
    np.testing.assert_array_equal(outputs["learned_mask"], learned)
    assert metrics["objective/best_scores"].value() == 3.0
    logprobs = logprobs_like(mask)
    batch = {"learned_mask": learned, "entropy": np.zeros(mask.shape)}
    batch["old_logprobs"] = logprobs
    oracle = lambda logprobs, batch: -logprobs[learned].mean()
    check(raft.loss, oracle, logprobs, batch)


def test_raft_that_keeps_all_is_supervised_fine_tuning_on_its_samples():
    batch = as_arrays(rollout())
    hp = raft.RAFT(completions_per_prompt=3, num_kept=3)
    outputs, _ = raft.selection(batch, hp=hp)
    np.testing.assert_array_equal(outputs["learned_mask"], batch["completion_mask"])
    with pytest.raises(
        ValueError, match=r"num_kept is 3 of completions_per_prompt = 2"
    ):
        raft.RAFT(completions_per_prompt=2, num_kept=3)


@pytest.mark.parametrize("group", [1, 2])
def test_reinforce_pp_is_its_formula(group):
    batch = rollout()
    hp = reinforce_pp.ReinforcePlusPlus(kl_coef=0.3, completions_per_prompt=group)
    mask, plain = batch["completion_mask"], np.zeros(batch["old_logprobs"].shape)
    for row in range(5):
        first = row // group * group
        others = [r for r in range(first, first + group) if r < 5]
        baseline = np.mean(batch["scores"][others]) if group > 1 else 0.0
        kl = batch["old_logprobs"][row] - batch["ref_logprobs"][row]
        for t in np.flatnonzero(mask[row]):
            to_come = kl[t:][mask[row][t:]].sum()
            plain[row, t] = batch["scores"][row] - baseline - 0.3 * to_come
    real = plain[mask]
    expected = np.where(mask, (plain - real.mean()) / (real.std() + 1e-5), 0.0)
    outputs, _ = reinforce_pp.advantages(as_arrays(batch), hp=hp)
    np.testing.assert_allclose(outputs["advantages"], expected, rtol=1e-3, atol=1e-5)
    batch |= {"advantages": expected, "entropy": np.zeros(mask.shape)}

    def oracle(logprobs, batch):
        ratio = np.exp(logprobs - batch["old_logprobs"])
        near = np.clip(ratio, 0.8, 1.2)
        return -np.minimum(ratio * expected, near * expected)[mask].mean()

    moved = batch["old_logprobs"] + 0.3 * np.random.default_rng(3).normal(
        size=mask.shape
    )
    bound = functools.partial(reinforce_pp.policy_loss, hp=hp)
    check(bound, oracle, moved, batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"completions_per_prompt": 2},
        {"delivery": Delivery(token_budget=8, num_carried=1)},
    ],
)
def test_remax_is_of_one_completion_and_its_greedy_one(changes):
    with pytest.raises(ValueError, match="or take rloo"):
        remax.ReMax(**changes)
