"""Pack and unpack as slices and updates, which XLA compiles for any device."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.interval_copy.blocks import Aligned, Block, Index, static_start


def pack(arrays: Sequence[jax.Array], blocks: Sequence[Block], dtype: Any) -> jax.Array:
    """Copy blocks of arrays into one buffer; see `api.pack`."""
    found = [_read(arrays, block).astype(dtype) for block in blocks]
    if len(found) > 1:
        return jnp.concatenate([block.reshape(-1) for block in found])
    # A copy, because a jitted function may return an argument as it is.
    return jnp.copy(found[0])


def unpack(
    inputs: Sequence[jax.Array],
    blocks: Sequence[Block],
    places: Sequence[tuple[Index, ...]],
    *,
    shape: tuple[int, ...],
    dtype: np.dtype,
    into: jax.Array | None,
    eta: jax.Array | float | None,
) -> jax.Array:
    """Copy blocks of buffers and arrays to their places; see `api.unpack`."""
    found = [_read(inputs, block) for block in blocks]
    if into is None:
        found = [block.astype(dtype) for block in found]
        if len(blocks) == 1 and blocks[0].size == shape:
            return jnp.copy(found[0])
        joined = _joined(places)
        if joined is not None:
            axis, order = joined
            return jnp.concatenate([found[index] for index in order], axis=axis)
    whole = jax.lax.empty(shape, dtype) if into is None else into
    for block, size, place in zip(
        found, (block.size for block in blocks), places, strict=True
    ):
        if eta is not None:
            # Read where it is written, so that a donated array is updated in place.
            old = jax.lax.dynamic_slice(whole, _as32(place), size)
            block = average(block, old, eta)
        whole = jax.lax.dynamic_update_slice(whole, block.astype(dtype), _as32(place))
    return whole


def num_launches(
    blocks: Sequence[Block], places: Sequence[tuple[Index, ...]], *, is_whole: bool
) -> int:
    """Return how many launches XLA makes of an unpacking, at least.

    Seen in programs compiled for an H200: blocks that are joined are one fusion; of
    others each is written by one, and averages are often read by another one before.

    Args:
        blocks: to unpack.
        places: theirs.
        is_whole: there is no array to write into.
    """
    is_joined = is_whole and (len(blocks) == 1 or _joined(places) is not None)
    return 1 if is_joined else len(blocks)


def _read(inputs: Sequence[jax.Array], block: Block) -> jax.Array:
    array = inputs[block.input]
    if block.offset is not None:
        flat = jax.lax.slice_in_dim(
            array, block.offset, block.offset + block.num_elements
        )
        return flat.reshape(block.size)
    if block.start is None or block.size == array.shape:
        return array
    start = static_start(block.start)
    if start is not None:
        stops = [at + size for at, size in zip(start, block.size, strict=True)]
        return jax.lax.slice(array, start, stops)
    return jax.lax.dynamic_slice(array, _as32(block.start), block.size)


def average(new: jax.Array, old: jax.Array, eta: jax.Array | float) -> jax.Array:
    """Return eta new + (1 - eta) old in float32, with the same bits in every program.

    A compiler may round a product and a sum once or twice, and does so in one program
    and not in another. Copies of a block that devices average on their own would drift
    apart: so each product passes through a minimum, which nothing can be fused across.
    """
    weight = jnp.asarray(eta, jnp.float32)
    # Infinite for every weight there is, which the compiler cannot know.
    bound = jnp.where(weight < 2, jnp.inf, 0.0).astype(jnp.float32)
    parts = weight * new.astype(jnp.float32), (1 - weight) * old.astype(jnp.float32)
    return jnp.minimum(parts[0], bound) + jnp.minimum(parts[1], bound)


def _joined(
    places: Sequence[tuple[Index, ...]],
) -> tuple[int, list[int]] | None:
    """Return along which one dimension blocks follow each other, and their order."""
    starts = [static_start(place) for place in places]
    known = [start for start in starts if start is not None]
    if len(known) < len(starts):
        return None
    columns = list(zip(*known, strict=True))
    axes = [axis for axis, column in enumerate(columns) if len(set(column)) > 1]
    if len(axes) != 1:
        return None
    column = columns[axes[0]]
    return axes[0], sorted(range(len(column)), key=lambda index: column[index])


def _as32(start: Sequence[Index]) -> list[jax.Array | np.int32]:
    plain = [index.value if isinstance(index, Aligned) else index for index in start]
    return [
        np.int32(index) if isinstance(index, int | np.integer) else index
        for index in plain
    ]
