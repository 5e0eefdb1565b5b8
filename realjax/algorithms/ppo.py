"""PPO for language models: policy, critic, reward model and reference.

Sources: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155; Schulman et al. 2017,
https://arxiv.org/abs/1707.06347.

    prompts ─▶ rollout ─┬─▶ reward ────┬─▶ advantages ─┬─▶ train_policy
                        ├─▶ reference ─┤               └─▶ train_critic
                        └─▶ value ─────┘

With `importance_cap` there is one call more, between rollout and train_policy:
`proximal`, what the trainer itself says of the sampler's tokens.
"""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp

from realjax import functions, rl
from realjax.dataflow import DataflowGraph, call, following
from realjax.rl import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(functions.Rollouts):
    """Hyperparameters, with those of `Rollouts`; the defaults are ReaL's.

    Attributes:
        kl: weight of the KL penalty per token; an adaptive one follows the KL of a
            whole completion.
        discount, gae_lambda: γ and λ of GAE.
        whiten_advantages: whether advantages get mean 0, variance 1 over the batch.
        clip_ratio, value_clip: ε of the policy loss; largest trusted change of a value.
        value_loss: "mse" or "huber".
        value_norm: how value targets are normalised: "exp", "ma" or "none".
        reference_ema: η, by which the reference follows the policy after every step:
            p ← η policy + (1 − η) p; 0 leaves it as it is.
        max_ratio, max_kl: a minibatch whose mean importance ratio or mean approximate
            KL (nats per token) exceeds these changes nothing; 0 turns the check off.
    """

    sampling: rl.Sampling = rl.Sampling(top_k=200, top_p=0.9, max_new_tokens=256)
    score: rl.ScoreShaping = rl.ScoreShaping()
    kl: rl.KLControl = rl.KLControl()
    discount: float = 1.0
    gae_lambda: float = 1.0
    whiten_advantages: bool = True
    clip_ratio: float = 0.2
    value_clip: float = 0.2
    value_loss: Literal["mse", "huber"] = "mse"
    value_norm: Literal["exp", "ma", "none"] = "exp"
    minibatches: int = 4
    reference_ema: float = 0.0
    max_ratio: float = 5.0
    max_kl: float = 0.0


HYPERPARAMETERS = PPO


def initial_state(hp: PPO):
    """Value statistics and KL coefficient: one of each, shared and checkpointed."""
    values = rl.normalization.init(hp.value_norm)
    return {"values": values, "kl_coef": jnp.float32(hp.kl.coef)}


def advantages(state, batch, *, hp: PPO):
    """Advantages and value targets of one rollout batch, and what to report of it."""
    mask, is_truncated = batch["completion_mask"], batch["is_truncated"]
    old_logprobs, ref_logprobs = batch["old_logprobs"], batch["ref_logprobs"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    scores = rl.rewards.shape_scores(hp.score, batch["scores"], is_truncated)
    rewards, kl_rewards = rl.rewards.token_rewards(
        scores, old_logprobs, ref_logprobs, mask, kl_coef=state["kl_coef"]
    )
    denormalize = functools.partial(rl.normalization.denormalize, state["values"])
    values, last_values = map(denormalize, (batch["values"], batch["bootstrap_values"]))
    gae = functools.partial(
        rl.advantages.gae, discount=hp.discount, lambda_=hp.gae_lambda
    )
    last_values = jnp.where(is_truncated, last_values, 0.0)
    estimates, returns = gae(rewards, values, mask, bootstrap_values=last_values)
    normalizer = rl.normalization.update(state["values"], returns, mask)
    targets = rl.normalization.normalize(normalizer, returns)
    if hp.whiten_advantages:
        estimates = rl.masking.whiten(estimates, mask)
    kl = Mean.over(jnp.where(mask, old_logprobs - ref_logprobs, 0.0).sum(1), counts)
    coefficient = rl.kl.next_coefficient(hp.kl, state["kl_coef"], kl)
    metrics = {
        "objective/kl": kl,
        "objective/kl_coef": Mean(state["kl_coef"], jnp.float32(1.0)),
        "objective/scores": Mean.over(batch["scores"], counts),
        "objective/non_score_reward": Mean.over(kl_rewards.sum(1), counts),
        "objective/rlhf_reward": Mean.over(rewards.sum(1), counts),
        "val/returns": Mean.over(returns, mask),
        "val/values": Mean.over(values, mask),
    }
    outputs = {"advantages": estimates, "value_targets": targets}
    return {"values": normalizer, "kl_coef": coefficient}, outputs, metrics


def policy_loss(logprobs, batch, *, hp: PPO):
    """Clipped surrogate, a mean over completion tokens."""
    mask = batch["completion_mask"]
    log_ratio, weights, metrics = rl.importance.parted(
        logprobs, batch, cap=hp.importance_cap
    )
    loss, clipped = rl.losses.clipped_surrogate(
        log_ratio, batch["advantages"], clip_ratio=hp.clip_ratio
    )
    metrics |= rl.losses.surrogate_metrics(log_ratio, clipped, batch["entropy"], mask)
    return Mean.over(weights * loss, mask), metrics


def value_loss(values, batch, *, hp: PPO):
    """Clipped error to the value targets, a mean over completion tokens."""
    mask, targets = batch["completion_mask"], batch["value_targets"]
    loss, clipped = rl.losses.clipped_value(
        values, batch["values"], targets, clip_range=hp.value_clip, kind=hp.value_loss
    )
    return Mean.over(loss, mask), {"val/clipfrac_avg": Mean.over(clipped, mask)}


def is_off_track(metrics, *, hp: PPO):
    """Whether the policy has moved too far from the sampler to learn from it."""
    too_far = metrics["val/ratio"] > (hp.max_ratio or jnp.inf)
    return too_far | (metrics["policy/approxkl_avg"] > (hp.max_kl or jnp.inf))


def graph(hp: PPO) -> DataflowGraph:
    """The six model function calls of one PPO step, and the advantages."""
    bind, infer = functools.partial, functions.Infer
    estimate = functions.Transform(
        fn=bind(advantages, hp=hp),
        state=bind(initial_state, hp),
        reads=(*functions.SAMPLED, "ref_logprobs", "values", "bootstrap_values"),
        writes=("advantages", "value_targets"),
    )
    before = hp.infer(is_as_trained=True)
    proximal = ("proximal_logprobs",) if hp.importance_cap else ()
    train_policy = hp.train(
        bind(policy_loss, hp=hp),
        ("completion_mask", "old_logprobs", *proximal, "advantages"),
        skip=bind(is_off_track, hp=hp),
    )
    train_critic = functions.Train(
        loss=bind(value_loss, hp=hp),
        loss_name="loss/value_avg",
        output="values",
        reads=("tokens", "completion_mask", "values", "value_targets"),
        **hp.steps(),
    )
    return DataflowGraph(
        rollout=call("policy", hp.generate(), staleness=hp.staleness),
        reward=call(*hp.reward()),
        reference=call("reference", hp.infer(), logprobs="ref_logprobs"),
        value=call("critic", infer(output="values")),
        advantages=call(None, estimate),
        proximal=call("policy", before, logprobs=proximal[0]) if proximal else None,
        train_policy=call("policy", train_policy),
        train_critic=call("critic", train_critic),
        **following("reference", source="policy", weight=hp.reference_ema),
    )
