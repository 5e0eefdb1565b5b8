"""The definition of pack and unpack in NumPy. For tests."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pallas_kernels.interval_copy.blocks import Aligned, Block, Index


def pack(arrays: Sequence[np.ndarray], blocks: Sequence[Block], dtype: Any) -> Any:
    """Copy blocks of arrays into one buffer."""
    if len(blocks) == 1:
        return _block(arrays, blocks[0]).astype(dtype)
    return np.concatenate(
        [_block(arrays, block).astype(dtype).reshape(-1) for block in blocks]
    )


def unpack(
    inputs: Sequence[np.ndarray],
    blocks: Sequence[Block],
    places: Sequence[tuple[Index, ...]],
    *,
    shape: tuple[int, ...],
    dtype: Any,
    into: np.ndarray | None = None,
    eta: float | None = None,
) -> np.ndarray:
    """Copy, or mix in float32, blocks to their places in an array."""
    out = np.zeros(shape, dtype) if into is None else np.array(into)
    for block, place in zip(blocks, places, strict=True):
        values = _block(inputs, block)
        corner = zip(_known(place), block.size, strict=True)
        at = tuple(slice(low, low + size) for low, size in corner)
        new = values.astype(dtype)
        if eta is not None:
            weight = np.float32(eta)
            old = out[at].astype(np.float32)
            new = weight * values.astype(np.float32) + (1 - weight) * old
        out[at] = new
    return out


def _block(arrays: Sequence[np.ndarray], block: Block) -> np.ndarray:
    array = np.asarray(arrays[block.input])
    if block.offset is not None:
        stop = block.offset + math.prod(block.size)
        return array[block.offset : stop].reshape(block.size)
    corner = zip(_known(block.start or (0,) * len(block.size)), block.size, strict=True)
    return array[tuple(slice(low, low + size) for low, size in corner)]


def _known(start: Sequence[Index]) -> list[int]:
    return [int(at.value if isinstance(at, Aligned) else at) for at in start]
