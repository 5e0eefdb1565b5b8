"""The attention layer: projections and rotation around an attention function.

What is attended to, the tokens of a packed row or the slots of a cache, is the
`attend` function passed in; the layer is the same for both.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float
from realjax.models import rotary
from realjax.models.axes import KEY_VALUE, QUERY, Constrain, unconstrained
from realjax.models.config import ModelConfig
from realjax.models.projection import Projection

# (query, key, value) -> (output, whatever the caller wants back, such as a cache)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and without biases.

    Query head h reads key and value head h // (H / N).
    """

    config: ModelConfig
    kernel_init: nn.initializers.Initializer
    output_init: nn.initializers.Initializer
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rotation: rotary.Rotation, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Project, rotate, attend, project back; also return what `attend` did."""

        def project(num_heads: int, name: str) -> Array:
            features = (num_heads, self.config.head_dim)
            projection = Projection(
                features, self.kernel_init, dtype=self.dtype, name=name
            )
            return projection(x)

        query = rotary.rotate(project(self.config.num_heads, "query"), rotation)
        key = rotary.rotate(project(self.config.num_kv_heads, "key"), rotation)
        value = project(self.config.num_kv_heads, "value")
        query = self.constrain(query, QUERY)
        key = self.constrain(key, KEY_VALUE)
        value = self.constrain(value, KEY_VALUE)
        attended, memory = attend(query, key, value)
        output = Projection(
            (x.shape[-1],), self.output_init, 2, dtype=self.dtype, name="output"
        )
        return output(self.constrain(attended, QUERY)), memory
