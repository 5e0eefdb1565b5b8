"""Rotary position embeddings, with the context extensions in use.

Coordinates k and k + K/2 of a head form a pair (the "rotate half" convention of
Hugging Face checkpoints), turned by position × frequency_k.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, Float, Int
from realjax.models.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each token and coordinate pair, float32."""

    cos: Float[Array, "B T half_K"]
    sin: Float[Array, "B T half_K"]


def frequencies(config: ModelConfig) -> np.ndarray:
    """Return the angle in radians each pair turns by per position, [K/2] float64.

    frequency_k = theta^(-2k/K), then stretched as `config.rope_scaling` says.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    base = config.rope_theta**-exponents
    if config.rope_scaling is None:
        return base
    if config.rope_scaling.kind == "linear":
        return base / config.rope_scaling.factor
    return _llama3_frequencies(base, config.rope_scaling)


def _llama3_frequencies(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Divide slow frequencies by the factor, keep fast ones, blend linearly between.

    With n = turns in the original context, the share kept as it is is
    (n - low) / (high - low), clipped to [0, 1].

    Source: Llama 3.1, https://arxiv.org/abs/2407.21783, and its reference code.
    """
    turns = scaling.original_max_positions * base / (2 * math.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept = np.clip((turns - scaling.low_frequency_factor) / span, 0, 1)
    return kept * base + (1 - kept) * base / scaling.factor


def rotation(config: ModelConfig, positions: Int[Array, "B T"]) -> Rotation:
    """Compute the angles of every token; shared by all layers and heads."""
    frequency = jnp.asarray(frequencies(config), jnp.float32)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(
    x: Float[Array, "B T heads K"], turned: Rotation
) -> Float[Array, "B T heads K"]:
    """Turn each coordinate pair of each head by its token's angle, in float32."""
    cos, sin = turned.cos[:, :, None], turned.sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
