"""The normalisations of the families."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float


class Norm(nn.Module):
    """Normalisation of the last dimension, in float32 whatever the dtype.

    "rms" is x / sqrt(mean(x²) + epsilon) × scale (Zhang and Sennrich 2019,
    https://arxiv.org/abs/1910.07467, eq. 4); "gemma" the same with 1 + scale; "layer"
    is (x - mean) / sqrt(variance + epsilon) × scale + bias (Ba et al. 2016,
    https://arxiv.org/abs/1607.06450).
    """

    kind: str
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last dimension."""
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        shape = (x.shape[-1],)
        is_gemma = self.kind == "gemma"
        scale = self.param("scale", zeros if is_gemma else ones, shape, jnp.float32)
        bias = None
        if self.kind == "layer":
            bias = self.param("bias", zeros, shape, jnp.float32)
        return _normalize(x, scale, bias, self.kind, self.epsilon).astype(self.dtype)


@functools.partial(jax.checkpoint, static_argnums=(3, 4))
def _normalize(
    x: Array, scale: Array, bias: Array | None, kind: str, epsilon: float
) -> Array:
    """Keep only the inputs for the backward pass: the steps between are cheap."""
    wide = x.astype(jnp.float32)
    if kind == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normal = wide * jax.lax.rsqrt(mean_square + epsilon)
    expand = lambda p: jnp.expand_dims(
        p.astype(jnp.float32), tuple(range(x.ndim - p.ndim))
    )
    result = normal * (expand(scale) + (1.0 if kind == "gemma" else 0.0))
    return result if bias is None else result + expand(bias)
