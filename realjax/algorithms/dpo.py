"""DPO: the policy is its own reward model, and learns from pairs of answers.

    pairs ─▶ reference ─▶ train_policy

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290. IPO, hinge, robust and
conservative losses are options of `kind` and `label_smoothing`; SimPO (Meng et al.
2024, https://arxiv.org/abs/2405.14734) is `has_reference=False, is_per_token=True` and
a `target_margin`. Rows come in pairs, the preferred answer first.
"""

import dataclasses
import functools

import jax.numpy as jnp

from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.functions import Infer, Train
from realjax.rl import preferences
from realjax.rl.masking import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO:
    """Hyperparameters; the defaults are the paper's.

    Attributes:
        beta: β, in 1 / nat.
        kind: of loss, see `rl.preferences.preference`.
        label_smoothing: ε, the share of labels that are taken for wrong.
        target_margin: γ, what the chosen answer shall be ahead by.
        has_reference: whether log-probabilities are seen against a reference's.
        is_per_token: whether they are divided by the answers' lengths.
        minibatches: optimizer steps per batch.
    """

    beta: float = 0.1
    kind: preferences.PreferenceLoss = "sigmoid"
    label_smoothing: float = 0.0
    target_margin: float = 0.0
    has_reference: bool = True
    is_per_token: bool = False
    minibatches: int = 1

    def __post_init__(self):
        """Refuses numbers that make no loss."""
        check_least(self, 0, "label_smoothing", "target_margin")
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0.")
        if self.label_smoothing >= 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; where half of the labels"
                " are wrong they say nothing. Set it below 0.5."
            )


HYPERPARAMETERS = DPO


def loss(logprobs, batch, *, hp: DPO):
    """Preference loss: a mean over prompts, each prompt's pairs sharing one."""
    mask, weights = batch["completion_mask"], batch["pair_weights"][::2]
    whole = functools.partial(
        preferences.sequence_logprobs, mask=mask, is_per_token=hp.is_per_token
    )
    gained = whole(logprobs)
    if hp.has_reference:
        gained -= whole(batch["ref_logprobs"])
    margin = preferences.margins(gained)
    per_pair = preferences.preference(
        margin,
        beta=hp.beta,
        kind=hp.kind,
        label_smoothing=hp.label_smoothing,
        target_margin=hp.target_margin,
    )
    is_pair = weights > 0
    nll = jnp.where(mask, -logprobs, 0.0)[::2]
    return Mean.over(per_pair, weights), {
        "accuracy": Mean.over(margin > 0, is_pair),
        "margin": Mean.over(hp.beta * margin, is_pair),
        "rewards/chosen": Mean.over(hp.beta * gained[::2], is_pair),
        "rewards/rejected": Mean.over(hp.beta * gained[1::2], is_pair),
        "nll/chosen": Mean.over(nll, mask[::2]),
    }


def graph(hp: DPO) -> DataflowGraph:
    """The reference's call, if there is one, and the training."""
    reads = ("tokens", "completion_mask", "pair_weights")
    reference = {"reference": call("reference", Infer(), logprobs="ref_logprobs")}
    train = Train(
        loss=functools.partial(loss, hp=hp),
        reads=(*reads, "ref_logprobs") if hp.has_reference else reads,
        minibatches=hp.minibatches,
        unit=2,
    )
    return DataflowGraph(
        **(reference if hp.has_reference else {}),
        train_policy=call("policy", train),
    )
