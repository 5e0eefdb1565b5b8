"""What the choice of an implementation looks at, and how calls become pairs of blocks.

Packing, unpacking and copying are the same work: each block of a source goes to a block
of a target. A buffer is a target of which every block is a part.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pallas_kernels import _dispatch
from pallas_kernels.interval_copy.blocks import Block, Index
from pallas_kernels.interval_copy.plans import Row, divisor_of_all, rows_of

Pair = tuple[Block, Block]
"""A block of a source, and the block of a target it goes to."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Blocks to copy.

    Attributes:
        rows: one for each block that has elements.
        source_shapes: of the arrays read.
        target_shapes: of the arrays written.
        source_dtypes: of the arrays read.
        target_dtypes: of the arrays written.
        is_mixed: the result is an average with what was there.
        num_slices: launches of the program that XLA makes of slices.
        device: what the program is for.
    """

    rows: tuple[Row, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    target_shapes: tuple[tuple[int, ...], ...]
    source_dtypes: tuple[str, ...]
    target_dtypes: tuple[str, ...]
    is_mixed: bool
    num_slices: int
    device: _dispatch.Device

    @property
    def num_pairs(self) -> int:
        """Different pairs of a source and a target."""
        return len({row.pair for row in self.rows})

    @property
    def divisor(self) -> int:
        """What every number of elements in rows and arrays is a multiple of."""
        return divisor_of_all(self.rows, self.source_shapes, self.target_shapes)

    @property
    def num_outer(self) -> int:
        """The most dimensions of a block beside what lies together."""
        return max((len(row.sizes) for row in self.rows), default=0)


def request_of(
    sources: Sequence[Any],
    targets: Sequence[Any],
    pairs: Sequence[Pair],
    *,
    is_mixed: bool,
    num_slices: int = 1,
    device: _dispatch.Device | None = None,
) -> Request:
    """Describe what is to be copied.

    Args:
        sources: arrays, or `jax.ShapeDtypeStruct`s.
        targets: likewise.
        pairs: their blocks.
        is_mixed: the result is an average with what was there.
        num_slices: launches of the program that XLA makes of slices.
        device: the one to copy on; None is the one that the code around is traced for.
    """
    source_shapes = tuple(array.shape for array in sources)
    target_shapes = tuple(array.shape for array in targets)
    return Request(
        rows=rows_of(pairs, source_shapes, target_shapes),
        source_shapes=source_shapes,
        target_shapes=target_shapes,
        source_dtypes=tuple(np.dtype(array.dtype).name for array in sources),
        target_dtypes=tuple(np.dtype(array.dtype).name for array in targets),
        is_mixed=is_mixed,
        num_slices=num_slices,
        device=device or _dispatch.device(),
    )


def packing(blocks: Sequence[Block]) -> tuple[list[Pair], tuple[int, ...]]:
    """Return where in the buffer each block goes, and the shape of the buffer."""
    pairs, offset = [], 0
    for block in blocks:
        pairs.append((block, Block(input=0, size=block.size, offset=offset)))
        offset += block.num_elements
    return pairs, blocks[0].size if len(blocks) == 1 else (offset,)


def unpacking(
    blocks: Sequence[Block], places: Sequence[tuple[Index, ...]]
) -> list[Pair]:
    """Return where in the array each block goes."""
    return [
        (block, Block(input=0, size=block.size, start=tuple(place)))
        for block, place in zip(blocks, places, strict=True)
    ]
