"""The matrix product of every layer, and the low-rank adapter beside it."""

import functools
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float, UInt
from realjax.models import quantized
from realjax.models.config import Adapters
from realjax.models.quantized import Quantized

# The name of these products for rematerialisation policies, which do not see inside a
# function with a gradient of its own.
PRODUCT = "product"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(
    x: Float[Array, "*inputs"], kernel: Float[Array, "*features"], num_contracted: int
) -> Float[Array, "*outputs"]:
    """Contract the last dimensions of `x` with the first of `kernel`, in x's dtype.

    The gradient of a float32 kernel stays float32: a sum over tokens, and over the
    devices that share them, is not rounded to the dtype of the products on its way.

    JAX's own gradient of the kernel is the transpose of (cotangent x input), and XLA
    then writes the cotangent transposed first, on CPU at several times the cost of
    the product. This one is (input x cotangent), which needs no transpose.
    """
    last = tuple(range(x.ndim - num_contracted, x.ndim))
    kernel = kernel.astype(x.dtype)
    return jax.lax.dot_general(
        x, kernel, ((last, tuple(range(num_contracted))), ((), ()))
    )


def _project_forward(x: Array, kernel: Array, num_contracted: int):
    return project(x, kernel, num_contracted), (x, kernel)


def _project_backward(num_contracted: int, saved, cotangent: Array):
    x, kernel = saved
    num_tokens_axes = x.ndim - num_contracted
    outputs = tuple(range(num_tokens_axes, cotangent.ndim))
    features = tuple(range(num_contracted, kernel.ndim))
    tokens = tuple(range(num_tokens_axes))
    x_bar = jax.lax.dot_general(
        cotangent, kernel.astype(x.dtype), ((outputs, features), ((), ()))
    )
    kernel_bar = jax.lax.dot_general(
        x, cotangent, ((tokens, tokens), ((), ())), preferred_element_type=kernel.dtype
    )
    return x_bar, kernel_bar


project.defvjp(_project_forward, _project_backward)


def project_quantized(
    x: Float[Array, "*inputs"], kernel: Quantized, num_contracted: int
) -> Float[Array, "*outputs"]:
    """Contract as `project` does; the sums are float32 until they are scaled."""
    last = tuple(range(x.ndim - num_contracted, x.ndim))
    sums = jax.lax.dot_general(
        x,
        quantized.numbers(kernel, x.dtype),
        ((last, tuple(range(num_contracted))), ((), ())),
        preferred_element_type=jnp.float32,
    )
    scale = jnp.expand_dims(kernel.scale, tuple(range(sums.ndim - kernel.scale.ndim)))
    return (sums * scale).astype(x.dtype)


def reduced(
    x: Float[Array, "B T *inputs"],
    kernel: Float[Array, "*inputs R"],
    adapters: Adapters,
    noise_keys: UInt[Array, "B T W"] | None,
    name: str,
) -> Float[Array, "B T R"]:
    """Apply the first matrix of an adapter, A, in x's dtype; in training to dropout(x).

    Args:
        x: inputs of the projection.
        kernel: A.
        adapters: of the model.
        noise_keys: data of a random key for each token of this layer; None drops
            nothing.
        name: of the projection; each drops others.
    """
    if noise_keys is not None and adapters.dropout:
        x = _dropped(x, noise_keys, adapters.dropout, name)
    return project(x, kernel, kernel.ndim - 1)


def _dropped(x: Array, noise_keys: Array, rate: float, name: str) -> Array:
    """Zero a share of each token's inputs, and multiply the others by 1 / (1 - rate).

    What a token loses follows from its key alone, whatever row it is in.
    """
    salt = zlib.crc32(name.encode())

    def draw(data: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(data), salt)
        return jax.random.bernoulli(key, 1 - rate, x.shape[2:])

    is_kept = jax.vmap(jax.vmap(draw))(noise_keys)
    return jnp.where(is_kept, x / (1 - rate), 0).astype(x.dtype)


class Projection(nn.Module):
    """A learned matrix, of any number of input and output dimensions.

    Where there are parameters of an adapter beside its own it adds what that gives.
    """

    features: tuple[int, ...]
    kernel_init: nn.initializers.Initializer
    num_contracted: int = 1
    has_bias: bool = False
    dtype: DTypeLike = jnp.float32
    adapters: Adapters | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*inputs"],
        noise_keys: UInt[Array, "B T W"] | None = None,
        shared: Float[Array, "B T R"] | None = None,
    ) -> Float[Array, "*outputs"]:
        """Project every token.

        Args:
            x: inputs.
            noise_keys: for the dropout of the adapter; see `reduced`.
            shared: what an adapter's first matrix gives, where projections share it.
        """
        x = x.astype(self.dtype)
        shape = (*x.shape[x.ndim - self.num_contracted :], *self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        multiply: Any = project_quantized if isinstance(kernel, Quantized) else project
        out = multiply(x, kernel, self.num_contracted)
        out = checkpoint_name(out, PRODUCT)
        if self.adapters is not None and self.has_variable("params", "lora_b"):
            if shared is None:
                first = self.get_variable("params", "lora_a")
                shared = reduced(x, first, self.adapters, noise_keys, str(self.name))
            second = self.get_variable("params", "lora_b")
            update: Any = project(shared, second, 1)
            out = out + self.adapters.scale * update
        if not self.has_bias:
            return out
        zeros = nn.initializers.zeros_init()
        bias = self.param("bias", zeros, self.features, jnp.float32)
        leading = tuple(range(out.ndim - bias.ndim))
        return out + jnp.expand_dims(bias, leading).astype(out.dtype)
