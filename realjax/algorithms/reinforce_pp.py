"""REINFORCE++: PPO's clipped updates with advantages normalised over the whole batch.

    prompts ─▶ rollout ─┬─▶ reward ────┬─▶ advantages ─▶ train_policy
                        └─▶ reference ─┘

Source: Hu et al. 2025, https://arxiv.org/abs/2501.03262. No critic. With
`completions_per_prompt` above 1 it is the form with a baseline: the mean score of a
prompt's completions comes off first.
"""

import dataclasses
import functools

import jax.numpy as jnp

from realjax import rl
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.functions import SAMPLED, Rollouts, Transform
from realjax.rl import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(Rollouts):
    """Hyperparameters, with those of `Rollouts`; a group above 1 has a baseline.

    Attributes:
        kl_coef: β of the KL to the reference, in score per nat; 0 needs no reference.
        clip_ratio: ε of the policy loss.
    """

    kl_coef: float = 0.01
    clip_ratio: float = 0.2

    def __post_init__(self):
        """Refuses numbers below 0."""
        super().__post_init__()
        check_least(self, 0, "kl_coef", "clip_ratio")


HYPERPARAMETERS = ReinforcePlusPlus


def advantages(batch, *, hp: ReinforcePlusPlus):
    """Score, less the KL still to come (equation 9), whitened over all tokens."""
    mask = batch["completion_mask"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    shaped = rl.rewards.shape_scores(hp.score, batch["scores"], batch["is_truncated"])
    metrics = {"objective/scores": Mean.over(batch["scores"], counts)}
    centred = rl.advantages.group_relative(
        shaped, counts, group_size=hp.completions_per_prompt, is_scaled=False
    )
    estimates = jnp.where(mask, centred[:, None], 0.0)
    if hp.kl_coef:
        kl, metrics["objective/kl"] = rl.kl.of_completions(
            batch["old_logprobs"], batch["ref_logprobs"], mask
        )
        estimates -= hp.kl_coef * rl.advantages.to_come(kl, mask)
    return {"advantages": rl.masking.whiten(estimates, mask)}, metrics


def policy_loss(logprobs, batch, *, hp: ReinforcePlusPlus):
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


def graph(hp: ReinforcePlusPlus) -> DataflowGraph:
    """Rollout, reward, reference (unless `kl_coef` is 0), advantages, training."""
    bind, against = functools.partial, ("ref_logprobs",) if hp.kl_coef else ()
    reference = call("reference", hp.infer(), logprobs="ref_logprobs")
    before = hp.infer(is_as_trained=True)
    proximal = ("proximal_logprobs",) if hp.importance_cap else ()
    estimate = Transform(
        fn=bind(advantages, hp=hp), reads=(*SAMPLED, *against), writes=("advantages",)
    )
    reads = ("completion_mask", "old_logprobs", "advantages", *proximal)
    return DataflowGraph(
        rollout=call("policy", hp.generate(), staleness=hp.staleness),
        reward=call(*hp.reward()),
        reference=reference if hp.kl_coef else None,
        advantages=call(None, estimate),
        proximal=call("policy", before, logprobs=proximal[0]) if proximal else None,
        train_policy=call("policy", hp.train(bind(policy_loss, hp=hp), reads)),
    )
