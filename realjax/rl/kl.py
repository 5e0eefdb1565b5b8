"""KL divergence from a reference: estimators, and control of its coefficient.

The estimators are of KL(policy ‖ reference) in nats, one number per token sampled from
the policy. Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float
from realjax.rl.masking import Mean


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


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
"""By name. In a loss, the gradient of k1 is that of no KL: it has mean 0."""


def of_completions(
    logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    estimator: Literal["k1", "k2", "k3"] = "k1",
) -> tuple[Float[Array, "B T"], Mean]:
    """Return the KL of each completion token, 0 elsewhere, and what to report.

    Args:
        logprobs: of the tokens, by the policy.
        ref_logprobs: of the tokens, by the reference.
        mask: completion tokens.
        estimator: one of `ESTIMATORS`.

    Returns:
        Nats a token, and the mean of whole completions.
    """
    kl = jnp.where(mask, ESTIMATORS[estimator](logprobs, ref_logprobs), 0.0)
    return kl, Mean.over(kl.sum(axis=1), mask.any(axis=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLControl:
    """The weight of the KL penalty, fixed or adaptive.

    Attributes:
        coef: β, in reward per nat; the first one, if it adapts.
        adaptive: whether it follows the measured KL.
        target: KL to hold, in the unit it is measured in.
        horizon: sequences over which the coefficient can change by a fifth.
    """

    coef: float = 0.1
    adaptive: bool = False
    target: float = 6.0
    horizon: float = 10000.0

    def __post_init__(self):
        """Refuses a target or horizon that nothing can be divided by."""
        for name in ("target", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be above 0."
                )


def next_coefficient(
    control: KLControl,
    coef: float | Float[Array, ""],
    kl: Mean,
) -> Float[Array, ""]:
    """Return the coefficient of the next step; larger where KL is above its target.

        coef * (1 + clip(kl / target - 1, ±0.2) * sequences / horizon)

    The coefficient is the whole state; a fixed one stays as it is.

    Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2. ReaL
    passed the KL reward, -coef * kl, where the formula needs the KL: its coefficient
    only ever fell.

    Args:
        control: fixed or adaptive.
        coef: of this step.
        kl: of this step, a mean over its sequences, in the unit of the target.
    """
    coef = jnp.asarray(coef, jnp.float32)
    if not control.adaptive:
        return coef
    error = jnp.clip(kl.value() / control.target - 1.0, -0.2, 0.2)
    return coef * (1.0 + error * kl.weight / control.horizon)
