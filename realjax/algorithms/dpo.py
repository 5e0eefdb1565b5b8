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
class Preference:
    """Hyperparameters of a loss on pairs; the defaults are the paper's.

    Attributes:
        beta: β, in 1 / nat.
        kind: of loss, see `rl.preferences.preference`.
        label_smoothing: ε, the share of labels that are taken for wrong.
        target_margin: γ, what the chosen answer shall be ahead by.
        has_reference: whether log-probabilities are seen against a reference's.
        is_per_token: whether they are divided by the answers' lengths.
    """

    beta: float = 0.1
    kind: preferences.PreferenceLoss = "sigmoid"
    label_smoothing: float = 0.0
    target_margin: float = 0.0
    has_reference: bool = True
    is_per_token: bool = False

    def __post_init__(self):
        """Refuses numbers that make no loss."""
        check_least(self, 0, "label_smoothing", "target_margin")
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0.")
        ignored = {
            "ipo": ("label_smoothing", "target_margin"),
            "hinge": ("label_smoothing",),
        }
        for name in ignored.get(self.kind, ()):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, and the loss of kind"
                    f" {self.kind!r} has none. Set it to 0, or choose another kind."
                )
        if self.label_smoothing >= 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; where half of the labels"
                " are wrong they say nothing. Set it below 0.5."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(Preference):
    """Hyperparameters, with those of `Preference`.

    Attributes:
        stores_reference: whether the reference's log-probabilities are computed once,
            before the first step, and kept beside the data set.
        minibatches: optimizer steps per batch.
    """

    stores_reference: bool = False
    minibatches: int = 1


HYPERPARAMETERS = DPO


def gained(logprobs, batch, *, hp: Preference):
    """What whole answers have gained on the reference, in nats, [B]."""
    if hp.has_reference:
        logprobs = logprobs - batch["ref_logprobs"]
    mask = batch["completion_mask"]
    return preferences.sequence_logprobs(logprobs, mask, is_per_token=hp.is_per_token)


def pair_loss(chosen, rejected, weights, *, hp: Preference):
    """The loss of pairs from what both sides have gained, a mean by weight."""
    margin, is_pair = chosen - rejected, weights > 0
    per_pair = preferences.preference(
        margin,
        beta=hp.beta,
        kind=hp.kind,
        label_smoothing=hp.label_smoothing,
        target_margin=hp.target_margin,
    )
    return Mean.over(per_pair, weights), {
        "accuracy": Mean.over(margin > 0, is_pair),
        "margin": Mean.over(hp.beta * margin, is_pair),
        "rewards/chosen": Mean.over(hp.beta * chosen, is_pair),
        "rewards/rejected": Mean.over(hp.beta * rejected, is_pair),
    }


def loss(logprobs, batch, *, hp: DPO):
    """Preference loss: a mean over prompts, each prompt's pairs sharing one."""
    mask, answers = batch["completion_mask"], gained(logprobs, batch, hp=hp)
    weights = batch["pair_weights"][::2]
    mean, metrics = pair_loss(*preferences.sides(answers), weights, hp=hp)
    nll = jnp.where(mask, -logprobs, 0.0)[::2]
    return mean, metrics | {"nll/chosen": Mean.over(nll, mask[::2])}


def stored_graph(hp: DPO) -> DataflowGraph | None:
    """What is computed once for all answers of the data set, if anything is."""
    if not (hp.has_reference and hp.stores_reference):
        return None
    return DataflowGraph(reference=call("reference", Infer(), logprobs="ref_logprobs"))


def graph(hp: DPO) -> DataflowGraph:
    """The reference's call, unless there is none or it is stored, and the training."""
    reads = ("tokens", "completion_mask", "pair_weights")
    reference = call("reference", Infer(), logprobs="ref_logprobs")
    train = Train(
        loss=functools.partial(loss, hp=hp),
        reads=(*reads, "ref_logprobs") if hp.has_reference else reads,
        minibatches=hp.minibatches,
        unit=2,
    )
    is_called = hp.has_reference and not hp.stores_reference
    return DataflowGraph(
        reference=reference if is_called else None,
        train_policy=call("policy", train),
    )
