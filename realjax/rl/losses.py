"""Losses: one number per token or per pair, to be averaged with `masking.Mean`."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float
from realjax.rl import importance
from realjax.rl.masking import Mean


def clipped_surrogate(
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_ratio: float,
    clip_higher: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return PPO's policy loss per token, and where the clipped ratio decided it.

        L_t = max(-A_t ρ_t, -A_t clip(ρ_t, 1 - ε, 1 + ε'))

    Sources: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7; ε' for
    itself, Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, equation 10.

    Args:
        log_ratio: log ρ_t = log π(a_t) / π_old(a_t), of the policy in training to that
            which sampled.
        advantages: A_t.
        clip_ratio: ε.
        clip_higher: ε'; None is ε.
    """
    ratio = jnp.exp(log_ratio)
    highest = 1.0 + (clip_ratio if clip_higher is None else clip_higher)
    near = jnp.clip(ratio, 1.0 - clip_ratio, highest)
    loss, clipped_loss = -advantages * ratio, -advantages * near
    return jnp.maximum(loss, clipped_loss), clipped_loss > loss


def sequence_log_ratio(
    log_ratio: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Return log ρ of whole completions, per token of them, at each of their tokens.

        s = (π(y) / π_old(y))^(1 / |y|)

    Source: Zheng et al. 2025 (GSPO), https://arxiv.org/abs/2507.18071, equation 7.

    Args:
        log_ratio: of each token, of the policy in training to that which sampled.
        mask: completion tokens.
    """
    total = jnp.where(mask, log_ratio, 0.0).sum(axis=1, keepdims=True)
    mean = total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return jnp.where(mask, mean, 0.0)


def mean_of_tokens(
    loss: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    over: Literal["tokens", "sequences", "constant"],
    longest: int = 1,
) -> Mean:
    """Average a loss per token.

        tokens      over all tokens: a long completion has more of a say (DAPO)
        sequences   over each completion's own tokens, then over completions (GRPO)
        constant    sums over completions, then over those, divided by their longest
                    possible length (Dr. GRPO)

    Sources: Yu et al. 2025, https://arxiv.org/abs/2503.14476, equation 12; Shao et al.
    2024, https://arxiv.org/abs/2402.03300, equation 3; Liu et al. 2025,
    https://arxiv.org/abs/2503.20783, section 3.1.

    Args:
        loss: of every token.
        mask: completion tokens.
        over: what the mean is over.
        longest: tokens of a completion, at most; of "constant".
    """
    if over == "tokens":
        return Mean.over(loss, mask)
    if over not in ("sequences", "constant"):
        raise ValueError(
            f"over is {over!r}; it must be 'tokens', 'sequences' or 'constant'."
        )
    total = jnp.where(mask, loss, 0.0).sum(axis=1)
    length = mask.sum(axis=1) if over == "sequences" else longest
    return Mean.over(total / jnp.maximum(length, 1), mask.any(axis=1))


def surrogate_metrics(
    log_ratio: Float[Array, "B T"],
    clipped: Bool[Array, "B T"],
    entropy: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> dict[str, Mean]:
    """Report what a policy loss saw, as means over tokens.

    Args:
        log_ratio: log ρ_t; half its square estimates the KL from the sampler.
        clipped: where the clipped ratio decided the loss.
        entropy: of the distributions over the next token.
        mask: tokens that count.
    """
    return {
        "policy/approxkl_avg": Mean.over(0.5 * jnp.square(log_ratio), mask),
        "policy/clipfrac_avg": Mean.over(clipped, mask),
        "policy/entropy_avg": Mean.over(entropy, mask),
        "val/ratio": Mean.over(jnp.exp(log_ratio), mask),
    }


def reinforce(
    logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Mean:
    """Return -Σ_t A_t log π(a_t), a mean over completions.

    Sources: Williams 1992; of whole completions, Ahmadian et al. 2024,
    https://arxiv.org/abs/2402.14740, equation 6.

    Args:
        logprobs: of the tokens, by the policy in training.
        advantages: A_t, without a gradient.
        mask: completion tokens.
    """
    total = jnp.where(mask, advantages * logprobs, 0.0).sum(axis=1)
    return Mean.over(-total, mask.any(axis=1))


def policy_gradient(
    logprobs: Float[Array, "B T"], batch: Mapping[str, Array], *, cap: float
) -> tuple[Mean, dict[str, Mean]]:
    """Return `reinforce` of a rollout, each token weighed for its sampler.

    Args:
        logprobs: of the tokens, by the policy in training.
        batch: "completion_mask", "old_logprobs" and "advantages" of the rollout, and
            the policy's "entropy".
        cap: of the weights, see `importance.truncated_weights`; 0 has none.

    Returns:
        The loss, and the gap to the sampler and the entropy.
    """
    mask, old_logprobs = batch["completion_mask"], batch["old_logprobs"]
    weights = importance.truncated_weights(logprobs, old_logprobs, cap=cap)
    metrics = importance.gap(logprobs, old_logprobs, mask)
    metrics["policy/entropy_avg"] = Mean.over(batch["entropy"], mask)
    return reinforce(logprobs, weights * batch["advantages"], mask), metrics


def clipped_value(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    targets: Float[Array, "B T"],
    *,
    clip_range: float,
    kind: Literal["mse", "huber"] = "mse",
    huber_delta: float = 10.0,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return PPO's value loss per token, and where the clipped value decided it.

        L_t = max(ℓ(V_t - R_t), ℓ(V_old,t + clip(V_t - V_old,t, ±ε) - R_t))
        ℓ(e) = e² / 2    and for "huber", δ (|e| - δ / 2) where |e| > δ

    Args:
        values: by the critic in training.
        old_values: by the critic when the completions were made.
        targets: R_t, in the same unit as the values (normalised, if they are).
        clip_range: ε, the largest change of a value that is trusted.
        kind: of error.
        huber_delta: δ, the error from which "huber" is linear.
    """
    if kind not in ("mse", "huber"):
        raise ValueError(f"The value loss is {kind!r}; it must be 'mse' or 'huber'.")

    def error(predicted):
        distance = jnp.abs(predicted - targets)
        square = 0.5 * jnp.square(distance)
        if kind == "mse":
            return square
        linear = huber_delta * (distance - 0.5 * huber_delta)
        return jnp.where(distance <= huber_delta, square, linear)

    near = old_values + jnp.clip(values - old_values, -clip_range, clip_range)
    loss, clipped_loss = error(values), error(near)
    return jnp.maximum(loss, clipped_loss), clipped_loss > loss


def pairwise_logistic(scores: Float[Array, "B"]) -> Float[Array, "B//2"]:
    """Return -log σ(chosen - rejected) of each pair.

    Source: Bradley and Terry 1952; Ouyang et al. 2022,
    https://arxiv.org/abs/2203.02155, equation 1.

    Args:
        scores: chosen, rejected, chosen, rejected, …
    """
    if scores.shape[0] % 2:
        raise ValueError(
            f"{scores.shape[0]} scores are not pairs: each chosen sequence needs its"
            " rejected one right after it."
        )
    chosen, rejected = scores[0::2], scores[1::2]
    return -jax.nn.log_sigmoid(chosen - rejected)
