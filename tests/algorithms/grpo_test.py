"""Tests of `grpo.py` and `rloo.py`: arithmetic against NumPy, and what must hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import grpo, rloo
from realjax.core.config import to_dataclass
from realjax.rl import Sampling, ScoreShaping
from tests.algorithms.oracles import as_arrays, check, logprobs_like, ragged

GROUP = 3
LONGEST = 6


def rollout(num_groups=2, *, seed=0, num_padding=GROUP):
    """Groups of completions, and a group of padding."""
    generator = np.random.default_rng(seed)
    mask = ragged(num_groups * GROUP, seed=seed, num_padding=num_padding)
    size = len(mask)
    return {
        "completion_mask": mask,
        "is_truncated": np.arange(size) % 4 == 1,
        "scores": generator.normal(size=size),
        "old_logprobs": logprobs_like(mask, seed=seed + 1),
        "ref_logprobs": logprobs_like(mask, seed=seed + 2),
    }


def hyperparameters(**changes):
    sampling = Sampling(max_new_tokens=LONGEST)
    return grpo.GRPO(sampling=sampling, completions_per_prompt=GROUP, **changes)


def expected_advantages(batch, hp):
    found = np.zeros(len(batch["scores"]))
    for group in range(2):
        rows = range(group * GROUP, (group + 1) * GROUP)
        shaped = []
        for row in rows:
            mask = batch["completion_mask"][row]
            score = batch["scores"][row]
            if hp.overlong_margin:
                over = mask.sum() - (LONGEST - hp.overlong_margin)
                score -= min(max(over / hp.overlong_margin, 0.0), 1.0)
            if hp.kl_coef and hp.kl_in == "reward":
                x = (batch["old_logprobs"][row] - batch["ref_logprobs"][row])[mask]
                kl = {"k1": x, "k2": x**2 / 2, "k3": np.exp(-x) - 1 + x}
                score -= hp.kl_coef * kl[hp.kl_estimator].sum()
            shaped.append(score)
        for row, score in zip(rows, shaped, strict=True):
            found[row] = score - np.mean(shaped)
            if hp.scales_advantages:
                found[row] /= np.std(shaped) + 1e-5
    return found


def oracle(logprobs, batch, *, hp):
    """The mean loss by loops (Shao et al. 2024, equation 3, and its variants)."""
    total, count, num_rows = 0.0, 0, 0
    high = hp.clip_ratio if hp.clip_higher is None else hp.clip_higher
    for row in range(2 * GROUP):
        mask = batch["learned_mask"][row]
        if not mask.any():
            continue
        new, old = logprobs[row][mask], batch["old_logprobs"][row][mask]
        ratio = np.exp(new - old)
        if hp.ratio == "sequence":
            ratio = np.full(len(new), np.exp((new - old).mean()))
        advantage = batch["advantages"][row][mask]
        near = np.clip(ratio, 1 - hp.clip_ratio, 1 + high)
        loss = -np.minimum(ratio * advantage, near * advantage)
        if hp.kl_coef and hp.kl_in == "loss":
            x = new - batch["ref_logprobs"][row][mask]
            kl = {"k1": x, "k2": x**2 / 2, "k3": np.exp(-x) - 1 + x}
            loss = loss + hp.kl_coef * kl[hp.kl_estimator]
        per_row = {"sequences": mask.sum(), "constant": LONGEST}.get(hp.mean_over, 1)
        total += loss.sum() / per_row
        count, num_rows = count + mask.sum(), num_rows + 1
    return total / (count if hp.mean_over == "tokens" else num_rows)


VARIANTS = {
    "grpo": {},
    "k1": {"kl_estimator": "k1"},
    "k2": {"kl_estimator": "k2"},
    "kl_in_reward": {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.1},
    "dr_grpo": {"scales_advantages": False, "mean_over": "constant", "kl_coef": 0.0},
    "dapo": {
        "clip_higher": 0.28,
        "mean_over": "tokens",
        "kl_coef": 0.0,
        "overlong_margin": 4,
        "filters_truncated": True,
    },
    "gspo": {"ratio": "sequence", "kl_coef": 0.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_advantages_and_loss_are_those_of_the_formula(variant):
    hp, batch = hyperparameters(**VARIANTS[variant]), rollout()
    outputs, _ = grpo.advantages(as_arrays(batch), hp=hp)
    mask = batch["completion_mask"]
    expected = expected_advantages(batch, hp)[:, None] * mask
    np.testing.assert_allclose(outputs["advantages"], expected, rtol=2e-4, atol=1e-6)
    batch |= {key: np.asarray(value) for key, value in outputs.items()}
    batch["entropy"] = np.zeros(mask.shape)
    is_learned = mask & ~(batch["is_truncated"][:, None] & hp.filters_truncated)
    np.testing.assert_array_equal(batch["learned_mask"], is_learned)
    logprobs = batch["old_logprobs"] + 0.3 * np.random.default_rng(5).normal(
        size=mask.shape
    )
    bound = functools.partial(grpo.policy_loss, hp=hp)
    check(bound, functools.partial(oracle, hp=hp), logprobs, batch)


def test_equal_scores_teach_nothing():
    batch = rollout()
    batch["scores"] = np.full(len(batch["scores"]), 0.1)
    outputs, metrics = grpo.advantages(as_arrays(batch), hp=hyperparameters())
    np.testing.assert_array_equal(outputs["advantages"], 0.0)
    assert metrics["objective/useful_groups"].value() == 0.0


def test_advantages_of_a_group_of_one_are_scores():
    batch = rollout()
    hp = grpo.GRPO(completions_per_prompt=1, kl_coef=0.0)
    outputs, _ = grpo.advantages(as_arrays(batch), hp=hp)
    expected = batch["scores"][:, None] * batch["completion_mask"]
    np.testing.assert_allclose(outputs["advantages"], expected, rtol=1e-6)


def policy_gradient(batch, weights):
    """Of minus the weighted log-probabilities, a mean over completions."""
    mask = batch["completion_mask"]
    return -weights[:, None] * mask / mask.any(1).sum()


def test_with_one_completion_a_step_from_the_sampler_is_reinforce():
    # At ratio 1, "constant" with a length of 1: the gradient is -score at every token.
    batch = rollout()
    hp = grpo.GRPO(
        sampling=Sampling(max_new_tokens=1),
        completions_per_prompt=1,
        kl_coef=0.0,
        mean_over="constant",
    )
    arrays = as_arrays(batch)
    arrays |= grpo.advantages(arrays, hp=hp)[0]
    arrays["entropy"] = jnp.zeros(batch["completion_mask"].shape)
    loss = lambda x: grpo.policy_loss(x, arrays, hp=hp)[0].value()
    gradient = jax.grad(loss)(arrays["old_logprobs"])
    expected = policy_gradient(batch, batch["scores"])
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_gspo_of_completions_of_one_token_is_grpo():
    batch = rollout()
    mask = batch["completion_mask"]
    first = mask & (np.cumsum(mask, axis=1) == 1)
    batch["completion_mask"] = first
    arrays = as_arrays(batch)
    arrays |= grpo.advantages(arrays, hp=hyperparameters(kl_coef=0.0))[0]
    arrays["entropy"] = jnp.zeros(mask.shape)
    logprobs = arrays["old_logprobs"] + 0.1
    losses = [
        grpo.policy_loss(logprobs, arrays, hp=hyperparameters(kl_coef=0.0, ratio=kind))
        for kind in ("token", "sequence")
    ]
    np.testing.assert_allclose(losses[0][0].value(), losses[1][0].value(), rtol=1e-6)


def test_rloo_of_two_is_the_difference_of_scores_and_twice_what_grpo_has():
    scores = jnp.asarray([1.0, 4.0, -2.0, -2.5])
    counts = jnp.ones(4, bool)
    batch = {
        "completion_mask": jnp.ones((4, 2), bool),
        "is_truncated": ~counts,
        "scores": scores,
        "old_logprobs": jnp.zeros((4, 2)),
    }
    one = rloo.advantages(batch, hp=rloo.RLOO(completions_per_prompt=2, kl_coef=0.0))
    of_tokens = np.outer([-3.0, 3.0, 0.5, -0.5], [1, 1])
    np.testing.assert_allclose(one[0]["advantages"], of_tokens)
    hp = grpo.GRPO(completions_per_prompt=2, kl_coef=0.0, scales_advantages=False)
    other = grpo.advantages(batch, hp=hp)[0]["advantages"]
    np.testing.assert_allclose(one[0]["advantages"], 2 * other)


def test_rloo_is_its_formula():
    batch = rollout()
    hp = rloo.RLOO(completions_per_prompt=GROUP, kl_coef=0.2)
    mask = batch["completion_mask"]
    shaped = batch["scores"].copy()
    for row in range(2 * GROUP):
        x = (batch["old_logprobs"][row] - batch["ref_logprobs"][row])[mask[row]]
        shaped[row] -= 0.2 * x.sum()
    expected = np.zeros(len(shaped))
    for row in range(2 * GROUP):
        group = row // GROUP * GROUP
        others = [shaped[r] for r in range(group, group + GROUP) if r != row]
        expected[row] = shaped[row] - np.mean(others)
    outputs, _ = rloo.advantages(as_arrays(batch), hp=hp)
    np.testing.assert_allclose(
        outputs["advantages"], expected[:, None] * mask, rtol=1e-4, atol=1e-6
    )
    batch |= {"advantages": np.asarray(outputs["advantages"], np.float64)}
    batch["entropy"] = np.zeros(mask.shape)

    def by_loops(logprobs, batch):
        rows = range(2 * GROUP)
        return -np.mean([expected[r] * logprobs[r][mask[r]].sum() for r in rows])

    check(
        functools.partial(rloo.policy_loss, hp=hp),
        by_loops,
        batch["old_logprobs"],
        batch,
    )


def test_rloo_weighs_tokens_that_the_trainer_sees_otherwise():
    batch, hp = rollout(), rloo.RLOO(completions_per_prompt=GROUP, importance_cap=2.0)
    mask = batch["completion_mask"]
    moved = batch["old_logprobs"] + np.random.default_rng(5).normal(size=mask.shape)
    batch |= {
        "advantages": logprobs_like(mask, seed=9),
        "entropy": np.zeros(mask.shape),
    }
    weights = np.minimum(np.exp(moved - batch["old_logprobs"]), 2.0)

    def by_loops(logprobs, batch):
        total = (weights * batch["advantages"] * logprobs)[mask].sum()
        return -total / mask.any(1).sum()

    check(functools.partial(rloo.policy_loss, hp=hp), by_loops, moved, batch)
    with pytest.raises(ValueError, match=r"importance_cap is 0\.5"):
        rloo.RLOO(importance_cap=0.5)


def test_the_correction_parts_rounding_from_learning_in_the_clipped_loss():
    batch, hp = rollout(), hyperparameters(kl_coef=0.0, importance_cap=1.5)
    batch |= {
        k: np.asarray(v) for k, v in grpo.advantages(as_arrays(batch), hp=hp)[0].items()
    }
    mask = batch["completion_mask"]
    noise = np.random.default_rng(6).normal(size=(2, *mask.shape))
    batch["proximal_logprobs"] = batch["old_logprobs"] + 0.5 * noise[0]
    batch["entropy"] = np.zeros(mask.shape)
    weights = np.exp(batch["proximal_logprobs"] - batch["old_logprobs"])
    weights = np.minimum(weights, 1.5)

    def by_loops(logprobs, batch):
        rows = []
        for row in range(2 * GROUP):
            own = mask[row]
            ratio = np.exp(logprobs[row] - batch["proximal_logprobs"][row])[own]
            advantage = batch["advantages"][row][own]
            near = np.clip(ratio, 0.8, 1.2)
            surrogate = np.minimum(ratio * advantage, near * advantage)
            rows.append(-(weights[row][own] * surrogate).mean())
        return np.mean(rows)

    moved = batch["proximal_logprobs"] + 0.2 * noise[1]
    check(functools.partial(grpo.policy_loss, hp=hp), by_loops, moved, batch)
    assert "proximal" in grpo.graph(hp).calls
    assert "proximal" not in grpo.graph(hyperparameters()).calls


def test_dynamic_sampling_keeps_the_first_groups_whose_scores_differ():
    # Of six groups of two a third is wanted; the first, third and fourth are alike.
    scores = jnp.asarray([1.0, 1, 1, 0, 0, 0, 2, 2, 0, 3, 1, 0])
    batch = {
        "completion_mask": jnp.ones((12, 2), bool),
        "is_truncated": jnp.zeros(12, bool),
        "scores": scores,
        "old_logprobs": jnp.zeros((12, 2)),
    }
    hp = grpo.GRPO(completions_per_prompt=2, kl_coef=0.0, oversampling=3)
    learned = grpo.advantages(batch, hp=hp)[0]["learned_mask"]
    np.testing.assert_array_equal(np.flatnonzero(learned.all(1)), [2, 3, 8, 9])
    assert learned.any(1).sum() == 4
    assert grpo.graph(hp).calls["train_policy"].function.only == "learned_mask"


def test_groups_that_do_not_divide_the_batch_are_refused():
    batch = as_arrays(rollout(num_padding=1))
    with pytest.raises(ValueError, match=r"7 scores do not split into groups of 3"):
        grpo.advantages(batch, hp=hyperparameters())
    with pytest.raises(ValueError, match=r"completions_per_prompt is 1"):
        rloo.RLOO(completions_per_prompt=1)


@pytest.mark.parametrize("wrong", [{"kl_in": "score"}, {"ratio": "turn"}])
def test_words_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        to_dataclass(grpo.GRPO, wrong, path="config.hp")


def test_graphs_have_the_calls_that_their_options_need():
    with_all = grpo.graph(grpo.GRPO())
    assert set(with_all.roles) == {"policy", "reward", "reference"}
    alone = grpo.graph(grpo.GRPO(kl_coef=0.0))
    assert set(alone.roles) == {"policy", "reward"}
    assert set(rloo.graph(rloo.RLOO()).roles) == {"policy", "reward", "reference"}
    assert ScoreShaping(truncated="keep") == grpo.GRPO().score
