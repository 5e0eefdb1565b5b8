"""From one score per completion to one reward per token."""

import dataclasses

import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreShaping:
    """How the scores of completions become rewards.

    Attributes:
        scaling, bias, clip: a score s becomes (s - bias) * scaling, no farther from 0
            than `clip`.
        truncated: what a completion that was cut before its end-of-sequence token
            gets: its own score ("keep"), none ("zero", as ReaL), or this number.
    """

    scaling: float = 1.0
    bias: float = 0.0
    clip: float = 20.0
    truncated: float | str = "zero"

    def __post_init__(self):
        """Refuses other words for `truncated`, and a clip that leaves nothing."""
        if isinstance(self.truncated, str) and self.truncated not in ("keep", "zero"):
            raise ValueError(
                f"truncated is {self.truncated!r}; it must be 'keep', 'zero' or a"
                " number."
            )
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0.")


def shape_scores(
    shaping: ScoreShaping,
    scores: Float[Array, "B"],
    is_truncated: Bool[Array, "B"],
) -> Float[Array, "B"]:
    """Scale, shift and clip scores, and replace those of truncated completions."""
    scaled = (scores - shaping.bias) * shaping.scaling
    scores = jnp.clip(scaled, -shaping.clip, shaping.clip)
    if shaping.truncated == "keep":
        return scores
    replacement = 0.0 if shaping.truncated == "zero" else float(shaping.truncated)
    return jnp.where(is_truncated, replacement, scores)


def token_rewards(
    scores: Float[Array, "B"],
    logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Put the score on the last completion token, and a KL penalty on every one.

        kl_t = -β (log π(token_t) - log π_ref(token_t))
        r_t  = kl_t + [t is the last completion token] score

    Source: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 2.

    Args:
        scores: one per sequence, shaped already.
        logprobs: of the tokens, by the policy that sampled them.
        ref_logprobs: of the tokens, by the reference.
        mask: completion tokens.
        kl_coef: β, in reward per nat.

    Returns:
        The rewards, and the KL penalties among them; both 0 outside `mask`.
    """
    is_last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    kl_rewards = jnp.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)
    return kl_rewards + jnp.where(is_last, scores[:, None], 0.0), kl_rewards


def overlong_penalty(
    lengths: Float[Array, "B"], *, longest: int, margin: int
) -> Float[Array, "B"]:
    """Return what comes off the score of completions that near the longest length.

        0                            up to longest - margin tokens
        (longest - margin - n) / margin    from there, down to -1 at the longest

    Source: Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, equation 13.

    Args:
        lengths: n, tokens of each completion.
        longest: of any completion.
        margin: tokens over which the penalty grows; 0 is no penalty.
    """
    if not margin:
        return jnp.zeros_like(lengths)
    return jnp.clip((longest - margin - lengths) / margin, -1.0, 0.0)
