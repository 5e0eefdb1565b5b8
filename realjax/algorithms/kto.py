"""KTO: the policy learns from completions that are labelled desirable or not.

    labels ─┬─▶ reference ────────────────────────────┐
            ├─▶ mismatched_reference ─┐               ▼
            └─▶ mismatched_policy ────┴─▶ kl ─▶ train_policy

Source: Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306. What a completion has
gained is seen against the KL from the reference, as prompts with another's completion
tell it. The paper measures that anew in every microbatch, with those of the microbatch;
here it is measured once a step, before training, over the whole batch, with completions
that the data set has put to other prompts: so the loss does not depend on how the batch
is cut, and the reference's part can be stored.
"""

import dataclasses
import functools

import jax.numpy as jnp

from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.functions import Infer, Train, Transform
from realjax.rl import preferences
from realjax.rl.masking import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTO:
    """Hyperparameters.

    Attributes:
        beta: β, in 1 / nat.
        desirable_weight: λ_D. Where the data has more of one label, the weights are to
            make up for it: λ_D times the desirable ones about λ_U times the others.
        undesirable_weight: λ_U.
        stores_reference: whether the reference's log-probabilities are computed once,
            before the first step, and kept beside the data set.
        minibatches: optimizer steps per batch.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    stores_reference: bool = False
    minibatches: int = 1

    def __post_init__(self):
        """Refuses numbers that make no loss."""
        check_least(self, 0, "desirable_weight", "undesirable_weight")
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0.")


HYPERPARAMETERS = KTO


def divergence(batch):
    """The KL from the reference, as mismatched completions tell it, in every row."""
    mask = batch["completion_mask"]
    is_real, place = mask.any(axis=1), jnp.arange(mask.shape[1])[None, :]
    first = jnp.argmax(mask, axis=1)[:, None]  # They follow the same prompt.
    is_other = (place >= first) & (place < batch["mismatched_lengths"][:, None])
    gained = batch["mismatched_logprobs"] - batch["mismatched_ref_logprobs"]
    kl = Mean.over(preferences.sequence_logprobs(gained, is_other), is_real)
    return {"kl": jnp.full(is_real.shape, kl.value())}, {"objective/kl": kl}


def loss(logprobs, batch, *, hp: KTO):
    """The prospect's loss, a mean over completions."""
    mask, is_desirable = batch["completion_mask"], batch["is_desirable"]
    is_real = mask.any(axis=1)
    gained = preferences.sequence_logprobs(logprobs - batch["ref_logprobs"], mask)
    each = preferences.prospect(
        gained,
        is_desirable,
        kl=batch["kl"],
        beta=hp.beta,
        desirable_weight=hp.desirable_weight,
        undesirable_weight=hp.undesirable_weight,
    )
    is_ahead = gained > jnp.maximum(batch["kl"], 0.0)  # As the loss has it.
    rewards, is_right = hp.beta * gained, is_ahead == is_desirable
    return Mean.over(each, is_real), {
        "accuracy": Mean.over(is_right, is_real),
        "rewards/desirable": Mean.over(rewards, is_real & is_desirable),
        "rewards/undesirable": Mean.over(rewards, is_real & ~is_desirable),
    }


def stored_graph(hp: KTO) -> DataflowGraph | None:
    """What is computed once for all completions of the data set, if anything is."""
    if not hp.stores_reference:
        return None
    return DataflowGraph(reference=call("reference", Infer(), logprobs="ref_logprobs"))


def graph(hp: KTO) -> DataflowGraph:
    """The reference's calls unless stored, the policy's on mismatches, training."""
    keys = ("lengths", "logprobs", "ref_logprobs")
    estimate = Transform(
        fn=divergence,
        reads=("completion_mask", *(f"mismatched_{key}" for key in keys)),
        writes=("kl",),
    )
    train = Train(
        loss=functools.partial(loss, hp=hp),
        reads=("tokens", "completion_mask", "is_desirable", "ref_logprobs", "kl"),
        minibatches=hp.minibatches,
    )
    of_policy, of_reference = Infer(is_as_trained=True), Infer()
    other, logprobs = "mismatched_tokens", "mismatched_ref_logprobs"
    reference = call("reference", of_reference, logprobs="ref_logprobs")
    on_others = call("reference", of_reference, tokens=other, logprobs=logprobs)
    is_called = not hp.stores_reference
    return DataflowGraph(
        reference=reference if is_called else None,
        mismatched_reference=on_others if is_called else None,
        mismatched_policy=call(
            "policy", of_policy, tokens=other, logprobs="mismatched_logprobs"
        ),
        kl=call(None, estimate),
        train_policy=call("policy", train),
    )
