"""ReMax: REINFORCE whose baseline is the score of the greedy completion.

    prompts ─┬─▶ rollout ──┬─▶ reward ───────────┬─▶ advantages ─▶ train_policy
             │             └─▶ reference ────────┤
             └─▶ baseline ───▶ reward_baseline ──┘

Source: Li et al. 2023, https://arxiv.org/abs/2310.10505, algorithm 2. Two calls
generate; the greedy completions are scored and not learned from.
"""

import dataclasses
import functools

import jax.numpy as jnp

from realjax import functions, rl
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.rl import Mean, preferences


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReMax:
    """Hyperparameters.

    Attributes:
        sampling: how completions are drawn.
        rewards: Python functions of the text; empty means the reward role's scores.
        score: scaling, bias and clipping of scores; what truncated completions get.
        kl_coef: β of the KL to the reference, in score per nat; 0 needs no reference.
        minibatches: optimizer steps per rollout; with more than one, the later ones
            learn from what an older policy sampled.
    """

    sampling: rl.Sampling = rl.Sampling(max_new_tokens=256)
    rewards: tuple[functions.RewardFunction, ...] = ()
    score: rl.ScoreShaping = rl.ScoreShaping(truncated="keep")
    kl_coef: float = 0.05
    minibatches: int = 1

    def __post_init__(self):
        """Refuses a weight below 0."""
        check_least(self, 0, "kl_coef")


HYPERPARAMETERS = ReMax


def advantages(batch, *, hp: ReMax):
    """r(y) - r(greedy), at each token less the KL that is still to come (eq. 8)."""
    mask = batch["completion_mask"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    shape = functools.partial(rl.rewards.shape_scores, hp.score)
    scores = shape(batch["scores"], batch["is_truncated"])
    baselines = shape(batch["greedy_scores"], batch["greedy_is_truncated"])
    estimates = jnp.where(mask, (scores - baselines)[:, None], 0.0)
    metrics = {
        "objective/scores": Mean.over(batch["scores"], counts),
        "objective/greedy_scores": Mean.over(batch["greedy_scores"], counts),
    }
    if hp.kl_coef:
        kl = rl.kl.k1(batch["old_logprobs"], batch["ref_logprobs"])
        metrics["objective/kl"] = Mean.over(jnp.where(mask, kl, 0.0).sum(1), counts)
        estimates -= hp.kl_coef * rl.advantages.to_come(kl, mask)
    return {"advantages": estimates}, metrics


def policy_loss(logprobs, batch):
    """-Σ A_t log π(y_t), a mean over completions."""
    mask = batch["completion_mask"]
    whole = preferences.sequence_logprobs(batch["advantages"] * logprobs, mask)
    metrics = rl.importance.gap(logprobs, batch["old_logprobs"], mask)
    metrics["policy/entropy_avg"] = Mean.over(batch["entropy"], mask)
    return Mean.over(-whole, mask.any(axis=1)), metrics


def graph(hp: ReMax) -> DataflowGraph:
    """Two rollouts and their rewards, reference, advantages, training."""
    sampled = functions.Generate(sampling=hp.sampling)
    greedy = functions.Generate(sampling=dataclasses.replace(hp.sampling, greedy=True))
    of_greedy = {key: f"greedy_{key}" for key in greedy.writes}
    temperature = hp.sampling.temperature
    scored = ("tokens", "kept") if functions.is_filtered(hp.sampling) else ("tokens",)
    rollout = ("completion_mask", "is_truncated", "old_logprobs", "scores")
    rollout = (*rollout, "greedy_scores", "greedy_is_truncated")
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
    role = None if hp.rewards else "reward"
    by_text = functions.Score(rewards=hp.rewards)
    score = by_text if hp.rewards else functions.Infer(output="scores")
    read = {key: of_greedy[key] for key in score.reads}
    infer = functions.Infer(reads=scored, temperature=temperature)
    reference = {"reference": call("reference", infer, logprobs="ref_logprobs")}
    return DataflowGraph(
        rollout=call("policy", sampled),
        baseline=call("policy", greedy, **of_greedy),
        reward=call(role, score),
        reward_baseline=call(role, score, **read, scores="greedy_scores"),
        **(reference if hp.kl_coef else {}),
        advantages=call(None, estimate),
        train_policy=call("policy", train),
    )
