"""RLOO: REINFORCE whose baseline is the mean score of a prompt's other completions.

    prompts ─▶ rollout ─┬─▶ reward ────┬─▶ advantages ─▶ train_policy
                        └─▶ reference ─┘

Source: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740: a completion is one
action, and the KL to the reference is part of its score.
"""

import dataclasses
import functools

import jax.numpy as jnp

from realjax import functions, rl
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.rl import Mean, preferences


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLOO:
    """Hyperparameters.

    Attributes:
        sampling: how completions are drawn.
        completions_per_prompt: k, at least 2.
        rewards: Python functions of the text; empty means the reward role's scores.
        score: scaling, bias and clipping of scores; what truncated completions get.
        kl_coef: β of the KL to the reference, in score per nat; 0 needs no reference.
        minibatches: optimizer steps per rollout; with more than one, the later ones
            learn from what an older policy sampled.
        delivery: of the rollout, in portions or up to a budget of tokens.
    """

    sampling: rl.Sampling = rl.Sampling(max_new_tokens=256)
    completions_per_prompt: int = 4
    rewards: tuple[functions.RewardFunction, ...] = ()
    score: rl.ScoreShaping = rl.ScoreShaping(truncated="keep")
    kl_coef: float = 0.05
    minibatches: int = 1
    delivery: functions.Delivery = functions.Delivery()

    def __post_init__(self):
        """Refuses a weight below 0 and a group that leaves no others."""
        check_least(self, 0, "kl_coef")
        check_least(self, 2, "completions_per_prompt")


HYPERPARAMETERS = RLOO


def advantages(batch, *, hp: RLOO):
    """One advantage per completion (equation 8), and what to report."""
    mask = batch["completion_mask"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    shaped = rl.rewards.shape_scores(hp.score, batch["scores"], batch["is_truncated"])
    metrics = {"objective/scores": Mean.over(batch["scores"], counts)}
    if hp.kl_coef:
        kl = rl.kl.k1(batch["old_logprobs"], batch["ref_logprobs"])
        kl = jnp.where(mask, kl, 0.0).sum(axis=1)
        metrics["objective/kl"] = Mean.over(kl, counts)
        shaped -= hp.kl_coef * kl
    group = hp.completions_per_prompt
    estimates = rl.advantages.leave_one_out(shaped, counts, group_size=group)
    return {"advantages": estimates}, metrics


def policy_loss(logprobs, batch):
    """-A log π(y), a mean over completions (equation 6)."""
    mask = batch["completion_mask"]
    whole = preferences.sequence_logprobs(logprobs, mask)
    metrics = rl.importance.gap(logprobs, batch["old_logprobs"], mask)
    metrics["policy/entropy_avg"] = Mean.over(batch["entropy"], mask)
    return Mean.over(-batch["advantages"] * whole, mask.any(axis=1)), metrics


def graph(hp: RLOO) -> DataflowGraph:
    """Rollout, reward, reference (unless `kl_coef` is 0), advantages, training."""
    generate = functions.Generate(
        sampling=hp.sampling,
        completions_per_prompt=hp.completions_per_prompt,
        delivery=hp.delivery,
    )
    temperature = hp.sampling.temperature
    scored = ("tokens", "kept") if functions.is_filtered(hp.sampling) else ("tokens",)
    rollout = ("completion_mask", "is_truncated", "old_logprobs", "scores")
    estimate = functions.Transform(
        fn=functools.partial(advantages, hp=hp),
        reads=(*rollout, "ref_logprobs") if hp.kl_coef else rollout,
        writes=("advantages",),
    )
    train = functions.Train(
        loss=policy_loss,
        loss_name="loss/policy_avg",
        reads=(*scored, "completion_mask", "old_logprobs", "advantages"),
        temperature=temperature,
        minibatches=hp.minibatches,
    )
    by_model = call("reward", functions.Infer(output="scores"))
    by_text = call(None, functions.Score(rewards=hp.rewards))
    infer = functions.Infer(reads=scored, temperature=temperature)
    reference = {"reference": call("reference", infer, logprobs="ref_logprobs")}
    return DataflowGraph(
        rollout=call("policy", generate),
        reward=by_text if hp.rewards else by_model,
        **(reference if hp.kl_coef else {}),
        advantages=call(None, estimate),
        train_policy=call("policy", train),
    )
