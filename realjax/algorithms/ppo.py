"""PPO for language models: policy, critic, reward model and reference.

Sources: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155; Schulman et al. 2017,
https://arxiv.org/abs/1707.06347.

    prompts ─▶ rollout ─┬─▶ reward ────┬─▶ advantages ─┬─▶ train_policy
                        ├─▶ reference ─┤               └─▶ train_critic
                        └─▶ values ────┘
"""

import dataclasses
import functools

import jax.numpy as jnp

from realjax import rl
from realjax.dataflow import DataflowGraph, call
from realjax.functions import Generate, Infer, Score, Train, Transform, is_filtered
from realjax.functions.score import RewardFunction
from realjax.rl.masking import Mean
from realjax.rl.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO:
    """Hyperparameters; the defaults are ReaL's.

    Attributes:
        sampling: how completions are drawn; temperature and filters hold for every
            log-probability of the step.
        completions_per_prompt: G, completions sampled for each prompt.
        rewards: Python functions of the text; empty means the reward role's scores.
        score_scaling, score_bias, score_clip: s becomes clip((s - bias) * scaling).
        truncated_score: what a completion without its end counts for: "zero", "keep"
            for its own score, or a number.
        kl_coef: KL penalty per token, in reward units per nat; the start of an
            adaptive one.
        adaptive_kl: whether the coefficient follows the measured KL.
        kl_target, kl_horizon: nats per completion; sequences over which it adapts.
        discount, gae_lambda: γ and λ of GAE.
        whiten_advantages: whether advantages get mean 0, variance 1 over the batch.
        clip_ratio, value_clip: ε of the policy loss; largest trusted change of a value.
        value_loss: "mse" or "huber".
        value_norm: how value targets are normalised: "exp", "ma" or "" for not at all.
        minibatches, epochs, shuffle: optimizer steps per rollout and their order.
        max_ratio, max_kl: a minibatch whose mean importance ratio or mean approximate
            KL (nats per token) exceeds these changes nothing; 0 turns the check off.
    """

    sampling: Sampling = Sampling(top_k=200, top_p=0.9, max_new_tokens=256)
    completions_per_prompt: int = 1
    rewards: tuple[RewardFunction, ...] = ()
    score_scaling: float = 1.0
    score_bias: float = 0.0
    score_clip: float = 20.0
    truncated_score: float | str = "zero"
    kl_coef: float = 0.1
    adaptive_kl: bool = False
    kl_target: float = 6.0
    kl_horizon: float = 10000.0
    discount: float = 1.0
    gae_lambda: float = 1.0
    whiten_advantages: bool = True
    clip_ratio: float = 0.2
    value_clip: float = 0.2
    value_loss: str = "mse"
    value_norm: str = "exp"
    minibatches: int = 4
    epochs: int = 1
    shuffle: bool = False
    max_ratio: float = 5.0
    max_kl: float = 0.0


HYPERPARAMETERS = PPO


def initial_state(hp: PPO):
    """Value statistics and KL coefficient: one of each, shared and checkpointed."""
    values = rl.normalization.init(hp.value_norm or "exp")
    return {"values": values, "kl_coef": jnp.float32(hp.kl_coef)}


