"""Advantage estimation: how much better a token was than expected."""

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    bootstrap_values: Float[Array, "B"],
    discount: float = 1.0,
    lambda_: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return generalized advantage estimates and value targets.

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γλ A_{t+1}

    over the completion tokens of each sequence. After the last one, V is
    `bootstrap_values` and A is 0. The recurrence runs in log2(T) parallel steps.

    Source: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equation 16.

    Args:
        rewards: one per token, KL penalty included.
        values: of the state before each token is chosen.
        mask: completion tokens, contiguous in each sequence.
        bootstrap_values: of the state after the last completion token: 0 where the
            completion ended, the critic's value where it was cut.
        discount: γ; 1 does not discount.
        lambda_: λ; 0 is one-step TD, 1 is the return minus the value.

    Returns:
        Advantages A_t, not whitened, and value targets A_t + V_t; 0 outside `mask`.
    """
    is_last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    next_values = jnp.where(is_last, bootstrap_values[:, None], next_values)
    deltas = jnp.where(mask, rewards + discount * next_values - values, 0.0)
    decays = jnp.where(mask, discount * lambda_, 0.0)

    def follow(later, earlier):
        # A_t = δ_t + decay_t A_{t+1} is an affine map; maps compose associatively.
        later_decay, later_delta = later
        decay, delta = earlier
        return decay * later_decay, delta + decay * later_delta

    _, advantages = jax.lax.associative_scan(
        follow, (decays, deltas), reverse=True, axis=1
    )
    return advantages, jnp.where(mask, advantages + values, 0.0)
