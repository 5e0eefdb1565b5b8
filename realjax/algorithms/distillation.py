"""Distillation: a policy learns the likeliest next tokens of a larger one.

    records ────────────▶ teacher ─▶ train_policy
    prompts ─▶ rollout ─▶ teacher ─▶ train_policy    on-policy

Sources: Hinton et al. 2015, https://arxiv.org/abs/1503.02531; on what the policy itself
has sampled, Agarwal et al. 2024 (GKD), https://arxiv.org/abs/2306.13649, section 3,
with λ = 1. The divergence is KL(teacher ‖ policy), and no gradient goes through the
sampling. Teacher and policy share a tokenizer; of the teacher's distribution over each
next token, the K likeliest are kept: [B, T, K] and no array of the vocabulary.
"""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp

from realjax import rl
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.functions import Infer, Rollouts, Train
from realjax.rl import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Rollouts):
    """Hyperparameters; those of `Rollouts` that score have no meaning here.

    Attributes:
        num_top: K, the teacher's likeliest tokens at every place.
        rest: what is made of all others, see `rl.distillation.forward_kl`.
        temperature: divides the logits of both, in the divergence and what is reported
            beside it; completions are drawn as `sampling` says.
        is_on_policy: whether completions are sampled by the policy, or the data's.
    """

    num_top: int = 64
    rest: Literal["bucket", "left_out"] = "bucket"
    temperature: float = 1.0
    is_on_policy: bool = False

    def __post_init__(self):
        """Refuses to look at no token, and what needs scores."""
        super().__post_init__()
        check_least(self, 1, "num_top")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")
        if self.rewards or self.importance_cap:
            raise ValueError(
                "Distillation has no scores, and learns from what it samples as from a"
                " data set: leave out rewards and importance_cap."
            )


HYPERPARAMETERS = Distillation


def loss(top_logprobs, batch, *, hp: Distillation):
    """KL(teacher ‖ policy), a mean over completion tokens."""
    mask, teacher = batch["completion_mask"], batch["teacher_logprobs"]
    kl = rl.distillation.forward_kl(top_logprobs, teacher, rest=hp.rest)
    covered = jnp.exp(teacher).sum(axis=-1)
    return Mean.over(kl, mask), {
        "nll": Mean.over(-batch["logprobs"], mask),
        "entropy": Mean.over(batch["entropy"], mask),
        "teacher/covered": Mean.over(covered, mask),
    }


def graph(hp: Distillation) -> DataflowGraph:
    """The rollout, if on-policy, the teacher's call, and the training."""
    tops = Infer(output="top_logprobs", num_top=hp.num_top, temperature=hp.temperature)
    train = Train(
        loss=functools.partial(loss, hp=hp),
        output="top_logprobs",
        reads=("tokens", "completion_mask", "top_ids", "teacher_logprobs"),
        temperature=hp.temperature,
        **hp.steps(),
    )
    rollout = call("policy", hp.generate(), staleness=hp.staleness)
    return DataflowGraph(
        rollout=rollout if hp.is_on_policy else None,
        teacher=call("teacher", tops, top_logprobs="teacher_logprobs"),
        train_policy=call("policy", train),
    )
