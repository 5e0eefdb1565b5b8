"""Supervised fine-tuning: the mean negative log-likelihood of the answers' tokens.

records ─▶ train_policy
"""

import dataclasses

import jax.numpy as jnp

from realjax.dataflow import DataflowGraph, call
from realjax.functions import Train
from realjax.rl.masking import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT:
    """Supervised fine-tuning has no hyperparameters beyond those of its optimizer."""


HYPERPARAMETERS = SFT


def loss(logprobs, batch):
    """-log π(token), a mean over answer tokens; `ppl` is a mean over sequences."""
    mask = batch["completion_mask"]
    per_sequence = jnp.sum(-logprobs * mask, axis=1) / jnp.maximum(mask.sum(axis=1), 1)
    return Mean.over(-logprobs, mask), {
        "ppl": Mean.over(jnp.exp(per_sequence), mask.any(axis=1)),
        "entropy": Mean.over(batch["entropy"], mask),
    }


def graph(hp: SFT) -> DataflowGraph:
    """One call."""
    del hp
    return DataflowGraph(
        train_policy=call(
            "policy", Train(loss=loss, reads=("tokens", "completion_mask"))
        )
    )
