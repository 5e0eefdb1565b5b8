"""Weights of 8 bits: what is stored, and products with it.

A matrix keeps one scale for each of its output channels, so that the scale leaves the
sum over inputs:

    y_j = Σ_i x_i W_ij ≈ s_j Σ_i x_i Q_ij        s_j = max_i |W_ij| / the largest Q

Products read Q in x's dtype, which holds every number of 8 bits exactly, and multiply
their float32 sums by s. No copy of W is made: of a stack one layer is cast at a time.

Matrices of attention, of feed-forward layers and of experts are quantized. Embedding
and head (one matrix where they are tied), norms, biases and routers are a small part of
a model and a large part of the error: they stay as they are. So does whatever trains:
an optimizer's steps are smaller than those between numbers of 8 bits.

Floats of 8 bits are stored as their bits, uint8: XLA for the CPU would make a larger
type of a whole stack of such floats to read one layer of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float, PyTree, Shaped

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
DTYPES = tuple(LARGEST)
"""Types of weights."""


class Quantized(NamedTuple):
    """A matrix of 8 bits, in the place of the array that it stands for.

    Attributes:
        values: of the array's shape; int8, or the bits of float8_e4m3fn.
        scale: one for each output channel, the array's shape without the dimensions
            that a product sums over; 0 where all weights are.
    """

    values: Shaped[Array, "*features"]
    scale: Float[Array, "*outputs"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.values.shape


def numbers(kernel: Quantized, dtype: DTypeLike) -> Float[Array, "*features"]:
    """Return the stored numbers in another type, not yet multiplied by the scale."""
    values = kernel.values
    if values.dtype == jnp.uint8:
        values = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
    return values.astype(dtype)


def in_eight_bits(
    x: Float[Array, "*features"], dtype: str, axes: tuple[int, ...]
) -> Quantized:
    """Quantize an array symmetrically: to the nearest of the numbers of 8 bits.

    The error of int8 is at most half a scale, that of float8_e4m3fn at most the larger
    of 2^-4 of the weight and 2^-10 of a scale.

    Args:
        x: of any floating type.
        dtype: one of `DTYPES`.
        axes: dimensions that share a scale.
    """
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=axes, keepdims=True) / LARGEST[dtype]
    scaled = x / jnp.where(scale > 0, scale, 1.0)
    scale = jnp.squeeze(scale, axes)
    if dtype == "int8":
        return Quantized(jnp.round(scaled).astype(jnp.int8), scale)
    bits = jax.lax.bitcast_convert_type(scaled.astype(jnp.dtype(dtype)), jnp.uint8)
    return Quantized(bits, scale)


def dequantized(
    kernel: Quantized, axes: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*features"]:
    """Return the array that a quantized one stands for.

    Args:
        kernel: as `in_eight_bits` made it.
        axes: that it was given.
        dtype: of the result.
    """
    scale = jnp.expand_dims(kernel.scale, axes)
    return (numbers(kernel, jnp.float32) * scale).astype(dtype)


def summed_axes(path: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the dimensions that products with a parameter sum over.

    Args:
        path: of the parameter in the tree of a model, as JAX gives it.

    Returns:
        The dimensions; none for what is not quantized.
    """
    names = [key.key for key in path]
    if names[0] != "layers":
        return ()
    module, name = names[-2:]
    if name == "kernel":  # [L, D, …]; [L, H, K, D] of attention's output.
        return (1, 2) if module == "output" else (1,)
    if module == "moe" and name != "router":
        return (2,)  # [L, E, D, F]
    return ()


def quantize(parameters: PyTree, dtype: str) -> PyTree:
    """Quantize a model's matrices; the rest of the tree stays as it is.

    Args:
        parameters: tree of `abstract_parameters`, of arrays.
        dtype: one of `DTYPES`.
    """

    def leaf(path: tuple[Any, ...], array: Array) -> Any:
        axes = summed_axes(path)
        return in_eight_bits(array, dtype, axes) if axes else array

    return jax.tree_util.tree_map_with_path(leaf, parameters)


def abstract(parameters: PyTree, dtype: str) -> PyTree:
    """Return the abstract twin of `quantize`, whose leaves know their types.

    Args:
        parameters: tree of `abstract_parameters`.
        dtype: one of `DTYPES`; "" quantizes nothing.
    """
    stored = "int8" if dtype == "int8" else "uint8"

    def leaf(path: tuple[Any, ...], parameter: Any) -> Any:
        axes = summed_axes(path)
        if not dtype or not axes:
            return parameter
        kept = [d for d in range(len(parameter.shape)) if d not in axes]
        cut = lambda sizes: tuple(sizes[d] for d in kept)
        scale = parameter._replace(
            shape=cut(parameter.shape),
            axes=cut(parameter.axes),
            real_shape=cut(parameter.real_shape),
            dtype="float32",
        )
        return Quantized(parameter._replace(dtype=stored), scale)

    return jax.tree_util.tree_map_with_path(
        leaf, parameters, is_leaf=lambda node: hasattr(node, "axes")
    )
