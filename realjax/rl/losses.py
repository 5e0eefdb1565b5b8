"""Losses: one number per token or per pair, to be averaged with `masking.Mean`."""

from typing import Literal

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float
from realjax.rl.masking import Mean


def clipped_surrogate(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_ratio: float,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return PPO's policy loss per token, and where the clipped ratio decided it.

        L_t = max(-A_t ρ_t, -A_t clip(ρ_t, 1 - ε, 1 + ε))    ρ_t = π(a_t) / π_old(a_t)

    Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7.

    Args:
        logprobs: of the tokens, by the policy in training.
        old_logprobs: of the tokens, by the policy that sampled them.
        advantages: A_t.
        clip_ratio: ε.
    """
    ratio = jnp.exp(logprobs - old_logprobs)
    near = jnp.clip(ratio, 1.0 - clip_ratio, 1.0 + clip_ratio)
    loss, clipped_loss = -advantages * ratio, -advantages * near
    return jnp.maximum(loss, clipped_loss), clipped_loss > loss


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
