"""KL divergence from a reference: estimators, and control of its coefficient.

The estimators are of KL(policy ‖ reference) in nats, one number per token sampled from
the policy. Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.
"""

import jax.numpy as jnp

from realjax.core.arrays import Array, Float


def k1(
    logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Return x = log π - log π_ref: unbiased, of high variance, of either sign."""
    return logprobs - ref_logprobs


def k2(
    logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Return x² / 2: biased, of low variance, never negative.

    Its gradient is an unbiased estimate of the gradient of the KL.
    """
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(
    logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Return exp(-x) - 1 + x: unbiased, of low variance, never negative."""
    x = logprobs - ref_logprobs
    return jnp.expm1(-x) + x


def adaptive_kl(
    coef: float | Float[Array, ""],
    kl: float | Float[Array, ""],
    *,
    target: float,
    horizon: float,
    num_sequences: int | Float[Array, ""],
) -> Float[Array, ""]:
    """Return the next KL coefficient: larger where the KL is above its target.

        coef * (1 + clip(kl / target - 1, ±0.2) * num_sequences / horizon)

    The coefficient is the whole state. A fixed coefficient needs no function.

    Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2. ReaL
    passed the KL reward, -coef * kl, where the formula needs the KL: its coefficient
    only ever fell.

    Args:
        coef: of this step, in reward per nat.
        kl: mean of `k1` over the completion tokens of this step, in nats.
        target: KL to hold, in nats.
        horizon: sequences over which the coefficient can change by a fifth.
        num_sequences: of this step.
    """
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return coef * (1.0 + error * num_sequences / horizon)
