"""The attention layer: projections and rotation around an attention function.

What is attended to, the tokens of a packed row or those in pages, is the
`attend` function passed in; the layer is the same for both.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float, UInt
from realjax.models import rotary
from realjax.models.axes import KEY_VALUE, QUERY
from realjax.models.config import ModelConfig
from realjax.models.norm import Norm
from realjax.models.partition import WHOLE, Partition
from realjax.models.projection import Projection, reduced

# (query, key, value) -> (output, whatever the caller wants back, such as a pool)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class Attention(nn.Module):
    """Grouped-query attention.

    Query head h reads key and value head h // (H / N).
    """

    config: ModelConfig
    kernel_init: nn.initializers.Initializer
    output_init: nn.initializers.Initializer
    dtype: DTypeLike = jnp.float32
    partition: Partition = WHOLE

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: rotary.Rotation | None,
        attend: Attend,
        noise_keys: UInt[Array, "B T W"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Project, rotate, attend, project back; also return what `attend` did."""
        config, constrain = self.config, self.partition.constrain
        shared = None
        if config.adapters is not None and self.has_variable("params", "lora_a"):
            first = self.get_variable("params", "lora_a")
            cast = x.astype(self.dtype)
            shared = reduced(cast, first, config.adapters, noise_keys, "attention")

        def project(num_heads: int, name: str) -> Array:
            return Projection(
                (num_heads, config.head_dim),
                self.kernel_init,
                has_bias=config.has_qkv_bias,
                dtype=self.dtype,
                adapters=config.adapters,
                name=name,
            )(x, noise_keys, shared)

        def turned(heads: Array, name: str) -> Array:
            if config.has_query_key_norm:
                norm = Norm(config.norm, config.norm_epsilon, self.dtype, name=name)
                heads = norm(heads)
            return heads if rotation is None else rotary.rotate(heads, rotation)

        query = turned(project(config.num_heads, "query"), "query_norm")
        key = turned(project(config.num_kv_heads, "key"), "key_norm")
        value = project(config.num_kv_heads, "value")
        attended, memory = attend(
            constrain(query, QUERY), self._repeated(key), self._repeated(value)
        )
        output = Projection(
            (x.shape[-1],),
            self.output_init,
            2,
            has_bias=config.has_output_bias,
            dtype=self.dtype,
            adapters=config.adapters,
            name="output",
        )
        return output(constrain(attended, QUERY), noise_keys), memory

    def _repeated(self, heads: Float[Array, "B T N K"]) -> Float[Array, "B T M K"]:
        """Repeat key or value heads so that every part has those its queries read.

        With 8 query heads over 4 parts and 2 key heads: each key head twice, so part 1,
        query heads 2 and 3, has key head 0. XLA keeps only the local one of the copies.
        """
        num_heads = self.partition.num_kv_heads(heads.shape[2])
        if num_heads != heads.shape[2]:
            heads = jnp.repeat(heads, num_heads // heads.shape[2], axis=2)
        return self.partition.constrain(heads, KEY_VALUE)
