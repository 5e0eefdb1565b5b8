"""Quantizing where parameters lie: the last step of a reallocation to 8 bits.

What moves between devices are whole numbers in the type of the products; each device
then quantizes its part. Matrix by matrix, so that beside the whole there is never more
than one of them in 8 bits too many.
"""

import functools
from typing import Any

import jax

from realjax.core.arrays import Array, PyTree
from realjax.models import quantized
from realjax.models.quantized import Quantized
from realjax.parallel.sharding import handles


def quantize(
    parameters: PyTree, shardings: PyTree, dtype: str, *, donate: bool = False
) -> PyTree:
    """Return a model's parameters with matrices of 8 bits.

    Args:
        parameters: Of a model, on the devices of the shardings.
        shardings: Of the twin that `models.quantized.abstract` gives.
        dtype: One of `models.quantized.DTYPES`.
        donate: Each matrix is freed once it is quantized. Nothing else may read them.
    """

    def leaf(path: tuple[Any, ...], array: Array, sharding: Any) -> Any:
        axes = quantized.summed_axes(path)
        if not axes:
            return array
        program = _program(dtype, axes, sharding)
        if not array.sharding.addressable_devices:
            described = jax.eval_shape(program, array)
            placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
            return handles(jax.tree.map(placed, described, sharding))
        made = program(array)
        if donate:
            array.delete()
        return made

    return jax.tree_util.tree_map_with_path(leaf, parameters, shardings)


@functools.lru_cache(maxsize=4096)
def _program(dtype: str, axes: tuple[int, ...], shardings: Quantized) -> Any:
    quantize = functools.partial(quantized.in_eight_bits, dtype=dtype, axes=axes)
    return jax.jit(quantize, out_shardings=shardings)
