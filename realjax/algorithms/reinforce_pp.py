"""REINFORCE++: PPO's clipped updates with advantages normalised over the whole batch.

    prompts ─▶ rollout ─┬─▶ reward ────┬─▶ advantages ─▶ train_policy
                        └─▶ reference ─┘

Source: Hu et al. 2025, https://arxiv.org/abs/2501.03262. No critic. With
`completions_per_prompt` above 1 it is the form with a baseline: the mean score of a
prompt's completions comes off first.
"""

import dataclasses
import functools

import jax.numpy as jnp

from realjax import functions, rl
from realjax.core.config import check_least
from realjax.dataflow import DataflowGraph, call
from realjax.rl import Mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus:
    """Hyperparameters.

    Attributes:
        sampling: how completions are drawn.
        completions_per_prompt: 1 has no baseline; more share their mean as one.
        rewards: Python functions of the text; empty means the reward role's scores.
        score: scaling, bias and clipping of scores; what truncated completions get.
        kl_coef: β of the KL to the reference, in score per nat; 0 needs no reference.
        clip_ratio: ε of the policy loss.
        minibatches, epochs, shuffle: optimizer steps per rollout and their order.
        delivery: of the rollout, in portions or up to a budget of tokens.
    """

    sampling: rl.Sampling = rl.Sampling(max_new_tokens=256)
    completions_per_prompt: int = 1
    rewards: tuple[functions.RewardFunction, ...] = ()
    score: rl.ScoreShaping = rl.ScoreShaping(truncated="keep")
    kl_coef: float = 0.01
    clip_ratio: float = 0.2
    minibatches: int = 1
    epochs: int = 1
    shuffle: bool = False
    delivery: functions.Delivery = functions.Delivery()

    def __post_init__(self):
        """Refuses numbers below 0."""
        check_least(self, 0, "kl_coef", "clip_ratio")


HYPERPARAMETERS = ReinforcePlusPlus


def advantages(batch, *, hp: ReinforcePlusPlus):
    """Score, less the KL still to come (equation 9), whitened over all tokens."""
    mask = batch["completion_mask"]
    counts = mask.any(axis=1)  # False on rows that only pad the batch.
    shaped = rl.rewards.shape_scores(hp.score, batch["scores"], batch["is_truncated"])
    metrics = {"objective/scores": Mean.over(batch["scores"], counts)}
    centred = rl.advantages.group_relative(
        shaped, counts, group_size=hp.completions_per_prompt, is_scaled=False
    )
    estimates = jnp.where(mask, centred[:, None], 0.0)
    if hp.kl_coef:
        kl = rl.kl.k1(batch["old_logprobs"], batch["ref_logprobs"])
        metrics["objective/kl"] = Mean.over(jnp.where(mask, kl, 0.0).sum(1), counts)
        estimates -= hp.kl_coef * rl.advantages.to_come(kl, mask)
    return {"advantages": rl.masking.whiten(estimates, mask)}, metrics


def policy_loss(logprobs, batch, *, hp: ReinforcePlusPlus):
    """Clipped surrogate, a mean over completion tokens."""
    mask, old_logprobs = batch["completion_mask"], batch["old_logprobs"]
    loss, clipped = rl.losses.clipped_surrogate(
        logprobs, old_logprobs, batch["advantages"], clip_ratio=hp.clip_ratio
    )
    metrics = rl.importance.gap(logprobs, old_logprobs, mask)
    metrics |= rl.losses.surrogate_metrics(
        logprobs - old_logprobs, clipped, batch["entropy"], mask
    )
    return Mean.over(loss, mask), metrics


def graph(hp: ReinforcePlusPlus) -> DataflowGraph:
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
        loss=functools.partial(policy_loss, hp=hp),
        loss_name="loss/policy_avg",
        reads=(*scored, "completion_mask", "old_logprobs", "advantages"),
        temperature=temperature,
        minibatches=hp.minibatches,
        epochs=hp.epochs,
        shuffle=hp.shuffle,
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
