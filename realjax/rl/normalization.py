"""Normalisation of value targets by their running mean and standard deviation.

The critic predicts normalised values; its predictions are denormalised before
advantages are estimated. One state serves both, and belongs in the checkpoint.

    exp    weight of a batch: 1, and all earlier weights times `decay`
    ma     weight of a batch: its number of tokens, no decay
    none   weight of a batch: 0; always the identity

Mean and variance are merged from centred moments (Chan et al. 1979), so nothing large
is subtracted from something large and float32 is enough. Algebraically they are the
debiased running means of x and x² that ReaL kept in float64.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float, Scalar
from realjax.rl import masking

SMALLEST_VARIANCE = 1e-2
LARGEST_NORMALIZED = 5.0


class Normalizer(NamedTuple):
    """Moments of all values seen so far; before the first update, the identity."""

    mean: Float[Scalar, ""]
    variance: Float[Scalar, ""]
    weight: Float[Scalar, ""]
    """Of the batches seen, decayed; 0 before the first update."""
    decay: Float[Scalar, ""]
    """Of the weight at each update; 1 weighs batches by their tokens, -1 not at all."""


def init(kind: Literal["exp", "ma", "none"], *, decay: float = 0.99995) -> Normalizer:
    """Return a normaliser that has seen nothing, and so changes nothing."""
    if kind not in ("exp", "ma", "none"):
        raise ValueError(
            f"The value normaliser is {kind!r}; it must be 'exp', 'ma' or 'none'."
        )
    if kind == "exp" and not 0.0 <= decay < 1.0:
        raise ValueError(
            f"The decay of the value normaliser is {decay}; it must be in [0, 1). To"
            " weigh all tokens ever seen equally, choose the kind 'ma'."
        )
    decays = {"exp": decay, "ma": 1.0, "none": -1.0}
    return Normalizer(
        mean=jnp.zeros((), jnp.float32),
        variance=jnp.ones((), jnp.float32),
        weight=jnp.zeros((), jnp.float32),
        decay=jnp.full((), decays[kind], jnp.float32),
    )


def update(
    state: Normalizer, returns: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Normalizer:
    """Return the state after one more batch of value targets.

    A batch in which nothing counts changes nothing.
    """
    num_tokens = jnp.sum(mask, dtype=jnp.float32)
    new = jnp.where(state.decay < 1.0, jnp.minimum(num_tokens, 1.0), num_tokens)
    new = jnp.where(state.decay < 0.0, 0.0, new)
    old = jnp.where(new > 0, state.decay, 1.0) * state.weight
    total = old + new
    share = new / jnp.where(total > 0, total, 1.0)
    distance = masking.masked_mean(returns, mask) - state.mean
    variance = masking.masked_variance(returns, mask)
    # Within the batches, and between their means.
    within = (1.0 - share) * state.variance + share * variance
    between = share * (1.0 - share) * jnp.square(distance)
    return Normalizer(
        mean=state.mean + share * distance,
        variance=within + between,
        weight=total,
        decay=state.decay,
    )


def normalize(state: Normalizer, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Return clip((x - mean) / std, ±5); x itself before the first update."""
    scaled = (x - state.mean) / _std(state)
    clipped = jnp.clip(scaled, -LARGEST_NORMALIZED, LARGEST_NORMALIZED)
    return jnp.where(state.weight > 0, clipped, x)


def denormalize(state: Normalizer, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Return x * std + mean; x itself before the first update."""
    return x * _std(state) + state.mean


def _std(state: Normalizer) -> Float[Scalar, ""]:
    return jnp.sqrt(jnp.maximum(state.variance, SMALLEST_VARIANCE))
