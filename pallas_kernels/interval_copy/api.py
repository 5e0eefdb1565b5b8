"""Pack and unpack, and the choice of an implementation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from pallas_kernels import _dispatch
from pallas_kernels.interval_copy import slices
from pallas_kernels.interval_copy.blocks import Block, Index, packed_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the choice of an implementation looks at.

    Attributes:
        sizes: of the blocks.
        source_dtypes: of the inputs.
        dtype: of the result.
        is_mixed: the result is an average with what was there.
        device: what the program is for.
    """

    sizes: tuple[tuple[int, ...], ...]
    source_dtypes: tuple[str, ...]
    dtype: str
    is_mixed: bool
    device: _dispatch.Device


def pack(
    arrays: Sequence[Shaped[Array, "..."]],
    blocks: Sequence[Block],
    *,
    dtype: Any = None,
    implementation: str | None = None,
) -> Shaped[Array, "..."]:
    """Copy blocks of arrays into one buffer, one behind the other.

        arrays   |  . [a a] . |  [b] . . |
        buffer   | a a b |

    A single block keeps its shape; several lie flat, each in row-major order, so that
    the offset of one is the number of elements before it.

    Args:
        arrays: what the blocks are of.
        blocks: in the order of the buffer.
        dtype: of the buffer; None takes that of the arrays.
        implementation: "slices"; None chooses.

    Raises:
        ValueError: arrays of several types and no `dtype`, or no implementation has
            that name.
    """
    buffer_dtype = packed_dtype([arrays[block.input] for block in blocks], dtype)
    request = _request(arrays, blocks, buffer_dtype, is_mixed=False)
    choice = _dispatch.choose("pack", _PACK, request, name=implementation)
    return choice.function(arrays, blocks, buffer_dtype)


def unpack(
    inputs: Sequence[Shaped[Array, "..."]],
    blocks: Sequence[Block],
    places: Sequence[tuple[Index, ...]],
    *,
    shape: tuple[int, ...],
    dtype: Any,
    into: Shaped[Array, "..."] | None = None,
    eta: Float[Array, ""] | float | None = None,
    implementation: str | None = None,
) -> Shaped[Array, "..."]:
    """Copy blocks of buffers and arrays to their places in an array.

        out[place : place + size] = block

    or, where `eta` is given, the average with what was there, in float32:

        out[place : place + size] = eta block + (1 - eta) into[place : place + size]

    The result shares no buffer with an input, unless the caller donates `into`, which
    then is written in place. Blocks must not overlap there; without `into` they cover
    the whole array.

    Args:
        inputs: what the blocks are of.
        blocks: of the inputs.
        places: where each block begins in the result.
        shape: of the result.
        dtype: of the result; blocks are cast to it.
        into: what the result is where no block lies.
        eta: the weight of the blocks; None copies them.
        implementation: "slices"; None chooses.

    Raises:
        ValueError: a weight and nothing to average with, or no implementation has that
            name.
    """
    if eta is not None and into is None:
        raise ValueError(
            "Found a weight and no array to average with. Give `into`, or leave `eta`"
            " out to copy the blocks."
        )
    request = _request(inputs, blocks, dtype, is_mixed=eta is not None)
    choice = _dispatch.choose("unpack", _UNPACK, request, name=implementation)
    return choice.function(
        inputs, blocks, places, shape=shape, dtype=np.dtype(dtype), into=into, eta=eta
    )


def _request(
    inputs: Sequence[jax.Array], blocks: Sequence[Block], dtype: Any, *, is_mixed: bool
) -> Request:
    return Request(
        sizes=tuple(block.size for block in blocks),
        source_dtypes=tuple(array.dtype.name for array in inputs),
        dtype=np.dtype(dtype).name,
        is_mixed=is_mixed,
        device=_dispatch.device(),
    )


_PACK = (_dispatch.Implementation(name="slices", function=slices.pack),)
_UNPACK = (_dispatch.Implementation(name="slices", function=slices.unpack),)
