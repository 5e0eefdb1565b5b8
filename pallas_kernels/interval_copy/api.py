"""Pack and unpack, and the choice of an implementation."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from pallas_kernels import _dispatch
from pallas_kernels.interval_copy import mosaic, slices
from pallas_kernels.interval_copy.blocks import Block, Index, packed_dtype
from pallas_kernels.interval_copy.plans import UNIT, Plan, plan_of
from pallas_kernels.interval_copy.requests import (
    packing,
    request_of,
    unpacking,
)


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
        implementation: "mosaic" or "slices"; None chooses, see `explain_pack`.

    Raises:
        ValueError: arrays of several types and no `dtype`, or no implementation has
            that name.
    """
    buffer_dtype = packed_dtype([arrays[block.input] for block in blocks], dtype)
    pairs, shape = packing(blocks)
    buffer = jax.ShapeDtypeStruct(shape, buffer_dtype)
    request = request_of(arrays, [buffer], pairs, is_mixed=False)
    choice = _dispatch.choose("pack", _PACK, request, name=implementation)
    if choice.name == "slices":
        return slices.pack(arrays, blocks, buffer_dtype)
    return choice.function(arrays, [jax.lax.empty(shape, buffer_dtype)], request)[0]


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
        implementation: "mosaic" or "slices"; None chooses, see `explain_unpack`.

    Raises:
        ValueError: a weight and nothing to average with, or no implementation has that
            name.
    """
    if eta is not None and into is None:
        raise ValueError(
            "Found a weight and no array to average with. Give `into`, or leave `eta`"
            " out to copy the blocks."
        )
    whole = jax.ShapeDtypeStruct(shape, dtype)
    pairs = unpacking(blocks, places)
    launches = slices.num_launches(blocks, places, is_whole=into is None)
    request = request_of(
        inputs, [whole], pairs, is_mixed=eta is not None, num_slices=launches
    )
    choice = _dispatch.choose("unpack", _UNPACK, request, name=implementation)
    if choice.name == "slices":
        return slices.unpack(
            inputs,
            blocks,
            places,
            shape=shape,
            dtype=np.dtype(dtype),
            into=into,
            eta=eta,
        )
    written = jax.lax.empty(shape, dtype) if into is None else into
    return choice.function(inputs, [written], request, eta=eta)[0]


def plan_copy(
    sources: Sequence[Any],
    targets: Sequence[Any],
    pairs: Sequence[tuple[Block, Block]],
    *,
    granule: int | None = None,
    num_rows: int | None = None,
) -> Plan:
    """Write down what `copy` shall copy, as data.

    Plans between arrays of equal shapes serve one compiled program where their static
    attributes and the numbers of their rows are the same.

    Args:
        sources: the arrays that are read, or `jax.ShapeDtypeStruct`s.
        targets: the arrays that are written, likewise.
        pairs: a block of a source, and the block of a target that it goes to.
        granule: elements that are moved at once at most, a power of two, 128 or more;
            fewer where blocks are not made of so many. None takes what is best.
        num_rows: of each table, at least as many as there are blocks; None takes so
            many.

    Raises:
        ValueError: the kernel cannot copy so, or there is no such granule.
    """
    request = request_of(sources, targets, pairs, is_mixed=False)
    if reason := mosaic.unsupported_shapes(request):
        raise ValueError(f"No plan for these blocks: {reason}.")
    most = mosaic.LARGEST_GRANULE if granule is None else granule
    if most < UNIT or most & (most - 1):
        raise ValueError(
            f"A granule of {granule} elements is none. Give a power of two, {UNIT} at"
            " least, or None."
        )
    return plan_of(request.rows, most, num_rows=num_rows)


def copy(
    sources: Sequence[Shaped[Array, "..."]],
    targets: Sequence[Shaped[Array, "..."]],
    plan: Plan,
    *,
    eta: Float[Array, ""] | float | None = None,
    layout: mosaic.Blocks | None = None,
) -> list[Shaped[Array, "..."]]:
    """Copy blocks of sources to blocks of targets by a plan that is data.

        target[there] = source[here]
        target[there] = eta source[here] + (1 - eta) target[there]

    There is one implementation, "mosaic".

    Args:
        sources: what is read, of the shapes that the plan was made for.
        targets: what is written, in place where the caller donates them; no two blocks
            may overlap there.
        plan: from `plan_copy`.
        eta: the weight of what is read; None copies it.
        layout: of the kernel; None takes what was measured.

    Returns:
        The targets as they are then.

    Raises:
        ValueError: this device or these types cannot be served.
    """
    request = request_of(sources, targets, [], is_mixed=eta is not None)
    if reason := mosaic.unsupported_types(request):
        raise ValueError(f"copy cannot run as 'mosaic': {reason}.")
    return mosaic.copy(sources, targets, plan, request, eta=eta, layout=layout)


def explain_pack(
    arrays: Sequence[Any],
    blocks: Sequence[Block],
    *,
    dtype: Any = None,
    device: _dispatch.Device | None = None,
    implementation: str | None = None,
) -> str:
    """Say how `pack` would run, and why not otherwise.

    Args:
        arrays: as for `pack`, or `jax.ShapeDtypeStruct`s.
        blocks: as for `pack`.
        dtype: as for `pack`.
        device: the one to copy on; None is the one of this process.
        implementation: as for `pack`.
    """
    buffer_dtype = packed_dtype([arrays[block.input] for block in blocks], dtype)
    pairs, shape = packing(blocks)
    buffer = jax.ShapeDtypeStruct(shape, buffer_dtype)
    request = request_of(arrays, [buffer], pairs, is_mixed=False, device=device)
    return _dispatch.choose("pack", _PACK, request, name=implementation).explanation


def explain_unpack(
    inputs: Sequence[Any],
    blocks: Sequence[Block],
    places: Sequence[tuple[Index, ...]],
    *,
    shape: tuple[int, ...],
    dtype: Any,
    is_whole: bool = True,
    is_mixed: bool = False,
    device: _dispatch.Device | None = None,
    implementation: str | None = None,
) -> str:
    """Say how `unpack` would run, and why not otherwise.

    Args:
        inputs: as for `unpack`, or `jax.ShapeDtypeStruct`s.
        blocks: as for `unpack`.
        places: as for `unpack`.
        shape: as for `unpack`.
        dtype: as for `unpack`.
        is_whole: there is no `into`.
        is_mixed: there is a weight.
        device: the one to copy on; None is the one of this process.
        implementation: as for `unpack`.
    """
    whole = jax.ShapeDtypeStruct(shape, dtype)
    pairs = unpacking(blocks, places)
    launches = slices.num_launches(blocks, places, is_whole=is_whole)
    request = request_of(
        inputs,
        [whole],
        pairs,
        is_mixed=is_mixed,
        num_slices=launches,
        device=device,
    )
    return _dispatch.choose("unpack", _UNPACK, request, name=implementation).explanation


_MOSAIC = _dispatch.Implementation(
    name="mosaic",
    function=mosaic.run,
    unsupported=mosaic.unsupported,
    unwise=mosaic.unwise,
)
_PACK = (_MOSAIC, _dispatch.Implementation(name="slices", function=slices.pack))
_UNPACK = (_MOSAIC, _dispatch.Implementation(name="slices", function=slices.unpack))
