"""Means, variances and whitening over the tokens that count.

What lies outside a mask is never looked at: it may be infinite or NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float, Scalar

EPSILON = 1e-5


class Mean(NamedTuple):
    """A mean whose parts add up over microbatches and devices.

        mean over everything = (total_1 + total_2 + …) / (weight_1 + weight_2 + …)

    The mean of microbatch means is something else when their sizes differ.
    """

    total: Float[Scalar, ""]
    weight: Float[Scalar, ""]

    @classmethod
    def over(
        cls,
        x: Float[Array, "*dims"] | Bool[Array, "*dims"],
        mask: Bool[Array, "*dims"] | Float[Array, "*dims"],
    ) -> "Mean":
        """Weigh `x` by the mask: true and false, or a float32 weight per element."""
        return cls(total=masked_sum(x, mask), weight=jnp.sum(mask, dtype=jnp.float32))

    def combine(self, other: "Mean") -> "Mean":
        """Return the mean over the elements of both."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Float[Scalar, ""]:
        """Return the mean; 0 where nothing counts."""
        is_empty = self.weight == 0
        return jnp.where(
            is_empty, 0.0, self.total / jnp.where(is_empty, 1, self.weight)
        )


def masked_sum(
    x: Float[Array, "*dims"] | Bool[Array, "*dims"],
    mask: Bool[Array, "*dims"] | Float[Array, "*dims"],
) -> Float[Scalar, ""]:
    """Sum `x` weighed by the mask, in float32."""
    x = jnp.where(mask != 0, x.astype(jnp.float32), 0.0)
    return jnp.sum(x * mask)


def masked_mean(
    x: Float[Array, "*dims"] | Bool[Array, "*dims"],
    mask: Bool[Array, "*dims"] | Float[Array, "*dims"],
) -> Float[Scalar, ""]:
    """Return the mean of `x` over the mask; 0 where nothing counts."""
    return Mean.over(x, mask).value()


def masked_variance(
    x: Float[Array, "*dims"], mask: Bool[Array, "*dims"]
) -> Float[Scalar, ""]:
    """Return the mean squared distance from the mean; 0 where nothing counts."""
    return masked_mean(jnp.square(_centred(x, mask)), mask)


def whiten(
    x: Float[Array, "*dims"], mask: Bool[Array, "*dims"]
) -> Float[Array, "*dims"]:
    """Shift and scale `x` to mean 0 and variance 1 over the mask.

        (x - mean) / (std + 1e-5)    with the biased std; 0 outside the mask

    Equal inputs give 0.
    """
    centred = _centred(x, mask)
    variance = masked_mean(jnp.square(centred), mask)
    # The root has no slope at 0, and its gradient would be NaN.
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0.0)
    return centred / (std + EPSILON)


def _centred(x, mask):
    """Return x minus its mean; 0 outside the mask.

    Distances are taken from one of the elements first: they are exactly 0 if all are
    equal, where the rounded mean of many equal numbers need not be that number, and a
    std made of such rounding would be divided by itself.
    """
    x = x.astype(jnp.float32)
    origin = jax.lax.stop_gradient(jnp.min(x, initial=jnp.inf, where=mask))
    distance = jnp.where(mask, x - origin, 0.0)
    return jnp.where(mask, distance - masked_mean(distance, mask), 0.0)
