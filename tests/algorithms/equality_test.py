"""Every algorithm's step is the same however its batch is cut: `equality` says how."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from realjax.algorithms import (
    distillation,
    dpo,
    grpo,
    kto,
    online_dpo,
    orpo,
    ppo,
    raft,
    reinforce_pp,
    remax,
    reward_model,
    rloo,
    sft,
)
from realjax.rl import Sampling
from realjax.testing import tiny_batch, tiny_model
from tests.algorithms.equality import CUTS, assert_equal, parameters_for, run_step
from tests.functions.plain import plain_logprobs

SIZE, WIDTH = 8, 24
MADE = tiny_batch(SIZE, WIDTH)
DATA = {key: np.asarray(MADE[key]) for key in ("tokens", "completion_mask")}
SAMPLING = Sampling(max_new_tokens=WIDTH // 2, temperature=0.9)


def sentences():
    return DATA, {"tokens": MADE.lengths}


def pairs():
    """Two pairs of one prompt, and two of others; one of their rows is empty."""
    weights = np.repeat([0.5, 0.5, 1.0, 0.0], 2).astype(np.float32)
    lengths = MADE.lengths * (weights > 0)
    mask = DATA["completion_mask"] & (weights > 0)[:, None]
    batch = DATA | {"completion_mask": mask, "pair_weights": weights}
    return batch, {"tokens": lengths}


def labels():
    other = tiny_batch(SIZE, WIDTH, seed=1)
    starts = DATA["completion_mask"].argmax(axis=1)
    place = np.arange(WIDTH)[None, :]
    others, is_prompt = np.asarray(other["tokens"]), place < starts[:, None]
    lengths = np.maximum(other.lengths, starts + 1).astype(np.int32)
    return DATA | {
        "is_desirable": np.arange(SIZE) % 3 > 0,
        "mismatched_tokens": np.where(is_prompt, DATA["tokens"], others),
        "mismatched_lengths": lengths,
    }, {"tokens": MADE.lengths, "mismatched_tokens": lengths}


def rollout():
    """Completions by a policy that is nearly the one in training."""
    generator, config = np.random.default_rng(3), tiny_model()
    policy = parameters_for("d1", config, "policy")
    logprobs = plain_logprobs(policy, config, DATA["tokens"], MADE.lengths)
    noise = 0.1 * generator.standard_normal(logprobs.shape)
    return DATA | {
        "old_logprobs": np.where(logprobs, logprobs + noise, 0.0).astype(np.float32),
        "is_truncated": np.arange(SIZE) % 4 == 1,
        "scores": generator.standard_normal(SIZE).astype(np.float32),
    }, {"tokens": MADE.lengths}


def with_greedy_scores():
    """ReMax has a second rollout, of which the scores are all it reads."""
    batch, lengths = rollout()
    greedy = {f"greedy_{key}": batch[key] for key in batch}
    return batch | greedy, lengths


def sampled(algorithm, group=1, **changes):
    """Hyperparameters of an algorithm that samples."""
    return algorithm.HYPERPARAMETERS(
        sampling=SAMPLING, completions_per_prompt=group, **changes
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """An algorithm, its hyperparameters, and what makes its batch."""

    algorithm: Any
    hp: Any
    make: Any
    models: Any = None


CASES = {
    "sft": Case(sft, sft.SFT(), sentences),
    "reward_model": Case(reward_model, reward_model.RewardModel(), pairs),
    "dpo": Case(dpo, dpo.DPO(), pairs),
    "dpo ipo": Case(dpo, dpo.DPO(kind="ipo", is_per_token=True), pairs),
    "orpo": Case(orpo, orpo.ORPO(), pairs),
    "kto": Case(kto, kto.KTO(undesirable_weight=1.5), labels),
    "online_dpo": Case(online_dpo, sampled(online_dpo, group=4), rollout),
    "ppo": Case(ppo, sampled(ppo), rollout),
    "grpo": Case(grpo, sampled(grpo, group=4), rollout),
    "dapo": Case(
        grpo,
        sampled(
            grpo,
            group=4,
            clip_higher=0.28,
            mean_over="tokens",
            kl_coef=0.0,
            overlong_margin=4,
            filters_truncated=True,
        ),
        rollout,
    ),
    "gspo": Case(grpo, sampled(grpo, group=4, ratio="sequence", kl_coef=0), rollout),
    "rloo": Case(rloo, sampled(rloo, group=4), rollout),
    "reinforce_pp": Case(reinforce_pp, sampled(reinforce_pp, group=2), rollout),
    "remax": Case(remax, sampled(remax), with_greedy_scores),
    "raft": Case(raft, sampled(raft, group=4, num_kept=2), rollout),
    "distillation": Case(
        distillation,
        distillation.Distillation(num_top=12, temperature=1.3),
        sentences,
        {"teacher": tiny_model(width=64, mlp_width=96)},
    ),
}
QUICK = {("kto", "microbatches")}


@functools.cache
def step_of(name, cut=None):
    case = CASES[name]
    more = () if cut is None else (CUTS[cut],)
    return run_step(case.algorithm, case.hp, *case.make(), *more, models=case.models)


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        pytest.param(name, cut, marks=() if (name, cut) in QUICK else pytest.mark.slow)
        for name in CASES
        for cut in CUTS
    ],
)
def test_a_step_is_the_same_however_its_batch_is_cut(name, cut):
    found, whole = step_of(name, cut), step_of(name)
    if "microbatches" in cut:
        assert min(found.num_microbatches.values()) > 1
    assert set(whole.num_microbatches.values()) == {1}
    assert_equal(found, whole)
