"""The gated feed-forward layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float
from realjax.models.axes import MLP, Constrain, unconstrained
from realjax.models.projection import Projection


class GatedMLP(nn.Module):
    """down(silu(gate(x)) × up(x)).

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, "SwiGLU".
    """

    mlp_width: int
    kernel_init: nn.initializers.Initializer
    output_init: nn.initializers.Initializer
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the layer to every token."""

        def project(features: int, name: str, init: nn.initializers.Initializer):
            return Projection((features,), init, dtype=self.dtype, name=name)

        gate = project(self.mlp_width, "gate", self.kernel_init)(x)
        up = project(self.mlp_width, "up", self.kernel_init)(x)
        hidden = self.constrain(_gated(gate, up), MLP)
        return project(x.shape[-1], "down", self.output_init)(hidden)


@jax.checkpoint
def _gated(gate: Array, up: Array) -> Array:
    """Keep only gate and up for the backward pass, not the steps between."""
    return jax.nn.silu(gate) * up
