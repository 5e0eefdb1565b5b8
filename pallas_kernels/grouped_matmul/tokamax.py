"""The grouped product by tokamax, whose kernels for Hopper work on groups of any size.

tokamax is an optional dependency (`pip install realjax[tokamax]`).
"""

import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import Device

# Which dimension of both is summed over, which one is cut in groups, and which one of
# the second array has a group's number.
_ROWS = jax.lax.RaggedDotDimensionNumbers((([1], [1]), ([], [])), [0], [0])
_ROWS_BACK = jax.lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
_KERNELS = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])


def multiply(
    x: Float[Array, "T D"],
    kernels: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    *,
    through: str = "mosaic",
) -> Float[Array, "T F"]:
    """Multiply as `api.grouped_matmul` does, on one device.

    Args:
        x: rows, sorted by group.
        kernels: one matrix per group.
        group_sizes: rows of each group.
        through: of tokamax's implementations; "xla" runs anywhere, for tests.
    """
    return _multiply(through, x, kernels, group_sizes)


def _forward(through: str, x, kernels, group_sizes):
    narrow = kernels.astype(x.dtype)
    out = _product(through, x, narrow, group_sizes, _ROWS, x.dtype)
    return _only_grouped(out, group_sizes), (x, kernels, group_sizes)


def _backward(through: str, saved, out_bar):
    x, kernels, group_sizes = saved
    narrow = kernels.astype(x.dtype)
    # What a row of no group holds may be NaN, which nothing may read.
    x, out_bar = (_only_grouped(rows, group_sizes) for rows in (x, out_bar))
    x_bar = _product(through, out_bar, narrow, group_sizes, _ROWS_BACK, x.dtype)
    kernels_bar = _product(through, x, out_bar, group_sizes, _KERNELS, kernels.dtype)
    return _only_grouped(x_bar, group_sizes), kernels_bar, None


def _plain(through: str, x, kernels, group_sizes):
    return _forward(through, x, kernels, group_sizes)[0]


_multiply: Any = jax.custom_vjp(_plain, nondiff_argnums=(0,))
_multiply.defvjp(_forward, _backward)


def _product(through: str, x, y, group_sizes, dimensions, dtype) -> Array:
    tokamax: Any = importlib.import_module("tokamax")
    return tokamax.ragged_dot_general(
        *(x, y, group_sizes, dimensions),
        preferred_element_type=jnp.dtype(dtype),
        implementation=through,
    )


def _only_grouped(rows: Array, group_sizes: Array) -> Array:
    """Set the rows past the last group to 0."""
    place = jnp.arange(rows.shape[0], dtype=group_sizes.dtype)
    is_grouped = place < jnp.sum(group_sizes)
    return jnp.where(is_grouped[:, None], rows, 0).astype(rows.dtype)


def unsupported(*, dtype: jnp.dtype, device: Device) -> str | None:
    """Return why tokamax cannot multiply so, or None."""
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed; `pip install realjax[tokamax]` adds it"
    if device.platform != "gpu" or device.compute_capability is None:
        return f"its kernel needs an NVIDIA GPU, and this is for {device.platform}"
    if device.compute_capability[0] != 9:
        return f"its kernel is taken on Hopper, and this GPU is {device.kind}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"its kernel takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    return None
