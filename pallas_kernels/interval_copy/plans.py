"""What is copied where, as numbers: one row of a table for each block.

    array   . . . . . . . .        run       2 granules lie together here and there
            . . a a . . a a        sizes     2 such runs in a line, 1 line
            . . . . . . . .        strides   4 granules from run to run in the array,
    buffer  a a a a                          2 in the buffer

The numbers are data: one program serves every plan between arrays of equal shapes, as
long as the table has as many rows. They count granules, which are the elements that are
read and written at once, so no access has to find out where it may begin. A program
knows the granule for each pair of a source and a target.

A launch takes few of those pairs, as its program has code for each. A plan has a table
for every launch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.interval_copy.blocks import (
    Aligned,
    Block,
    Index,
    divisor_of,
)

UNIT = 128
"""Elements of the smallest granule: one for each thread."""

# The columns. FIRST counts the units of the rows before; strides and sizes go from the
# innermost dimension outwards, and the outermost size follows from FIRST.
FIRST, PAIR, SOURCE, TARGET, RUN = range(5)
SIZES = (5, 6)
SOURCE_STRIDES = (7, 8, 9)
TARGET_STRIDES = (10, 11, 12)
NUM_COLUMNS = 16

MOST_OUTER = 3
"""Dimensions beside the run."""

MOST_PAIRS = 16
"""Pairs of a source and a target in one launch; each takes the compiler a while."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is copied where.

    Attributes:
        tables: for each launch, its rows and one that ends them.
        pairs: for each launch, which (source, target) it copies between.
        granules: for each launch and pair, elements read and written at once.
    """

    tables: tuple[Any, ...]
    pairs: tuple[tuple[tuple[int, int], ...], ...] = dataclasses.field(
        metadata={"static": True}
    )
    granules: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Side:
    """Where a block is: strides in elements, and where it begins."""

    strides: tuple[int, ...]
    base: int
    moving: tuple[tuple[int, Index], ...]  # stride, and a start not known yet

    @property
    def divisor(self) -> int:
        """What the place of the block is a multiple of, in elements."""
        parts = [stride * divisor_of(start) for stride, start in self.moving]
        return math.gcd(self.base, *parts)


@dataclasses.dataclass(frozen=True)
class Row:
    """A block with as few dimensions as it has on both sides.

    Attributes:
        pair: its source and its target.
        run: elements that lie together.
        sizes: of the other dimensions, from the innermost outwards.
        source: where it is.
        target: where it goes.
    """

    pair: tuple[int, int]
    run: int
    sizes: tuple[int, ...]
    source: _Side
    target: _Side

    @property
    def num_elements(self) -> int:
        """The elements of the block."""
        return self.run * math.prod(self.sizes)

    @property
    def divisor(self) -> int:
        """What every number of elements in the row is a multiple of."""
        sides = (self.source, self.target)
        strides = [stride for side in sides for stride in side.strides]
        return math.gcd(self.run, *strides, *(side.divisor for side in sides))


def rows_of(
    pairs: Sequence[tuple[Block, Block]],
    source_shapes: Sequence[tuple[int, ...]],
    target_shapes: Sequence[tuple[int, ...]],
) -> tuple[Row, ...]:
    """Return the rows of a plan; blocks of no elements have none.

    Args:
        pairs: a block of a source, and the one of a target that it goes to.
        source_shapes: of what the first blocks are of.
        target_shapes: of what the second blocks are of.

    Raises:
        ValueError: the blocks of a pair differ in size.
    """
    rows = []
    for source, target in pairs:
        if source.size != target.size:
            raise ValueError(
                f"A block of {source.size} cannot go to one of {target.size}. Both need"
                " the same size."
            )
        if source.num_elements:
            sides = _side(source, source_shapes), _side(target, target_shapes)
            rows.append(_row((source.input, target.input), source.size, *sides))
    return tuple(rows)


def divisor_of_all(
    rows: Sequence[Row], source_shapes: Sequence[Any], target_shapes: Sequence[Any]
) -> int:
    """Return how many elements all arrays and rows are made of.

    Args:
        rows: of a plan.
        source_shapes: of the arrays read; those that no row is of do not count.
        target_shapes: of the arrays written; likewise.
    """
    arrays = [math.prod(source_shapes[s]) for s in {row.pair[0] for row in rows}]
    arrays += [math.prod(target_shapes[t]) for t in {row.pair[1] for row in rows}]
    return math.gcd(*arrays, *(row.divisor for row in rows))


def plan_of(rows: Sequence[Row], most: int, *, num_rows: int | None = None) -> Plan:
    """Write a plan as numbers.

    Args:
        rows: of at most `MOST_OUTER` dimensions beside the run; units divide them.
        most: elements of a granule, a power of two.
        num_rows: of each table, so that other plans fit as well; None takes those there
            are.

    Raises:
        ValueError: a table has more rows than that.
    """
    granules: dict[tuple[int, int], int] = {}
    for row in rows:
        granules[row.pair] = math.gcd(row.divisor, granules.get(row.pair, most))
    pairs = sorted(granules, key=lambda pair: pair[::-1])
    launches = [
        tuple(pairs[at : at + MOST_PAIRS]) for at in range(0, len(pairs), MOST_PAIRS)
    ]
    tables = []
    for launch in launches:
        own = [row for row in rows if row.pair in launch]
        if num_rows is not None and len(own) > num_rows:
            raise ValueError(
                f"{len(own)} blocks do not fit in a table of {num_rows} rows. Give"
                " `num_rows` at least as many."
            )
        tables.append(_table(own, launch, granules, num_rows or len(own)))
    return Plan(
        tables=tuple(tables),
        pairs=tuple(launches),
        granules=tuple(tuple(granules[pair] for pair in pairs) for pairs in launches),
    )


def _table(
    rows: Sequence[Row],
    launch: tuple[tuple[int, int], ...],
    granules: dict[tuple[int, int], int],
    num_rows: int,
) -> np.ndarray | jax.Array:
    table = np.zeros((num_rows + 1, NUM_COLUMNS), np.int32)
    # Rows that nothing fills have runs and sizes of 1, which can be divided by.
    table[:, [RUN, *SIZES]] = 1
    first = 0
    for number, row in enumerate(rows):
        granule = granules[row.pair]
        table[number, FIRST] = first
        table[number, PAIR] = launch.index(row.pair)
        table[number, SOURCE] = row.source.base // granule
        table[number, TARGET] = row.target.base // granule
        table[number, RUN] = row.run // granule
        inner = row.sizes[: len(SIZES)]
        table[number, SIZES[: len(inner)]] = inner
        for columns, side in (
            (SOURCE_STRIDES, row.source),
            (TARGET_STRIDES, row.target),
        ):
            strides = [stride // granule for stride in side.strides]
            table[number, columns[: len(strides)]] = strides
        first += row.num_elements // UNIT
    table[len(rows) :, FIRST] = first
    each = [granules[row.pair] for row in rows]
    sources = _moving([row.source for row in rows], each, num_rows + 1)
    targets = _moving([row.target for row in rows], each, num_rows + 1)
    if sources is None and targets is None:
        return table
    out = jnp.asarray(table)
    for column, moving in ((SOURCE, sources), (TARGET, targets)):
        if moving is not None:
            is_column = np.arange(NUM_COLUMNS) == column
            out = out + jnp.where(is_column[None], moving[:, None], 0)
    return out


def _moving(
    sides: Sequence[_Side], granules: Sequence[int], num_rows: int
) -> jax.Array | None:
    """Return what starts that are not known yet add to each row, in granules."""
    values, divisors, factors = [], [], []
    width = max((len(side.moving) for side in sides), default=0)
    if not width:
        return None
    # The last value is 0, for rows that have fewer.
    places = np.full((num_rows, width), sum(len(side.moving) for side in sides))
    for number, (side, granule) in enumerate(zip(sides, granules, strict=True)):
        for column, (stride, start) in enumerate(side.moving):
            places[number, column] = len(values)
            multiple = divisor_of(start)
            values.append(start.value if isinstance(start, Aligned) else start)
            divisors.append(multiple)
            factors.append(stride * multiple // granule)
    known = jnp.stack([jnp.asarray(value, jnp.int32).reshape(()) for value in values])
    terms = lax.div(known, np.array(divisors, np.int32)) * np.array(factors, np.int32)
    return jnp.pad(terms, (0, 1))[places].sum(axis=1)


def _row(
    pair: tuple[int, int], size: tuple[int, ...], source: _Side, target: _Side
) -> Row:
    """Join dimensions that follow each other on both sides."""
    found: list[list[int]] = []  # size, stride in the source, stride in the target
    for length, here, there in zip(size, source.strides, target.strides, strict=True):
        if length == 1:
            continue
        outer = found[-1] if found else None
        if outer and outer[1] == length * here and outer[2] == length * there:
            found[-1] = [outer[0] * length, here, there]
        else:
            found.append([length, here, there])
    run = 1
    if found and found[-1][1:] == [1, 1]:
        run = found.pop()[0]
    sizes, here, there = zip(*found[::-1], strict=True) if found else ((), (), ())
    return Row(
        pair=pair,
        run=run,
        sizes=sizes,
        source=dataclasses.replace(source, strides=here),
        target=dataclasses.replace(target, strides=there),
    )


def _side(block: Block, shapes: Sequence[tuple[int, ...]]) -> _Side:
    if block.start is None:
        return _Side(_strides(block.size), block.offset or 0, ())
    strides = _strides(shapes[block.input])
    base, moving = 0, []
    for stride, start in zip(strides, block.start, strict=True):
        if isinstance(start, int | np.integer):
            base += stride * int(start)
        else:
            moving.append((stride, start))
    return _Side(strides, base, tuple(moving))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of an array in row-major order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
