"""The feed-forward layer, gated or plain."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float, UInt
from realjax.models.axes import MLP, Constrain, unconstrained
from realjax.models.config import ModelConfig
from realjax.models.projection import Projection


def activation(name: str) -> Callable[[Array], Array]:
    """Return the function of one of `config.ACTIVATIONS`."""
    return {
        "silu": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "relu": jax.nn.relu,
    }[name]


class FeedForward(nn.Module):
    """down(activation(gate(x)) × up(x)), or down(activation(up(x))) without a gate.

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 5 and 6.
    """

    config: ModelConfig
    kernel_init: nn.initializers.Initializer
    output_init: nn.initializers.Initializer
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        noise_keys: UInt[Array, "B T W"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Apply the layer to every token."""
        config = self.config

        def project(x: Array, features: int, name: str, init) -> Array:
            return Projection(
                (features,),
                init,
                has_bias=config.has_mlp_bias,
                dtype=self.dtype,
                adapters=config.adapters,
                name=name,
            )(x, noise_keys)

        up = project(x, config.mlp_width, "up", self.kernel_init)
        gate = None
        if config.is_gated:
            gate = project(x, config.mlp_width, "gate", self.kernel_init)
        hidden = self.constrain(activated(config.activation, gate, up), MLP)
        return project(hidden, x.shape[-1], "down", self.output_init)


@functools.partial(jax.checkpoint, static_argnums=(0,))
def activated(name: str, gate: Array | None, up: Array) -> Array:
    """Keep only gate and up for the backward pass, not the steps between."""
    if gate is None:
        return activation(name)(up)
    return activation(name)(gate) * up
