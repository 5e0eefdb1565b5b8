"""Root-mean-square normalisation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + epsilon) × scale, in float32 whatever the dtype.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4.
    """

    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last dimension."""
        ones = nn.initializers.ones_init()
        scale = self.param("scale", ones, (x.shape[-1],), jnp.float32)
        return _normalize(x, scale, self.epsilon).astype(self.dtype)


@functools.partial(jax.checkpoint, static_argnums=(2,))
def _normalize(x: Array, scale: Array, epsilon: float) -> Array:
    """Keep only the inputs for the backward pass: the steps between are cheap."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normal = wide * jax.lax.rsqrt(mean_square + epsilon)
    scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return normal * scale
