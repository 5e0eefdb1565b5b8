"""RAFT: sample several completions, keep the best, and fine-tune on them.

    prompts ─▶ rollout ─▶ reward ─▶ selection ─▶ train_policy

Source: Dong et al. 2023, https://arxiv.org/abs/2304.06767, algorithm 1.
"""

import dataclasses
import functools

from realjax import functions, rl
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.rl import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class RAFT:
    """Hyperparameters.

    Attributes:
        sampling: how completions are drawn.
        completions_per_prompt: K, of which some are kept.
        num_kept: completions of each prompt that are learned from.
        rewards: Python functions of the text; empty means the reward role's scores.
        score: scaling, bias and clipping of scores; what truncated completions get.
        minibatches, epochs: optimizer steps per rollout.
        delivery: of the rollout, in portions or up to a budget of tokens.
    """

    sampling: rl.Sampling = rl.Sampling(max_new_tokens=256)
    completions_per_prompt: int = 8
    num_kept: int = 1
    rewards: tuple[functions.RewardFunction, ...] = ()
    score: rl.ScoreShaping = rl.ScoreShaping(truncated="keep")
    minibatches: int = 1
    epochs: int = 1
    delivery: functions.Delivery = functions.Delivery()

    def __post_init__(self):
        """Refuses to keep none, or more than there are."""
        check_least(self, 1, "num_kept")
        if self.num_kept > self.completions_per_prompt:
            raise ValueError(
                f"num_kept is {self.num_kept} of completions_per_prompt ="
                f" {self.completions_per_prompt}. Keep as many or fewer."
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
    return {"learned_mask": mask & is_best[:, None]}, {
        "objective/scores": Mean.over(batch["scores"], counts),
        "objective/best_scores": Mean.over(batch["scores"], is_best),
    }


def loss(logprobs, batch):
    """-log π(token), a mean over the tokens of what was kept."""
    mask = batch["learned_mask"]
    metrics = {"policy/entropy_avg": Mean.over(batch["entropy"], mask)}
    return Mean.over(-logprobs, mask), metrics


def graph(hp: RAFT) -> DataflowGraph:
    """Rollout, reward, selection, training."""
    generate = functions.Generate(
        sampling=hp.sampling,
        completions_per_prompt=hp.completions_per_prompt,
        delivery=hp.delivery,
    )
    select = functions.Transform(
        fn=functools.partial(selection, hp=hp),
        reads=("completion_mask", "is_truncated", "scores"),
        writes=("learned_mask",),
    )
    # Of the whole vocabulary: what was sampled from a part of it is learned by all.
    train = functions.Train(
        loss=loss,
        reads=("tokens", "learned_mask"),
        minibatches=hp.minibatches,
        epochs=hp.epochs,
    )
    by_model = call("reward", functions.Infer(output="scores"))
    by_text = call(None, functions.Score(rewards=hp.rewards))
    return DataflowGraph(
        rollout=call("policy", generate),
        reward=by_text if hp.rewards else by_model,
        selection=call(None, select),
        train_policy=call("policy", train),
    )
