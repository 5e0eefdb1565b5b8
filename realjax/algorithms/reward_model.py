"""Reward modelling: a scalar head learns to score the preferred answer higher.

    pairs ─▶ train_reward

Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1. Rows come in
pairs, the preferred answer first.
"""

import dataclasses

from realjax import rl
from realjax.dataflow import DataflowGraph, call
from realjax.functions import Train
from realjax.rl.masking import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Reward modelling has no hyperparameters beyond those of its optimizer."""


HYPERPARAMETERS = RewardModel


def loss(scores, batch):
    """-log σ(chosen - rejected): a mean over prompts, each prompt's pairs sharing one.

    ReaL sums over the prompts of a microbatch, which makes the gradient depend on how
    the batch was cut; a mean does not.
    """
    weights = batch["pair_weights"][::2]
    chosen, rejected = scores[::2], scores[1::2]
    is_pair = weights > 0
    return Mean.over(rl.losses.pairwise_logistic(scores), weights), {
        "accuracy": Mean.over(chosen > rejected, is_pair),
        "margin": Mean.over(chosen - rejected, is_pair),
        "rewards/chosen": Mean.over(chosen, is_pair),
        "rewards/rejected": Mean.over(rejected, is_pair),
    }


def graph(hp: RewardModel) -> DataflowGraph:
    """One call."""
    del hp
    return DataflowGraph(
        train_reward=call(
            "reward",
            Train(loss=loss, output="scores", reads=("tokens", "pair_weights"), unit=2),
        )
    )
