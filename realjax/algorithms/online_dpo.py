"""Online DPO: the best and the worst of a prompt's completions are the pair.

    prompts ─▶ rollout ─┬─▶ reward ─▶ ranking ─┐
                        └─▶ reference ─────────┴─▶ train_policy

Source: Guo et al. 2024, https://arxiv.org/abs/2402.04792, algorithm 1, with two
completions there, and the scores of a reward model or of functions in the place of a
language model's judgement. The loss is that of `dpo`, with its variants.
"""

import dataclasses
import functools

from realjax import rl
from realjax.algorithms import dpo
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.functions import Rollouts, Transform
from realjax.rl import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineDPO(dpo.Preference, Rollouts):
    """Hyperparameters: those of `Rollouts` and `dpo.Preference`.

    Of a group there are at least 2, and `importance_cap` has no meaning here.
    """

    completions_per_prompt: int = 2

    def __post_init__(self):
        """Refuses a group without a pair, and weights that no pair has."""
        dpo.Preference.__post_init__(self)
        Rollouts.__post_init__(self)
        check_least(self, 2, "completions_per_prompt")
        if self.importance_cap:
            raise ValueError(
                "Online DPO learns from what it sampled as from a data set: set"
                f" importance_cap to 0, not {self.importance_cap}."
            )


HYPERPARAMETERS = OnlineDPO


def ranking(batch, *, hp: OnlineDPO):
    """Which completion of every prompt is chosen, and which is rejected."""
    mask = batch["completion_mask"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    shaped = rl.rewards.shape_scores(hp.score, batch["scores"], batch["is_truncated"])
    is_chosen, is_rejected = rl.preferences.best_and_worst(
        shaped, counts, group_size=hp.completions_per_prompt
    )
    is_learned = is_chosen | is_rejected
    outputs = {"is_chosen": is_chosen, "learned_mask": mask & is_learned[:, None]}
    return outputs, {
        "objective/scores": Mean.over(batch["scores"], counts),
        "objective/chosen_scores": Mean.over(batch["scores"], is_chosen),
        "objective/rejected_scores": Mean.over(batch["scores"], is_rejected),
        "objective/useful_groups": Mean.over(
            rl.advantages.differing_groups(
                batch["scores"], counts, group_size=hp.completions_per_prompt
            ),
            counts,
        ),
    }


def loss(logprobs, batch, *, hp: OnlineDPO):
    """Preference loss, a mean over the prompts that have a pair."""
    mask, is_chosen = batch["learned_mask"], batch["is_chosen"]
    answers = dpo.gained(logprobs, batch | {"completion_mask": mask}, hp=hp)
    of_groups = lambda x: x.reshape(-1, hp.completions_per_prompt).sum(axis=1)
    chosen, rejected = of_groups(answers * is_chosen), of_groups(answers * ~is_chosen)
    weights = of_groups(is_chosen.astype(answers.dtype))
    mean, metrics = dpo.pair_loss(chosen, rejected, weights, hp=hp)
    metrics |= rl.importance.gap(logprobs, batch["old_logprobs"], mask)
    return mean, metrics | {"policy/entropy_avg": Mean.over(batch["entropy"], mask)}


def graph(hp: OnlineDPO) -> DataflowGraph:
    """Rollout, reward, reference (if there is one), ranking, training."""
    rank = Transform(
        fn=functools.partial(ranking, hp=hp),
        reads=("completion_mask", "is_truncated", "scores"),
        writes=("is_chosen", "learned_mask"),
    )
    against = ("ref_logprobs",) if hp.has_reference else ()
    train = hp.train(
        functools.partial(loss, hp=hp),
        ("old_logprobs", "is_chosen", "learned_mask", *against),
        unit=hp.completions_per_prompt,
        only="learned_mask",
    )
    reference = call("reference", hp.infer(), logprobs="ref_logprobs")
    return DataflowGraph(
        rollout=call("policy", hp.generate(), staleness=hp.staleness),
        reward=call(*hp.reward()),
        reference=reference if hp.has_reference else None,
        ranking=call(None, rank),
        train_policy=call("policy", train),
    )
