"""ReMax: REINFORCE whose baseline is the score of the greedy completion.

    prompts ─┬─▶ rollout ──┬─▶ reward ───────────┬─▶ advantages ─▶ train_policy
             │             └─▶ reference ────────┤
             └─▶ baseline ───▶ reward_baseline ──┘

Source: Li et al. 2023, https://arxiv.org/abs/2310.10505, algorithm 2. Two calls
generate; the greedy completions are scored and not learned from.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from realjax import rl
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.functions import SAMPLED, Delivery, Rollouts, Transform
from realjax.rl import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReMax(Rollouts):
    """Hyperparameters, with those of `Rollouts`.

    Attributes:
        kl_coef: β of the KL to the reference, in score per nat; 0 needs no reference.
    """

    kl_coef: float = 0.05

    def __post_init__(self):
        """Refuses a weight below 0, and groups: a baseline is of one completion."""
        super().__post_init__()
        check_least(self, 0, "kl_coef")
        if self.completions_per_prompt != 1 or self.delivery != Delivery():
            raise ValueError(
                f"completions_per_prompt is {self.completions_per_prompt} and delivery"
                f" is {self.delivery}. ReMax sets each completion beside the greedy one"
                " of its prompt: leave both as they are, or take rloo."
            )


HYPERPARAMETERS = ReMax


def advantages(batch, *, hp: ReMax):
    """r(y) - r(greedy), at each token less the KL that is still to come (eq. 8)."""
    mask = batch["completion_mask"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    shape = functools.partial(rl.rewards.shape_scores, hp.score)
    scores = shape(batch["scores"], batch["is_truncated"])
    baselines = shape(batch["greedy_scores"], batch["greedy_is_truncated"])
    estimates = jnp.where(mask, (scores - baselines)[:, None], 0.0)
    metrics = {
        "objective/scores": Mean.over(batch["scores"], counts),
        "objective/greedy_scores": Mean.over(batch["greedy_scores"], counts),
    }
    if hp.kl_coef:
        kl, metrics["objective/kl"] = rl.kl.of_completions(
            batch["old_logprobs"], batch["ref_logprobs"], mask
        )
        estimates -= hp.kl_coef * rl.advantages.to_come(kl, mask)
    return {"advantages": estimates}, metrics


def policy_loss(logprobs, batch, *, hp: ReMax):
    """-Σ A_t log π(y_t), a mean over completions."""
    return rl.losses.policy_gradient(logprobs, batch, cap=hp.importance_cap)


def graph(hp: ReMax) -> DataflowGraph:
    """Two rollouts and their rewards, reference, advantages, training."""
    bind, against = functools.partial, ("ref_logprobs",) if hp.kl_coef else ()
    greedy, (role, score) = hp.generate(greedy=True), hp.reward()
    of_greedy: dict[str, Any] = {key: f"greedy_{key}" for key in greedy.writes}
    read = {key: of_greedy[key] for key in score.reads}
    reference = call("reference", hp.infer(), logprobs="ref_logprobs")
    estimate = Transform(
        fn=bind(advantages, hp=hp),
        reads=(*SAMPLED, "greedy_scores", "greedy_is_truncated", *against),
        writes=("advantages",),
    )
    reads = ("completion_mask", "old_logprobs", "advantages")
    return DataflowGraph(
        rollout=call("policy", hp.generate(), staleness=hp.staleness),
        baseline=call("policy", greedy, staleness=hp.staleness, **of_greedy),
        reward=call(role, score),
        reward_baseline=call(role, score, **read, scores="greedy_scores"),
        reference=reference if hp.kl_coef else None,
        advantages=call(None, estimate),
        train_policy=call("policy", hp.train(bind(policy_loss, hp=hp), reads)),
    )
