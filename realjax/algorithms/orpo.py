"""ORPO: supervised fine-tuning that also turns away from the rejected answer.

    pairs ─▶ train_policy

Source: Hong et al. 2024, https://arxiv.org/abs/2403.07691. No reference: the odds of
the two answers are compared with each other. Rows come in pairs, the preferred first.
"""

import dataclasses
import functools

from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.functions import Train
from realjax.rl import preferences
from realjax.rl.masking import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ORPO:
    """Hyperparameters.

    Attributes:
        odds_weight: λ, of the odds' ratio beside the likelihood of the chosen answer.
        minibatches: optimizer steps per batch.
    """

    odds_weight: float = 0.1
    minibatches: int = 1

    def __post_init__(self):
        """Refuses a weight below 0."""
        check_least(self, 0, "odds_weight")


HYPERPARAMETERS = ORPO


def loss(logprobs, batch, *, hp: ORPO):
    """L_SFT + λ L_OR (equation 6): a mean over prompts, their pairs sharing one."""
    mask, weights = batch["completion_mask"], batch["pair_weights"][::2]
    mean = preferences.sequence_logprobs(logprobs, mask, is_per_token=True)
    ratio = preferences.margins(preferences.log_odds(mean))
    odds_loss = preferences.preference(ratio, beta=1.0)  # equation 7
    likelihood_loss = -mean[::2]
    is_pair = weights > 0
    return Mean.over(likelihood_loss + hp.odds_weight * odds_loss, weights), {
        "accuracy": Mean.over(ratio > 0, is_pair),
        "log_odds_ratio": Mean.over(ratio, is_pair),
        "nll/chosen": Mean.over(likelihood_loss, is_pair),
    }


def graph(hp: ORPO) -> DataflowGraph:
    """One call."""
    train = Train(
        loss=functools.partial(loss, hp=hp),
        reads=("tokens", "completion_mask", "pair_weights"),
        minibatches=hp.minibatches,
        unit=2,
    )
    return DataflowGraph(train_policy=call("policy", train))
