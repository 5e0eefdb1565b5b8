"""The gap between sampler and trainer, and what corrects a policy gradient for it.

A rollout in fewer bits samples from μ, which is not quite the policy π_old that the
trainer computes from the same parameters. PPO's ratio π / μ then counts rounding as if
it were learning. Parted in two (Yao et al. 2025, "Your efficient RL framework secretly
brings you off-policy training"; Hilton et al. 2021, https://arxiv.org/abs/2110.00641):

    π / μ  =  π / π_old  ×  π_old / μ
              clipped       a weight without a gradient, truncated at a cap

Truncation, and not clipping from below, is that of IMPALA's ρ̄ (Espeholt et al. 2018,
https://arxiv.org/abs/1802.01561, section 4.1): it bounds the variance, and biases the
gradient only where the trainer thinks a token far likelier than the sampler did.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float
from realjax.rl import kl
from realjax.rl.masking import Mean


def truncated_weights(
    logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], *, cap: float
) -> Float[Array, "B T"]:
    """Return w_t = min(π_old(a_t) / μ(a_t), cap) of each token, without a gradient.

    Args:
        logprobs: of the tokens, by the trainer before it learns from them.
        old_logprobs: of the tokens, by the sampler.
        cap: 2 is a common one; 0 corrects nothing: all weights are 1.
    """
    if not cap:
        return jnp.ones_like(logprobs)
    log_weights = jnp.minimum(logprobs - old_logprobs, math.log(cap))
    return jax.lax.stop_gradient(jnp.exp(log_weights))


def parted(
    logprobs: Float[Array, "B T"], batch: Mapping[str, Array], *, cap: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], dict[str, Mean]]:
    """Part π / μ of a batch's completions, where it has what that takes.

    Args:
        logprobs: log π of the tokens, by the trainer.
        batch: "completion_mask", "old_logprobs" (log μ) and, where a call before the
            training made them, "proximal_logprobs" (log π_old); without these π_old is
            taken to be μ.
        cap: as of `truncated_weights`.

    Returns:
        log π / π_old, the weights, and `gap`. Without π_old the gap is that of π to
        the sampler, which is the trainer's for the first minibatch alone; of that one
        the runtime reports it.
    """
    mask, old_logprobs = batch["completion_mask"], batch["old_logprobs"]
    proximal = batch.get("proximal_logprobs", old_logprobs)
    weights = truncated_weights(proximal, old_logprobs, cap=cap)
    metrics = gap(batch.get("proximal_logprobs", logprobs), old_logprobs, mask)
    return logprobs - proximal, weights, metrics


def gap(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> dict[str, Mean]:
    """Measure how far the trainer is from the sampler, on the sampler's tokens.

    Args:
        logprobs: of the tokens, by the trainer before it learns from them.
        old_logprobs: of the tokens, by the sampler.
        mask: tokens that were sampled.

    Returns:
        "rollout_gap/logprob", the mean |log π_old - log μ|, and "rollout_gap/kl", an
        estimate (k3) of KL(μ ‖ π_old) in nats a token.
    """
    difference = jnp.abs(logprobs - old_logprobs)
    return {
        "rollout_gap/logprob": Mean.over(difference, mask),
        "rollout_gap/kl": Mean.over(kl.k3(old_logprobs, logprobs), mask),
    }


def largest_gap(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Return the largest |log π_old - log μ| of a token, 0 where there is none."""
    difference = jnp.abs(logprobs - old_logprobs)
    return jnp.max(jnp.where(mask, difference, 0.0), initial=0.0)
