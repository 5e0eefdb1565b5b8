"""Tests of `realjax/algorithms/online_dpo.py`."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import dpo, online_dpo
from realjax.rl import Sampling, preferences
from tests.algorithms.oracles import (
    as_arrays,
    check,
    log_sigmoid,
    logprobs_like,
    ragged,
)

GROUP = 3


def hyperparameters(**changes):
    sampling = Sampling(max_new_tokens=6)
    options = {"beta": 0.3, "completions_per_prompt": GROUP, **changes}
    return online_dpo.OnlineDPO(sampling=sampling, **options)


def rollout():
    """Two groups that differ, one that does not, and one of padding."""
    mask = ragged(3 * GROUP, num_padding=GROUP)
    scores = np.array([0.1, 2.0, -1.0, 0.5, 0.5, 0.4, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    return {
        "completion_mask": mask,
        "is_truncated": np.zeros(len(mask), bool),
        "scores": scores,
        "old_logprobs": logprobs_like(mask, seed=1),
        "ref_logprobs": logprobs_like(mask, seed=2),
        "entropy": np.zeros(mask.shape),
    }


def ranked(hp):
    batch = rollout()
    outputs, metrics = online_dpo.ranking(as_arrays(batch), hp=hp)
    return batch | {k: np.asarray(v) for k, v in outputs.items()}, metrics


def test_the_best_and_the_worst_of_a_group_are_its_pair():
    batch, metrics = ranked(hyperparameters())
    # Of two that are equally good the first; no pair where all are.
    assert np.flatnonzero(batch["is_chosen"]).tolist() == [1, 3]
    learned = np.flatnonzero(batch["learned_mask"].any(axis=1))
    assert learned.tolist() == [1, 2, 3, 5]
    np.testing.assert_allclose(metrics["objective/useful_groups"].value(), 2 / 3)
    np.testing.assert_allclose(metrics["objective/chosen_scores"].value(), 1.25)
    np.testing.assert_allclose(metrics["objective/rejected_scores"].value(), -0.3)


def oracle(logprobs, batch, *, hp):
    losses = []
    for best, worst in ((1, 2), (3, 5)):
        gained = []
        for row in (best, worst):
            mask, value = batch["completion_mask"][row], logprobs[row]
            if hp.has_reference:
                value = value - batch["ref_logprobs"][row]
            gained.append(value[mask].mean() if hp.is_per_token else value[mask].sum())
        losses.append(-log_sigmoid(hp.beta * (gained[0] - gained[1])))
    return np.mean(losses)


@pytest.mark.parametrize(
    "changes", [{}, {"has_reference": False, "is_per_token": True}], ids=["dpo", "bare"]
)
def test_loss_and_gradient_are_those_of_the_formula(changes):
    hp = hyperparameters(**changes)
    batch, _ = ranked(hp)
    logprobs = logprobs_like(batch["completion_mask"], seed=3)
    bound = functools.partial(online_dpo.loss, hp=hp)
    check(bound, functools.partial(oracle, hp=hp), logprobs, batch)


def test_with_groups_of_two_it_is_dpo_on_the_ranked_pairs():
    hp, generator = hyperparameters(completions_per_prompt=2), np.random.default_rng(0)
    batch = {k: v[:8] for k, v in rollout().items()}
    batch["scores"] = generator.normal(size=8)
    arrays = as_arrays(batch)
    arrays |= online_dpo.ranking(arrays, hp=hp)[0]
    logprobs = jnp.asarray(logprobs_like(batch["completion_mask"], seed=3), jnp.float32)
    found, _ = online_dpo.loss(logprobs, arrays, hp=hp)
    order = [
        r
        for g in range(0, 8, 2)
        for r in sorted((g, g + 1), key=lambda r: -batch["scores"][r])
    ]
    pairs = {k: v[np.array(order)] for k, v in arrays.items()}
    pairs["pair_weights"] = jnp.ones(8)
    expected, _ = dpo.loss(logprobs[np.array(order)], pairs, hp=dpo.DPO(beta=0.3))
    np.testing.assert_allclose(found.value(), expected.value(), rtol=1e-6)


def test_what_makes_no_pair_is_refused():
    with pytest.raises(ValueError, match="completions_per_prompt is 1"):
        hyperparameters(completions_per_prompt=1)
    with pytest.raises(ValueError, match="importance_cap"):
        hyperparameters(importance_cap=2.0)
    with pytest.raises(ValueError, match="beta is 0"):
        hyperparameters(beta=0.0)
    with pytest.raises(ValueError, match="7 scores do not split into groups of 3"):
        preferences.best_and_worst(jnp.zeros(7), jnp.ones(7, bool), group_size=3)


def test_graphs_have_the_calls_that_their_options_need():
    graph = online_dpo.graph(hyperparameters())
    assert set(graph.roles) == {"policy", "reward", "reference"}
    train = graph.calls["train_policy"].function
    assert (train.unit, train.only) == (GROUP, "learned_mask")
    alone = online_dpo.graph(hyperparameters(has_reference=False))
    assert set(alone.roles) == {"policy", "reward"}
