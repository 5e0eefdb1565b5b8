"""One layer of the stack, and what sets one layer apart from another.

    x + post_norm(attention(norm(x)))   then   x + post_norm(mlp(norm(x)))

All layers of a stack are one program; what differs between them, such as a window in
every second one, are arrays with one entry for each layer.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float, Int, UInt
from realjax.models import rotary
from realjax.models.attention import Attend, Attention
from realjax.models.axes import RESIDUAL
from realjax.models.config import ModelConfig
from realjax.models.mlp import FeedForward
from realjax.models.moe import MoE, Routing
from realjax.models.norm import Norm
from realjax.models.partition import WHOLE, Partition

INIT_DEVIATION = 0.02

# The name of what enters a layer, for rematerialisation policies.
LAYER_INPUT = "layer_input"

# Wider than any row, yet a difference of two places may be compared with it.
NO_WINDOW = 2**30


class Traits(NamedTuple):
    """What sets a layer apart; None where all layers are alike."""

    index: Any
    is_real: Any  # False for the layers that only pad the stack.
    window: Any
    is_windowed: Any


def traits(config: ModelConfig) -> Traits:
    """Return the traits of all layers, stacked, in numpy."""
    missing = config.padded_num_layers - config.num_layers
    pad = lambda x, value: np.pad(x, (0, missing), constant_values=value)
    found = Traits(
        index=np.arange(config.padded_num_layers, dtype=np.int32),
        is_real=None,
        window=None,
        is_windowed=None,
    )
    if missing:
        found = found._replace(is_real=pad(np.ones(config.num_layers, bool), False))
    windows = config.layer_windows
    if len(set(windows)) > 1:
        sizes = [NO_WINDOW if size is None else size for size in windows]
        found = found._replace(
            window=pad(np.array(sizes, np.int32), NO_WINDOW),
            is_windowed=pad(np.array([size is not None for size in windows]), False),
        )
    return found


def window(config: ModelConfig, of_layer: Traits) -> Any:
    """Return the window of a layer: a number if all have it, an array, or None."""
    if of_layer.window is not None:
        return of_layer.window
    return config.layer_windows[0]


def attention_scale(config: ModelConfig, of_layer: Traits) -> Any:
    """Return the factor of a layer's scores, or None for head_dim ** -0.5."""
    if not config.is_scaled_by_layer:
        return config.attention_scale
    scale = config.attention_scale or config.head_dim**-0.5
    return scale / (of_layer.index + 1).astype(jnp.float32)


def rotation(
    rotations: tuple[rotary.Rotation, ...], of_layer: Traits
) -> rotary.Rotation | None:
    """Return the rotation of a layer: none, that of all, or that of its kind."""
    if len(rotations) < 2:
        return rotations[0] if rotations else None
    whole, local = rotations
    pick = lambda a, b: jnp.where(of_layer.is_windowed, b, a)
    return rotary.Rotation(*map(pick, whole, local))


class Block(nn.Module):
    """One layer of the stack."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    partition: Partition = WHOLE

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: rotary.Rotation | None,
        attend: Attend,
        segment_ids: Int[Array, "B T"],
        noise_keys: UInt[Array, "B T W"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Routing | None]:
        """Add attention, then the feed-forward layer, to the residual stream.

        Returns:
            The stream, what `attend` gave back, and the router's choices if there is
            one.
        """
        config, constrain = self.config, self.partition.constrain
        deviation = INIT_DEVIATION / math.sqrt(2 * config.num_layers)
        shared: dict[str, Any] = {
            "kernel_init": nn.initializers.normal(INIT_DEVIATION),
            "output_init": nn.initializers.normal(deviation),
            "dtype": self.dtype,
        }

        def norm(name: str) -> Norm:
            return Norm(config.norm, config.norm_epsilon, self.dtype, name=name)

        def add(x: Array, update: Array, name: str) -> Array:
            if config.has_post_norms:
                update = norm(f"{name}_post_norm")(update)
            return constrain(x + update, RESIDUAL)

        x = checkpoint_name(x, LAYER_INPUT)
        with jax.named_scope("attention"):
            attention = Attention(
                config, name="attention", partition=self.partition, **shared
            )
            normal = norm("attention_norm")(x)
            update, memory = attention(normal, rotation, attend, noise_keys)
            x = add(x, update, "attention")
        normal, routing = norm("mlp_norm")(x), None
        if config.moe is not None:
            moe = MoE(config, name="moe", partition=self.partition, **shared)
            update, routing = moe(normal, segment_ids, noise_keys)
        else:
            with jax.named_scope("mlp"):
                mlp = FeedForward(config, name="mlp", constrain=constrain, **shared)
                update = mlp(normal, noise_keys)
        return add(x, update, "mlp"), memory, routing
