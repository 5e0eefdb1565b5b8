"""Losses between a student and the likeliest tokens of a teacher."""

from typing import Literal

import jax.numpy as jnp

from realjax.core.arrays import Array, Float
from realjax.core.config import check_choice

REST_LEAST = 1e-6
"""The least probability that the tokens beyond the likeliest are taken to have."""


def forward_kl(
    logprobs: Float[Array, "*B K"],
    teacher_logprobs: Float[Array, "*B K"],
    *,
    rest: Literal["bucket", "left_out"] = "bucket",
) -> Float[Array, "*B"]:
    """Return KL(teacher ‖ student) in nats, as the teacher's K likeliest tokens tell.

        Σ_k p_k log(p_k / q_k)    over the K tokens and, as if it were one more token,
                                  the rest: 1 - Σ p, 1 - Σ q                  "bucket"
                                  over the K tokens alone, p and q divided by
                                  their sums                                "left_out"

    Of all tokens both are the KL divergence itself; of fewer, "bucket" is at most it
    (the data-processing inequality). Source: Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531; what is done about the rest is ours.

    Args:
        logprobs: log q, by the student, among all tokens; -inf of a token that it does
            not have, which then belongs to the rest.
        teacher_logprobs: log p, likewise by the teacher.
        rest: what is made of all other tokens.
    """
    check_choice("rest", rest, ("bucket", "left_out"))
    is_known = jnp.isfinite(logprobs) & jnp.isfinite(teacher_logprobs)
    student = jnp.where(is_known, logprobs, 0.0)
    teacher = jnp.where(is_known, teacher_logprobs, 0.0)
    p, q = (jnp.where(is_known, jnp.exp(x), 0.0) for x in (teacher, student))
    among = jnp.sum(p * (teacher - student), axis=-1)
    total_p, total_q = p.sum(axis=-1), q.sum(axis=-1)
    if rest == "left_out":
        # Nothing is known of a place without tokens, where both sums are 0.
        total_p, total_q = (jnp.where(x > 0, x, 1.0) for x in (total_p, total_q))
        return among / total_p - jnp.log(total_p) + jnp.log(total_q)
    rest_p, rest_q = (jnp.maximum(1.0 - x, REST_LEAST) for x in (total_p, total_q))
    return among + rest_p * (jnp.log(rest_p) - jnp.log(rest_q))