def advantages(state, batch, *, hp: PPO):
    """Advantages and value targets of one rollout batch, and what to report of it."""
    mask, is_truncated = batch["completion_mask"], batch["is_truncated"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    rewards, kl_rewards = rl.rewards.token_rewards(
        rl.rewards.clip_scores(
            batch["scores"], hp.score_scaling, hp.score_bias, hp.score_clip
        ),
        batch["old_logprobs"],
        batch["ref_logprobs"],
        mask,
        kl_coef=state["kl_coef"],
        is_truncated=is_truncated,
        truncated_score=hp.truncated_score,
    )
    denormalize = functools.partial(rl.normalization.denormalize, state["values"])
    values, last_values = map(denormalize, (batch["values"], batch["bootstrap_values"]))
    estimates, returns = rl.advantages.gae(
        rewards,
        values,
        mask,
        bootstrap_values=jnp.where(is_truncated, last_values, 0.0),
        discount=hp.discount,
        lambda_=hp.gae_lambda,
    )
    normalizer = state["values"]  # Changes nothing until its first update.
    if hp.value_norm:
        normalizer = rl.normalization.update(normalizer, returns, mask)
    log_ratio = jnp.where(mask, batch["old_logprobs"] - batch["ref_logprobs"], 0.0)
    kl, coefficient = Mean.over(log_ratio.sum(axis=1), counts), state["kl_coef"]
    if hp.adaptive_kl:
        coefficient = rl.kl.adaptive_kl(
            coefficient,
            kl.value(),
            target=hp.kl_target,
            horizon=hp.kl_horizon,
            num_sequences=counts.sum(),
        )
    metrics = {
        "objective/kl": kl,
        "objective/kl_coef": Mean.over(state["kl_coef"][None], jnp.ones(1)),
        "objective/scores": Mean.over(batch["scores"], counts),
        "objective/non_score_reward": Mean.over(kl_rewards.sum(axis=1), counts),
        "objective/rlhf_reward": Mean.over(rewards.sum(axis=1), counts),
        "val/returns": Mean.over(returns, mask),
        "val/values": Mean.over(values, mask),
        "val/advantages": Mean.over(estimates, mask),
    }
    whiten = rl.masking.whiten if hp.whiten_advantages else lambda x, mask: x
    outputs = {
        "advantages": whiten(estimates, mask),
        "value_targets": rl.normalization.normalize(normalizer, returns),
    }
    return {"values": normalizer, "kl_coef": coefficient}, outputs, metrics


def policy_loss(logprobs, batch, *, hp: PPO):
    """Clipped surrogate, a mean over completion tokens."""
    mask, old_logprobs = batch["completion_mask"], batch["old_logprobs"]
    loss, clipped = rl.losses.clipped_surrogate(
        logprobs, old_logprobs, batch["advantages"], clip_ratio=hp.clip_ratio
    )
    log_ratio = logprobs - old_logprobs
    return Mean.over(loss, mask), {
        "policy/approxkl_avg": Mean.over(0.5 * jnp.square(log_ratio), mask),
        "policy/clipfrac_avg": Mean.over(clipped, mask),
        "policy/entropy_avg": Mean.over(batch["entropy"], mask),
        "val/ratio": Mean.over(jnp.exp(log_ratio), mask),
    }


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
    bind, sampling = functools.partial, hp.sampling
    generate = Generate(
        sampling=sampling, completions_per_prompt=hp.completions_per_prompt
    )
    score = Score(rewards=hp.rewards) if hp.rewards else Infer(output="scores")
    scored = ("tokens", "kept") if is_filtered(sampling) else ("tokens",)
    reference = Infer(reads=scored, temperature=sampling.temperature)
    rollout = ("completion_mask", "is_truncated", "old_logprobs")
    estimate = Transform(
        fn=bind(advantages, hp=hp),
        state=bind(initial_state, hp),
        reads=(*rollout, "scores", "ref_logprobs", "values", "bootstrap_values"),
        writes=("advantages", "value_targets"),
    )
    train = bind(
        Train, minibatches=hp.minibatches, epochs=hp.epochs, shuffle=hp.shuffle
    )
    train_policy = train(
        loss=bind(policy_loss, hp=hp),
        loss_name="loss/policy_avg",
        reads=(*scored, "completion_mask", "old_logprobs", "advantages"),
        temperature=sampling.temperature,
        skip=bind(is_off_track, hp=hp),
    )
    train_critic = train(
        loss=bind(value_loss, hp=hp),
        loss_name="loss/value_avg",
        output="values",
        reads=("tokens", "completion_mask", "values", "value_targets"),
    )
    return DataflowGraph(
        rollout=call("policy", generate),
        reward=call(None if hp.rewards else "reward", score),
        reference=call("reference", reference, logprobs="ref_logprobs"),
        values=call("critic", Infer(output="values")),
        advantages=call(None, estimate),
        train_policy=call("policy", train_policy),
        train_critic=call("critic", train_critic),
    )
