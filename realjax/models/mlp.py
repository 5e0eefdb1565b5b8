"""The gated feed-forward layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float
from realjax.models.axes import MLP, Constrain, unconstrained


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

        def dense(features: int, name: str, init: nn.initializers.Initializer):
            return nn.DenseGeneral(
                features, use_bias=False, dtype=self.dtype, kernel_init=init, name=name
            )

        gate = dense(self.mlp_width, "gate", self.kernel_init)(x)
        up = dense(self.mlp_width, "up", self.kernel_init)(x)
        hidden = self.constrain(jax.nn.silu(gate) * up, MLP)
        return dense(x.shape[-1], "down", self.output_init)(hidden)
