"""GRPO: a policy learns from the scores of several completions of each prompt.

    prompts ─▶ rollout ─┬─▶ reward ────┬─▶ advantages ─▶ train_policy
                        └─▶ reference ─┘

Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300. No critic: a completion is
as good as its score is above the mean of its group. Variants are options:

    Dr. GRPO   scales_advantages=False, mean_over="constant"        arXiv 2503.20783
    DAPO       clip_higher=0.28, mean_over="tokens", kl_coef=0,     arXiv 2503.14476
               overlong_margin, filters_truncated
    GSPO       ratio="sequence"                                     arXiv 2507.18071
    REINFORCE  completions_per_prompt=1
"""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp

from realjax import functions, rl
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call, following
from realjax.rl import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO:
    """Hyperparameters; the defaults are the paper's where it gives them.

    Attributes:
        sampling: how completions are drawn.
        completions_per_prompt: G, the group.
        rewards: Python functions of the text; empty means the reward role's scores.
        score: scaling, bias and clipping of scores; what truncated completions get.
        overlong_margin: tokens before the longest length over which scores fall by 1.
        filters_truncated: whether completions without an end teach nothing.
        scales_advantages: whether a group's deviation divides them.
        kl_coef: β of the KL to the reference, nats per token; 0 needs no reference.
        kl_estimator: of that KL, see `rl.kl`.
        kl_in: "loss", or "reward": taken off the score, over the whole completion.
        ratio: "token", or "sequence": one importance ratio for a completion.
        clip_ratio, clip_higher: ε below and above; None is the same above.
        mean_over: see `rl.losses.mean_of_tokens`.
        minibatches, epochs, shuffle: optimizer steps per rollout and their order.
        reference_ema: η, by which the reference follows the policy after every step.
        delivery: of the rollout, in portions or up to a budget of tokens.
    """

    sampling: rl.Sampling = rl.Sampling(max_new_tokens=256)
    completions_per_prompt: int = 8
    rewards: tuple[functions.RewardFunction, ...] = ()
    score: rl.ScoreShaping = rl.ScoreShaping(truncated="keep")
    overlong_margin: int = 0
    filters_truncated: bool = False
    scales_advantages: bool = True
    kl_coef: float = 0.04
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    ratio: Literal["token", "sequence"] = "token"
    clip_ratio: float = 0.2
    clip_higher: float | None = None
    mean_over: Literal["tokens", "sequences", "constant"] = "sequences"
    minibatches: int = 1
    epochs: int = 1
    shuffle: bool = False
    reference_ema: float = 0.0
    delivery: functions.Delivery = functions.Delivery()

    def __post_init__(self):
        """Refuses numbers below 0."""
        check_least(self, 0, "kl_coef", "overlong_margin")


HYPERPARAMETERS = GRPO


def advantages(batch, *, hp: GRPO):
    """One advantage per completion, at each of its tokens, and what to report."""
    mask, is_truncated = batch["completion_mask"], batch["is_truncated"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    shaped = rl.rewards.shape_scores(hp.score, batch["scores"], is_truncated)
    shaped += rl.rewards.overlong_penalty(
        mask.sum(axis=1).astype(jnp.float32),
        longest=hp.sampling.max_new_tokens,
        margin=hp.overlong_margin,
    )
    metrics = {"objective/scores": Mean.over(batch["scores"], counts)}
    if hp.kl_coef:
        estimate = rl.kl.ESTIMATORS[hp.kl_estimator]
        kl = estimate(batch["old_logprobs"], batch["ref_logprobs"])
        kl = jnp.where(mask, kl, 0.0).sum(axis=1)
        metrics["objective/kl"] = Mean.over(kl, counts)
        if hp.kl_in == "reward":
            shaped -= hp.kl_coef * kl
    estimates = rl.advantages.group_relative(
        shaped,
        counts,
        group_size=hp.completions_per_prompt,
        is_scaled=hp.scales_advantages,
    )
    metrics["objective/useful_groups"] = Mean.over(estimates != 0, counts)
    learned = mask & ~(is_truncated & hp.filters_truncated)[:, None]
    outputs = {"advantages": jnp.where(mask, estimates[:, None], 0.0)}
    return outputs | {"learned_mask": learned}, metrics


def policy_loss(logprobs, batch, *, hp: GRPO):
    """Clipped surrogate with its KL, a mean as `mean_over` says."""
    mask, old_logprobs = batch["learned_mask"], batch["old_logprobs"]
    log_ratio = logprobs - old_logprobs
    if hp.ratio == "sequence":
        log_ratio = rl.losses.sequence_log_ratio(logprobs, old_logprobs, mask)
    loss, clipped = rl.losses.clipped_surrogate(
        log_ratio,
        jnp.zeros_like(log_ratio),
        batch["advantages"],
        clip_ratio=hp.clip_ratio,
        clip_higher=hp.clip_higher,
    )
    if hp.kl_coef and hp.kl_in == "loss":
        estimate = rl.kl.ESTIMATORS[hp.kl_estimator]
        loss += hp.kl_coef * estimate(logprobs, batch["ref_logprobs"])
    metrics = rl.importance.gap(logprobs, old_logprobs, mask)
    metrics |= rl.losses.surrogate_metrics(log_ratio, clipped, batch["entropy"], mask)
    longest = hp.sampling.max_new_tokens
    mean = rl.losses.mean_of_tokens(loss, mask, over=hp.mean_over, longest=longest)
    return mean, metrics


def graph(hp: GRPO) -> DataflowGraph:
    """Rollout, reward, reference (unless `kl_coef` is 0), advantages, training."""
    bind, has_reference = functools.partial, hp.kl_coef > 0
    generate = functions.Generate(
        sampling=hp.sampling,
        completions_per_prompt=hp.completions_per_prompt,
        delivery=hp.delivery,
    )
    by_text, by_model = functions.Score(rewards=hp.rewards), functions.Infer
    scored = ("tokens", "kept") if functions.is_filtered(hp.sampling) else ("tokens",)
    against = ("ref_logprobs",) if has_reference else ()
    rollout = ("completion_mask", "is_truncated", "old_logprobs", "scores")
    estimate = functions.Transform(
        fn=bind(advantages, hp=hp),
        reads=(*rollout, *against),
        writes=("advantages", "learned_mask"),
    )
    train = functions.Train(
        loss=bind(policy_loss, hp=hp),
        loss_name="loss/policy_avg",
        reads=(*scored, "learned_mask", "old_logprobs", "advantages", *against),
        temperature=hp.sampling.temperature,
        minibatches=hp.minibatches,
        epochs=hp.epochs,
        shuffle=hp.shuffle,
    )
    reference = functions.Infer(reads=scored, temperature=hp.sampling.temperature)
    calls = {"rollout": call("policy", generate)}
    if hp.rewards:
        calls["reward"] = call(None, by_text)
    else:
        calls["reward"] = call("reward", by_model(output="scores"))
    if has_reference:
        calls["reference"] = call("reference", reference, logprobs="ref_logprobs")
        ema = hp.reference_ema
        calls |= following("reference", source="policy", weight=ema)
    return DataflowGraph(
        **calls, advantages=call(None, estimate), train_policy=call("policy", train)
    )
