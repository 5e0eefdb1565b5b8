"""Rotary position embeddings, with the context extensions in use.

Coordinates k and k + K/2 of a head form a pair (the "rotate half" convention of
Hugging Face checkpoints), turned by position × frequency_k.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, Float, Int
from realjax.models.config import ModelConfig
from realjax.models.rope_scaling import RopeScaling


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each token and coordinate pair, float32.

    Both carry the factor that some extensions multiply queries and keys by.
    """

    cos: Float[Array, "B T half_K"]
    sin: Float[Array, "B T half_K"]


def rotation(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"],
    *,
    is_local: bool = False,
) -> Rotation:
    """Compute the angles of every token; shared by all heads, and layers of a kind.

    Args:
        config: of the model.
        positions: place of each token in its own sequence, from 0.
        lengths: of each token's sequence, as far as it is known; only "dynamic" and
            "longrope" scaling look at it.
        is_local: for the layers with a window, which may have a base of their own.
    """
    scaling, theta = config.rope_scaling, config.rope_theta
    if is_local and config.local_rope_theta is not None:
        scaling, theta = None, config.local_rope_theta
    if scaling is not None and scaling.depends_on_length:
        frequency = _frequencies_by_length(config, scaling, lengths)
    else:
        stretched = frequencies(theta, config.head_dim, scaling)
        frequency = jnp.asarray(stretched, jnp.float32)[None, None]
    angle = positions[..., None].astype(jnp.float32) * frequency
    factor = 1.0 if scaling is None else scaling.attention_factor
    return Rotation(factor * jnp.cos(angle), factor * jnp.sin(angle))


def rotate(
    x: Float[Array, "B T heads K"], turned: Rotation
) -> Float[Array, "B T heads K"]:
    """Turn each coordinate pair of each head by its token's angle, in float32."""
    cos, sin = turned.cos[:, :, None], turned.sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def frequencies(
    theta: float, head_dim: int, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Return the angle in radians each pair turns by per position, [K/2] float64.

    frequency_k = theta^(-2k/K), then stretched as `scaling` says: of the kinds that
    look at no length.
    """
    base = theta ** -_exponents(head_dim)
    if scaling is None:
        return base
    if scaling.kind == "linear":
        return base / scaling.factor
    if scaling.kind == "llama3":
        kept = _kept_by_llama3(base, scaling)
    else:
        kept = _kept_by_yarn(theta, head_dim, scaling)
    return kept * base + (1 - kept) * base / scaling.factor


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float64) / head_dim


def _kept_by_llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Return the share of each frequency that stays as it is.

    With n = turns in the original context it is (n - low) / (high - low), clipped to
    [0, 1].

    Source: Llama 3.1, https://arxiv.org/abs/2407.21783, and its reference code.
    """
    turns = scaling.original_max_positions * base / (2 * math.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    return np.clip((turns - scaling.low_frequency_factor) / span, 0, 1)


def _kept_by_yarn(theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
    """Return the share of each frequency that stays as it is.

    A ramp over pairs of coordinates, from the pair that makes `fast_turns` turns in the
    original context to the one that makes `slow_turns`.

    Source: Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.2. The ramp is
    linear in the pair's number, as in the authors' code, not in its turns.
    """

    def pair_of(turns: float) -> float:
        ratio = scaling.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(theta))

    first, last = pair_of(scaling.fast_turns), pair_of(scaling.slow_turns)
    if scaling.is_truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    span = last - first or 0.001  # A step where both fall on one pair.
    return 1 - np.clip((np.arange(head_dim // 2) - first) / span, 0, 1)


def _frequencies_by_length(
    config: ModelConfig, scaling: RopeScaling, lengths: Int[Array, "B T"]
) -> Float[Array, "B T half_K"]:
    """Return the frequencies of sequences of given lengths.

    "dynamic" replaces the base theta, beyond the original context P, by
    theta (s length / P - (s - 1))^(K / (K - 2)) with the factor s; "longrope" divides
    frequency k by a factor of its own, one within the original context and one beyond.

    Sources: bloc97 2023 ("dynamically scaled RoPE"); Ding et al. 2024,
    https://arxiv.org/abs/2402.13753.
    """
    original, head_dim = scaling.original_max_positions, config.head_dim
    exponents = jnp.asarray(_exponents(head_dim), jnp.float32)
    if scaling.kind == "longrope":
        factors = jnp.where(
            (lengths > original)[..., None],
            jnp.asarray(scaling.long_factors, jnp.float32)[None, None],
            jnp.asarray(scaling.short_factors, jnp.float32)[None, None],
        )
        return config.rope_theta ** -exponents[None, None] / factors
    stretch = jnp.maximum(lengths, original).astype(jnp.float32) / original
    growth = scaling.factor * stretch - (scaling.factor - 1)
    theta = config.rope_theta * growth ** (head_dim / (head_dim - 2))
    return jnp.exp(-exponents[None, None] * jnp.log(theta)[..., None])
