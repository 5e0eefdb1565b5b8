"""From one score per completion to one reward per token."""

from typing import Literal

import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float


def clip_scores(
    scores: Float[Array, "B"],
    scaling: float = 1.0,
    bias: float = 0.0,
    clip: float = float("inf"),
) -> Float[Array, "B"]:
    """Return (score - bias) * scaling, no farther from 0 than `clip`."""
    return jnp.clip((scores - bias) * scaling, -clip, clip)


def token_rewards(
    scores: Float[Array, "B"],
    logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
    is_truncated: Bool[Array, "B"],
    truncated_score: Literal["keep", "zero"] | float = "zero",
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Put the score on the last completion token, and a KL penalty on every one.

        kl_t = -β (log π(token_t) - log π_ref(token_t))
        r_t  = kl_t + [t is the last completion token] score

    Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 2.

    Args:
        scores: one per sequence, scaled and clipped already.
        logprobs: of the tokens, by the policy that sampled them.
        ref_logprobs: of the tokens, by the reference.
        mask: completion tokens.
        kl_coef: β, in reward per nat.
        is_truncated: completions that were cut before their end-of-sequence token.
        truncated_score: what those get as a score: their own ("keep"), none ("zero",
            as ReaL), or this number instead.

    Returns:
        The rewards, and the KL penalties among them; both 0 outside `mask`.
    """
    if truncated_score == "zero":
        truncated_score = 0.0
    if truncated_score != "keep":
        if isinstance(truncated_score, str):
            raise ValueError(
                f"truncated_score is {truncated_score!r}; it must be 'keep', 'zero' or"
                " a number."
            )
        scores = jnp.where(is_truncated, truncated_score, scores)
    is_last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    kl_rewards = jnp.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)
    return kl_rewards + jnp.where(is_last, scores[:, None], 0.0), kl_rewards
