"""RAFT: sample several completions, keep the best, and fine-tune on them.

    prompts ─▶ rollout ─▶ reward ─▶ selection ─▶ train_policy

Source: Dong et al. 2023, https://arxiv.org/abs/2304.06767, algorithm 1.
"""

import dataclasses
import functools

from realjax import rl
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.functions import Rollouts, Train, Transform
from realjax.rl import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class RAFT(Rollouts):
    """Hyperparameters, with those of `Rollouts`; `importance_cap` has no meaning here.

    Attributes:
        num_kept: completions of each prompt that are learned from.
        lowest_score: of a completion that is; None keeps the best, however bad.
    """

    completions_per_prompt: int = 8
    num_kept: int = 1
    lowest_score: float | None = None

    def __post_init__(self):
        """Refuses to keep none, or more than there are."""
        super().__post_init__()
        check_least(self, 1, "num_kept")
        if self.num_kept > self.completions_per_prompt:
            raise ValueError(
                f"num_kept is {self.num_kept} of completions_per_prompt ="
                f" {self.completions_per_prompt}. Keep as many or fewer."
            )
        if self.importance_cap:
            raise ValueError(
                "RAFT learns from what it keeps as from a data set: set importance_cap"
                f" to 0, not {self.importance_cap}."
            )


HYPERPARAMETERS = RAFT


def selection(batch, *, hp: RAFT):
    """The tokens of the best completions of every prompt."""
    mask = batch["completion_mask"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    shaped = rl.rewards.shape_scores(hp.score, batch["scores"], batch["is_truncated"])
    is_best = rl.advantages.best_of_group(
        shaped, counts, group_size=hp.completions_per_prompt, num_best=hp.num_kept
    )
    if hp.lowest_score is not None:
        is_best &= shaped >= hp.lowest_score
    return {"learned_mask": mask & is_best[:, None]}, {
        "objective/scores": Mean.over(batch["scores"], counts),
        "objective/best_scores": Mean.over(batch["scores"], is_best),
    }


def loss(logprobs, batch):
    """-log π(token), a mean over the tokens of what was kept."""
    mask = batch["learned_mask"]
    metrics = {"policy/entropy_avg": Mean.over(batch["entropy"], mask)}
    if "old_logprobs" in batch:
        metrics |= rl.importance.gap(logprobs, batch["old_logprobs"], mask)
    return Mean.over(-logprobs, mask), metrics


def graph(hp: RAFT) -> DataflowGraph:
    """Rollout, reward, selection, training."""
    select = Transform(
        fn=functools.partial(selection, hp=hp),
        reads=("completion_mask", "is_truncated", "scores"),
        writes=("learned_mask",),
    )
    # Of the whole vocabulary: what was sampled from a part of it is learned by all.
    # Where the sampler has all of it, too, their log-probabilities are the same thing.
    is_whole = hp.scored == ("tokens",) and hp.sampling.temperature == 1.0
    train = Train(
        loss=loss,
        reads=("tokens", *(("old_logprobs",) if is_whole else ()), "learned_mask"),
        only="learned_mask",
        **hp.steps(),
    )
    return DataflowGraph(
        rollout=call("policy", hp.generate(), staleness=hp.staleness),
        reward=call(*hp.reward()),
        selection=call(None, select),
        train_policy=call("policy", train),
    )
