"""GRPO: a policy learns from the scores of several completions of each prompt.

    prompts ─▶ rollout ─┬─▶ reward ────┬─▶ advantages ─▶ train_policy
                        └─▶ reference ─┘

Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300. No critic: a completion is
as good as its score is above the mean of its group. Variants are options:

    Dr. GRPO   scales_advantages=False, mean_over="constant"        arXiv 2503.20783
    DAPO       clip_higher=0.28, mean_over="tokens", kl_coef=0,     arXiv 2503.14476
               overlong_margin, filters_truncated, oversampling
    GSPO       ratio="sequence"                                     arXiv 2507.18071
    REINFORCE  completions_per_prompt=1
"""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp

from realjax import rl
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call, following
from realjax.functions import SAMPLED, Rollouts, Transform
from realjax.rl import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(Rollouts):
    """Hyperparameters, with those of `Rollouts`; the paper's where it gives them.

    Attributes:
        overlong_margin: tokens before the longest length over which scores fall by 1.
        filters_truncated: whether completions without an end teach nothing.
        oversampling: of the batch's groups one in so many is learned from: the first
            whose scores differ. 1 learns from all.
        scales_advantages: whether a group's deviation divides them.
        kl_coef: β of the KL to the reference, nats per token; 0 needs no reference.
        kl_estimator: of that KL, see `rl.kl`.
        kl_in: "loss", or "reward": taken off the score, over the whole completion.
        ratio: "token", or "sequence": one importance ratio for a completion.
        clip_ratio, clip_higher: ε below and above; None is the same above.
        mean_over: see `rl.losses.mean_of_tokens`.
        reference_ema: η, by which the reference follows the policy after every step.
    """

    completions_per_prompt: int = 8
    overlong_margin: int = 0
    filters_truncated: bool = False
    oversampling: int = 1
    scales_advantages: bool = True
    kl_coef: float = 0.04
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    ratio: Literal["token", "sequence"] = "token"
    clip_ratio: float = 0.2
    clip_higher: float | None = None
    mean_over: Literal["tokens", "sequences", "constant"] = "sequences"
    reference_ema: float = 0.0

    def __post_init__(self):
        """Refuses numbers below 0."""
        super().__post_init__()
        check_least(self, 0, "kl_coef", "overlong_margin")
        check_least(self, 1, "oversampling")


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
        logprobs = batch["old_logprobs"], batch["ref_logprobs"]
        kl, metrics["objective/kl"] = rl.kl.of_completions(
            *logprobs, mask, estimator=hp.kl_estimator
        )
        if hp.kl_in == "reward":
            shaped -= hp.kl_coef * kl.sum(axis=1)
    group = hp.completions_per_prompt
    estimates = rl.advantages.group_relative(
        shaped, counts, group_size=group, is_scaled=hp.scales_advantages
    )
    differing = functools.partial(
        rl.advantages.differing_groups, batch["scores"], counts, group_size=group
    )
    metrics["objective/useful_groups"] = Mean.over(differing(), counts)
    learned = mask & ~(is_truncated & hp.filters_truncated)[:, None]
    if hp.oversampling > 1:
        wanted = -(-len(shaped) // (group * hp.oversampling))
        learned &= differing(num_groups=wanted)[:, None]
    outputs = {"advantages": jnp.where(mask, estimates[:, None], 0.0)}
    return outputs | {"learned_mask": learned}, metrics


def policy_loss(logprobs, batch, *, hp: GRPO):
    """Clipped surrogate with its KL, a mean as `mean_over` says."""
    mask, advantages = batch["learned_mask"], batch["advantages"]
    log_ratio, weights, metrics = rl.importance.parted(
        logprobs, batch, cap=hp.importance_cap
    )
    if hp.ratio == "sequence":
        log_ratio = rl.losses.sequence_log_ratio(log_ratio, mask)
    loss, clipped = rl.losses.clipped_surrogate(
        log_ratio, advantages, clip_ratio=hp.clip_ratio, clip_higher=hp.clip_higher
    )
    loss *= weights
    if hp.kl_coef and hp.kl_in == "loss":
        estimate = rl.kl.ESTIMATORS[hp.kl_estimator]
        loss += hp.kl_coef * estimate(logprobs, batch["ref_logprobs"])
    metrics |= rl.losses.surrogate_metrics(log_ratio, clipped, batch["entropy"], mask)
    longest = hp.sampling.max_new_tokens
    mean = rl.losses.mean_of_tokens(loss, mask, over=hp.mean_over, longest=longest)
    return mean, metrics


def graph(hp: GRPO) -> DataflowGraph:
    """Rollout, reward, reference (unless `kl_coef` is 0), advantages, training."""
    against = ("ref_logprobs",) if hp.kl_coef else ()
    proximal = ("proximal_logprobs",) if hp.importance_cap else ()
    learned = ("advantages", "learned_mask")
    estimate = Transform(
        fn=functools.partial(advantages, hp=hp),
        reads=(*SAMPLED, *against),
        writes=learned,
    )
    reads = ("completion_mask", "old_logprobs", *learned, *against, *proximal)
    loss = functools.partial(policy_loss, hp=hp)
    only = "learned_mask" if hp.oversampling > 1 else ""
    before = hp.infer(is_as_trained=True)
    reference = call("reference", hp.infer(), logprobs="ref_logprobs")
    return DataflowGraph(
        rollout=call("policy", hp.generate(), staleness=hp.staleness),
        reward=call(*hp.reward()),
        reference=reference if hp.kl_coef else None,
        advantages=call(None, estimate),
        proximal=call("policy", before, logprobs=proximal[0]) if proximal else None,
        train_policy=call("policy", hp.train(loss, reads, only=only)),
        **following("reference", source="policy", weight=hp.reference_ema),
    )
