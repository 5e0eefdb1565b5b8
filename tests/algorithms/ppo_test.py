"""Tests of `realjax/algorithms/ppo.py`: its transform and losses against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import ppo
from realjax.rl import KLControl, ScoreShaping

STARTS = (2, 3, 1, 4)
LENGTHS = (5, 7, 4, 7)
WIDTH = 8
TRUNCATED = (False, True, False, True)


def rollout(seed=0):
    """Four completions of unlike lengths and a row of padding, as a batch and lists."""
    rng = np.random.default_rng(seed)
    size = len(LENGTHS) + 1
    mask = np.zeros((size, WIDTH), bool)
    for row, (start, stop) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        mask[row, start:stop] = True
    batch = {
        "completion_mask": mask,
        "is_truncated": np.array([*TRUNCATED, False]),
        "scores": rng.normal(size=size) * 3,
        "old_logprobs": -rng.exponential(size=(size, WIDTH)),
        "ref_logprobs": -rng.exponential(size=(size, WIDTH)),
        "values": rng.normal(size=(size, WIDTH)),
        "bootstrap_values": rng.normal(size=size),
    }
    arrays = {
        k: jnp.asarray(v, None if v.dtype == bool else jnp.float32)
        for k, v in batch.items()
    }
    return batch, arrays


def oracle(batch, *, kl_coef, discount, gae_lambda, clip, truncated):
    """Rewards, advantages and returns by loops in float64 (real.md D.2 and D.3)."""
    advantages, returns = (np.zeros_like(batch["values"]) for _ in range(2))
    rewards = np.zeros_like(batch["values"])
    for row, (start, stop) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        is_truncated = TRUNCATED[row]
        score = np.clip(batch["scores"][row], -clip, clip)
        if is_truncated and truncated == "zero":
            score = 0.0
        log_ratio = batch["old_logprobs"][row] - batch["ref_logprobs"][row]
        rewards[row, start:stop] = -kl_coef * log_ratio[start:stop]
        rewards[row, stop - 1] += score
        following = batch["bootstrap_values"][row] if is_truncated else 0.0
        advantage = 0.0
        for t in reversed(range(start, stop)):
            value = batch["values"][row, t]
            delta = rewards[row, t] + discount * following - value
            advantage = delta + discount * gae_lambda * advantage
            advantages[row, t], returns[row, t] = advantage, advantage + value
            following = value
    return rewards, advantages, returns


@pytest.mark.parametrize("truncated", ["zero", "keep"])
def test_advantages_are_those_of_a_loop_in_float64(truncated):
    hp = ppo.PPO(
        value_norm="none",
        whiten_advantages=False,
        discount=0.9,
        gae_lambda=0.8,
        kl=KLControl(coef=0.3),
        score=ScoreShaping(clip=2.0, truncated=truncated),
    )
    batch, arrays = rollout()
    _, outputs, metrics = jax.jit(lambda s, b: ppo.advantages(s, b, hp=hp))(
        ppo.initial_state(hp), arrays
    )
    rewards, advantages, returns = oracle(
        batch, kl_coef=0.3, discount=0.9, gae_lambda=0.8, clip=2.0, truncated=truncated
    )
    mask = batch["completion_mask"]
    found = np.where(mask, outputs["advantages"], 0)
    np.testing.assert_allclose(found, advantages, atol=1e-5)
    found = np.where(mask, outputs["value_targets"], 0)
    np.testing.assert_allclose(found, returns, atol=1e-5)
    # Rows of padding count for nothing: means are over four completions.
    np.testing.assert_allclose(
        metrics["objective/rlhf_reward"].value(), rewards.sum(1)[:4].mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["objective/scores"].value(), batch["scores"][:4].mean(), rtol=1e-5
    )
    log_ratio = np.where(mask, batch["old_logprobs"] - batch["ref_logprobs"], 0)
    np.testing.assert_allclose(
        metrics["objective/kl"].value(), log_ratio.sum(1)[:4].mean(), rtol=1e-5
    )


def test_whitened_advantages_have_mean_zero_and_variance_one_over_tokens():
    hp = ppo.PPO()
    batch, arrays = rollout()
    _, outputs, _ = ppo.advantages(ppo.initial_state(hp), arrays, hp=hp)
    tokens = np.asarray(outputs["advantages"])[batch["completion_mask"]]
    np.testing.assert_allclose(tokens.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(tokens.std(), 1, rtol=1e-4)


def test_one_normaliser_serves_values_and_targets_and_moves_only_by_returns():
    hp = ppo.PPO(value_norm="ma")
    _, arrays = rollout()
    state = ppo.initial_state(hp)
    state, outputs, _ = ppo.advantages(state, arrays, hp=hp)
    mask = np.asarray(arrays["completion_mask"])
    targets = np.asarray(outputs["value_targets"])[mask]
    # After the first batch the targets are that batch, normalised by itself.
    np.testing.assert_allclose(targets.mean(), 0, atol=1e-5)
    assert float(state["values"].weight) == mask.sum()


def test_the_adaptive_coefficient_follows_the_kl_of_whole_completions():
    hp = ppo.PPO(kl=KLControl(coef=0.1, adaptive=True, target=1e-3, horizon=100.0))
    _, arrays = rollout()
    arrays["old_logprobs"] = arrays["ref_logprobs"] + 1.0  # KL: far above the target.
    state, _, metrics = ppo.advantages(ppo.initial_state(hp), arrays, hp=hp)
    # The error is clipped to 0.2; four completions of a horizon of 100.
    np.testing.assert_allclose(state["kl_coef"], 0.1 * (1 + 0.2 * 0.04), rtol=1e-6)
    np.testing.assert_allclose(metrics["objective/kl_coef"].value(), 0.1, rtol=1e-6)


def test_policy_loss_is_the_clipped_mean_over_tokens():
    hp = ppo.PPO(clip_ratio=0.2)
    batch, arrays = rollout()
    rng = np.random.default_rng(1)
    logprobs = batch["old_logprobs"] + rng.normal(size=batch["values"].shape) * 0.3
    advantages = rng.normal(size=batch["values"].shape)
    arrays |= {
        "advantages": jnp.asarray(advantages, jnp.float32),
        "entropy": jnp.ones_like(arrays["values"]),
    }
    loss, metrics = ppo.policy_loss(jnp.asarray(logprobs, jnp.float32), arrays, hp=hp)
    mask = batch["completion_mask"]
    ratio = np.exp(logprobs - batch["old_logprobs"])
    clipped = -advantages * np.clip(ratio, 0.8, 1.2)
    expected = np.maximum(-advantages * ratio, clipped)[mask].mean()
    np.testing.assert_allclose(loss.value(), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["val/ratio"].value(), ratio[mask].mean(), 1e-5)
    fraction = (clipped > -advantages * ratio)[mask].mean()
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"].value(), fraction)


def corrected_arrays(seed=1):
    """A rollout whose sampler, proximal policy and policy are all different."""
    batch, arrays = rollout()
    rng = np.random.default_rng(seed)
    shape = batch["values"].shape
    proximal = batch["old_logprobs"] + rng.normal(size=shape) * 0.5
    logprobs = proximal + rng.normal(size=shape) * 0.3
    arrays |= {
        "proximal_logprobs": jnp.asarray(proximal, jnp.float32),
        "advantages": jnp.asarray(rng.normal(size=shape), jnp.float32),
        "entropy": jnp.ones_like(arrays["values"]),
    }
    return batch, arrays, proximal, jnp.asarray(logprobs, jnp.float32)


def test_corrected_losses_part_the_ratio_in_a_clipped_one_and_a_truncated_weight():
    hp = ppo.PPO(clip_ratio=0.2, importance_cap=1.5)
    batch, arrays, proximal, logprobs = corrected_arrays()
    loss, metrics = ppo.policy_loss(logprobs, arrays, hp=hp)
    mask, advantages = batch["completion_mask"], np.asarray(arrays["advantages"])
    ratio = np.exp(np.asarray(logprobs, np.float64) - proximal)
    weight = np.minimum(np.exp(proximal - batch["old_logprobs"]), 1.5)
    clipped = -advantages * np.clip(ratio, 0.8, 1.2)
    expected = (weight * np.maximum(-advantages * ratio, clipped))[mask].mean()
    np.testing.assert_allclose(loss.value(), expected, rtol=1e-5)
    assert (weight == 1.5).any()
    # Ratio and gap are of either side of the proximal policy.
    np.testing.assert_allclose(metrics["val/ratio"].value(), ratio[mask].mean(), 1e-5)
    gap = np.abs(proximal - batch["old_logprobs"])[mask].mean()
    np.testing.assert_allclose(metrics["rollout_gap/logprob"].value(), gap, rtol=1e-5)


def test_the_correction_weighs_gradients_and_has_none_itself():
    hp = ppo.PPO(clip_ratio=0.2, importance_cap=1.5)
    batch, arrays, proximal, _ = corrected_arrays()
    start = arrays["proximal_logprobs"]

    def total(logprobs, start):
        found = ppo.policy_loss(logprobs, arrays | {"proximal_logprobs": start}, hp=hp)[
            0
        ]
        return found.total

    # At the proximal policy itself the ratio is 1, and nothing is clipped.
    mask = batch["completion_mask"]
    weight = np.minimum(np.exp(proximal - batch["old_logprobs"]), 1.5)
    expected = np.where(mask, -weight * np.asarray(arrays["advantages"]), 0)
    gradients = jax.grad(total, argnums=(0, 1))(start, start)
    np.testing.assert_allclose(gradients[0], expected, atol=1e-5)
    # Only the ratio's own: a weight with a gradient would add to it.
    np.testing.assert_allclose(gradients[1], -expected, atol=1e-5)


def test_equal_precisions_make_the_correction_nothing():
    _, arrays, _, logprobs = corrected_arrays()
    arrays["proximal_logprobs"] = arrays["old_logprobs"]
    plain, _ = ppo.policy_loss(logprobs, arrays, hp=ppo.PPO())
    corrected, metrics = ppo.policy_loss(
        logprobs, arrays, hp=ppo.PPO(importance_cap=2.0)
    )
    np.testing.assert_array_equal(plain.value(), corrected.value())
    assert metrics["rollout_gap/logprob"].value() == 0
    assert metrics["rollout_gap/kl"].value() == 0


def test_without_the_correction_the_gap_is_that_of_the_policy_in_training():
    batch, arrays, _, logprobs = corrected_arrays()
    del arrays["proximal_logprobs"]  # No call makes them.
    _, metrics = ppo.policy_loss(logprobs, arrays, hp=ppo.PPO())
    gap = np.abs(np.asarray(logprobs) - batch["old_logprobs"])
    gap = gap[batch["completion_mask"]].mean()
    np.testing.assert_allclose(metrics["rollout_gap/logprob"].value(), gap, rtol=1e-5)


def test_the_trainer_scores_the_rollout_only_where_that_is_corrected_for():
    assert "proximal" not in ppo.graph(ppo.PPO()).calls
    graph = ppo.graph(ppo.PPO(importance_cap=2.0))
    node = graph.calls["proximal"]
    assert (node.role, node.needs_masters) == ("policy", True)
    assert "proximal_logprobs" in graph.calls["train_policy"].reads
    assert graph.order().index("proximal") < graph.order().index("train_policy")
    with pytest.raises(ValueError, match="importance_cap is -1"):
        ppo.PPO(importance_cap=-1.0)


def test_value_loss_trusts_no_more_than_the_clip():
    hp = ppo.PPO(value_clip=0.2)
    batch, arrays = rollout()
    rng = np.random.default_rng(2)
    values = batch["values"] + rng.normal(size=batch["values"].shape)
    targets = rng.normal(size=batch["values"].shape)
    arrays |= {"value_targets": jnp.asarray(targets, jnp.float32)}
    loss, _ = ppo.value_loss(jnp.asarray(values, jnp.float32), arrays, hp=hp)
    near = batch["values"] + np.clip(values - batch["values"], -0.2, 0.2)
    each = 0.5 * np.maximum((values - targets) ** 2, (near - targets) ** 2)
    expected = each[batch["completion_mask"]].mean()
    np.testing.assert_allclose(loss.value(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "kl", "is_off"), [(1.0, 0.0, False), (6.0, 0.0, True), (1.0, 0.5, True)]
)
def test_a_minibatch_off_track_is_skipped_by_ratio_or_kl(ratio, kl, is_off):
    hp = ppo.PPO(max_ratio=5.0, max_kl=0.1)
    metrics = {"val/ratio": jnp.float32(ratio), "policy/approxkl_avg": jnp.float32(kl)}
    assert bool(ppo.is_off_track(metrics, hp=hp)) is is_off


def test_zero_turns_the_checks_off():
    hp = ppo.PPO(max_ratio=0.0, max_kl=0.0)
    metrics = {"val/ratio": jnp.float32(1e9), "policy/approxkl_avg": jnp.float32(1e9)}
    assert not ppo.is_off_track(metrics, hp=hp)


def test_a_step_reports_what_readers_of_trl_and_real_look_for():
    hp = ppo.PPO()
    _, arrays = rollout()
    _, outputs, reported = ppo.advantages(ppo.initial_state(hp), arrays, hp=hp)
    arrays |= outputs | {"entropy": jnp.ones_like(arrays["values"])}
    _, of_policy = ppo.policy_loss(arrays["old_logprobs"], arrays, hp=hp)
    _, of_critic = ppo.value_loss(arrays["values"], arrays, hp=hp)
    assert {*reported, *of_policy, *of_critic} == {
        "objective/kl",
        "objective/kl_coef",
        "objective/scores",
        "objective/non_score_reward",
        "objective/rlhf_reward",
        "val/returns",
        "val/values",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "policy/entropy_avg",
        "rollout_gap/logprob",
        "rollout_gap/kl",
        "val/ratio",
        "val/clipfrac_avg",
    }


def test_the_reference_follows_the_policy_only_on_request():
    assert "follow" not in ppo.graph(ppo.PPO()).calls
    graph = ppo.graph(ppo.PPO(reference_ema=0.001))
    assert graph.calls["follow"].function.weight == 0.001
    assert graph.changed_roles == ("policy", "reference", "critic")


def test_without_critic_and_whitening_a_first_step_is_reinforce_with_kl():
    # Discount and lambda 1, values 0, one minibatch: the advantage is what is to come.
    hp = ppo.PPO(
        whiten_advantages=False,
        minibatches=1,
        value_norm="none",
        score=ScoreShaping(truncated="keep"),
        kl=KLControl(coef=0.2),
    )
    batch, arrays = rollout()
    arrays |= {
        key: jnp.zeros_like(arrays[key]) for key in ("values", "bootstrap_values")
    }
    _, outputs, _ = ppo.advantages(ppo.initial_state(hp), arrays, hp=hp)
    arrays |= outputs | {"entropy": jnp.zeros_like(arrays["old_logprobs"])}
    loss = lambda x: ppo.policy_loss(x, arrays, hp=hp)[0].value()
    gradient = jax.grad(loss)(arrays["old_logprobs"])
    expected = np.zeros(gradient.shape)
    kl = batch["old_logprobs"] - batch["ref_logprobs"]
    for row, (start, stop) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        for t in range(start, stop):
            to_come = batch["scores"][row] - 0.2 * kl[row, t:stop].sum()
            expected[row, t] = -to_come / batch["completion_mask"].sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
