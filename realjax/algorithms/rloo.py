"""RLOO: REINFORCE whose baseline is the mean score of a prompt's other completions.

    prompts ─▶ rollout ─┬─▶ reward ────┬─▶ advantages ─▶ train_policy
                        └─▶ reference ─┘

Source: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740: a completion is one
action, and the KL to the reference is part of its score.
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
class RLOO(Rollouts):
    """Hyperparameters, with those of `Rollouts`; of a group there are at least 2.

    Attributes:
        kl_coef: β of the KL to the reference, in score per nat; 0 needs no reference.
    """

    completions_per_prompt: int = 4
    kl_coef: float = 0.05

    def __post_init__(self):
        """Refuses a weight below 0 and a group that leaves no others."""
        super().__post_init__()
        check_least(self, 0, "kl_coef")
        check_least(self, 2, "completions_per_prompt")


HYPERPARAMETERS = RLOO


def advantages(batch, *, hp: RLOO):
    """One advantage per completion (equation 8), at each of its tokens."""
    mask = batch["completion_mask"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    shaped = rl.rewards.shape_scores(hp.score, batch["scores"], batch["is_truncated"])
    metrics = {"objective/scores": Mean.over(batch["scores"], counts)}
    if hp.kl_coef:
        kl, metrics["objective/kl"] = rl.kl.of_completions(
            batch["old_logprobs"], batch["ref_logprobs"], mask
        )
        shaped -= hp.kl_coef * kl.sum(axis=1)
    group = hp.completions_per_prompt
    estimates = rl.advantages.leave_one_out(shaped, counts, group_size=group)
    return {"advantages": jnp.where(mask, estimates[:, None], 0.0)}, metrics


def policy_loss(logprobs, batch, *, hp: RLOO):
    """-A log π(y), a mean over completions (equation 6)."""
    return rl.losses.policy_gradient(logprobs, batch, cap=hp.importance_cap)


def graph(hp: RLOO) -> DataflowGraph:
    """Rollout, reward, reference (unless `kl_coef` is 0), advantages, training."""
    bind, against = functools.partial, ("ref_logprobs",) if hp.kl_coef else ()
    reference = call("reference", hp.infer(), logprobs="ref_logprobs")
    estimate = Transform(
        fn=bind(advantages, hp=hp), reads=(*SAMPLED, *against), writes=("advantages",)
    )
    reads = ("completion_mask", "old_logprobs", "advantages")
    train = hp.train(bind(policy_loss, hp=hp), reads)
    return DataflowGraph(
        rollout=call("policy", hp.generate(), staleness=hp.staleness),
        reward=call(*hp.reward()),
        reference=reference if hp.kl_coef else None,
        advantages=call(None, estimate),
        train_policy=call("policy", train),
    )
