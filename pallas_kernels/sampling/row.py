"""One row of logits, as the warpgroups that share it see it.

A row [V] is looked at as [V / 64, 64]: blocks of tokens as `bisection.draw` has them.
A warpgroup reads a tile of eight blocks, 16 bytes a thread, and several tiles at once.
The last tile ends with the row; what the one before has seen already is masked there.

    blocks of the row     0 … 7 | 8 … 15 | 16 17 18 19
    the three tiles       0 … 7 | 8 … 15 | (12 … 15) 16 … 19

Weights are the exponentials of the logits below the highest, in [0, 1]; their bit
patterns order them as integers. Warpgroups share sums through shared memory, with one
barrier a pass; all then take the same decisions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sampling.filters import BLOCK_SIZE, Filters

# Blocks of a tile: one for each half of a warp.
TILE_BLOCKS = 8
TILE_SHAPE = (TILE_BLOCKS, BLOCK_SIZE)


def layout(num_columns: int):
    """[8, C] over a warpgroup: two rows a warp, so that a row is summed by shuffles."""
    tiles = ((8, num_columns), (2, num_columns), (num_columns // 16,))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-5,), (-3, -2), -1)


TILE = layout(BLOCK_SIZE)
OVER_ROWS, OVER_COLUMNS = TILE.reduce(1), TILE.reduce(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What is known when the kernel is compiled.

    Attributes:
        filters: as of `Filters.of`.
        num_blocks: of 64 tokens, at least 8.
        warpgroups: that share a row.
        tiles: that a warpgroup reads before it works on them.
        pivots: weights that a pass of the search sums above.
        has_bits: whether the kept tokens are written.
        has_draw: whether a token is drawn.
        has_barrier: False leaves a barrier out, to see that tests would find it.
    """

    filters: Filters
    num_blocks: int
    warpgroups: int
    tiles: int
    pivots: int
    has_bits: bool
    has_draw: bool
    has_barrier: bool = True

    @property
    def num_tiles(self) -> int:
        """Tiles of a row."""
        return -(-self.num_blocks // TILE_BLOCKS)

    @property
    def num_rounds(self) -> int:
        """Turns of the loop over a row."""
        return -(-self.num_tiles // (self.warpgroups * self.tiles))

    @property
    def num_padded(self) -> int:
        """Blocks that the loops go over: those masked are included."""
        return self.num_rounds * self.warpgroups * self.tiles * TILE_BLOCKS

    @property
    def num_groups(self) -> int:
        """Groups of 64 blocks, a multiple of 8."""
        return -(-self.num_padded // (8 * BLOCK_SIZE)) * 8

    @property
    def num_sums(self) -> int:
        """Rows of sums that warpgroups share: weights and numbers above each pivot."""
        return -(-2 * self.pivots // 8) * 8


class Shared(NamedTuple):
    """The shared memory of a row; also what `plgpu.kernel` is to allocate."""

    floats: Any  # Of every pass in turns: [2, sums, 8 per warpgroup].
    integers: Any
    total_floats: Any  # [warpgroup, sums]
    total_integers: Any
    blocks: Any  # [groups, 64]
    groups: Any  # [64]
    found: Any  # [1]
    barrier: Any

    @classmethod
    def of(cls, static: Static) -> "Shared":
        """Describe it."""
        columns, sums = 8 * static.warpgroups, static.num_sums
        return cls(
            floats=plgpu.SMEM((2, sums, columns), jnp.float32),
            integers=plgpu.SMEM((2, 8, columns), jnp.int32),
            total_floats=plgpu.SMEM((static.warpgroups, sums), jnp.float32),
            total_integers=plgpu.SMEM((static.warpgroups, 8), jnp.int32),
            blocks=plgpu.SMEM((static.num_groups, BLOCK_SIZE), jnp.float32),
            groups=plgpu.SMEM((BLOCK_SIZE,), jnp.float32),
            found=plgpu.SMEM((1,), jnp.int32),
            barrier=plgpu.Barrier(num_arrivals=static.warpgroups),
        )


class Cut(NamedTuple):
    """Where a row is cut: kept are larger patterns, and equal ones up to an id."""

    pattern: Any
    last_id: Any

    def keeps(self, patterns, ids):
        """Return which tokens it keeps."""
        is_equal = patterns == self.pattern
        return (patterns > self.pattern) | (is_equal & (ids <= self.last_id))

    def also(self, other: "Cut") -> "Cut":
        """Return the cut that keeps what both keep: beginnings of one order."""
        is_equal = self.pattern == other.pattern
        is_first = (self.pattern > other.pattern) | (
            is_equal & (self.last_id < other.last_id)
        )
        pick = lambda a, b: jnp.where(is_first, a, b)
        return Cut(pick(self.pattern, other.pattern), pick(self.last_id, other.last_id))


class Tile(NamedTuple):
    """Tokens that a warpgroup holds.

    Attributes:
        place: number of the tile's first block in padded order, where no two overlap.
        start: number of the tile's first block in the row.
        is_new: which tokens no other tile has.
        logits: scaled.
    """

    place: jax.Array
    start: jax.Array
    is_new: jax.Array
    logits: jax.Array


class Row:
    """One row's passes, as one warpgroup does its part of them."""

    def __init__(
        self, static: Static, logits_ref: Any, shared: Shared, index, warpgroup
    ):
        self.static, self.shared = static, shared
        self.logits_ref, self.index, self.warpgroup = logits_ref, index, warpgroup
        self.rows = plgpu.broadcasted_iota(jnp.int32, TILE_SHAPE, 0, layout=TILE)
        self.columns = plgpu.broadcasted_iota(jnp.int32, TILE_SHAPE, 1, layout=TILE)
        self.highest: Any = None

    # -- reading ---------------------------------------------------------------------

    def scan(self, step: Callable[[Any, Tile], Any], carry: Any) -> Any:
        """Fold a function over the warpgroup's tiles of the row."""
        static = self.static
        last = static.num_blocks - TILE_BLOCKS

        def turn(i, carry):
            tiles = []
            for j in range(static.tiles):
                number = (i * static.tiles + j) * static.warpgroups + self.warpgroup
                place = number * TILE_BLOCKS
                start = jnp.minimum(place, last)
                tiles.append((place, start, self._load(start)))
            for place, start, logits in tiles:
                is_new = self.rows + start >= place
                carry = step(carry, Tile(place, start, is_new, logits))
            return carry

        return lax.fori_loop(0, static.num_rounds, turn, carry)

    def _load(self, start):
        source = self.logits_ref.at[self.index, pl.ds(start, TILE_BLOCKS)]
        return self._scaled(plgpu.load(source, layout=TILE, optimized=False))

    def _scaled(self, logits):
        logits = logits.astype(jnp.float32)
        temperature = self.static.filters.temperature
        return logits if temperature == 1.0 else logits * (1.0 / temperature)

    def weights(self, tile: Tile):
        """Return the weights of a tile, and their patterns; masked ones are 0."""
        weights = jnp.where(tile.is_new, jnp.exp(tile.logits - self.highest), 0.0)
        return weights, lax.bitcast_convert_type(weights, jnp.int32)

    def is_kept(self, tile: Tile, patterns, cut: Cut):
        """Return which tokens of a tile a cut keeps."""
        return cut.keeps(patterns, (self.rows + tile.start) * BLOCK_SIZE + self.columns)

    # -- sums over the row -----------------------------------------------------------

    def meet(self):
        """Wait until all warpgroups are here."""
        if self.static.has_barrier:
            plgpu.barrier_arrive(self.shared.barrier)
            plgpu.barrier_wait(self.shared.barrier)

    def total(self, turn, *, sums=(), maxima=(), floats_maximum=False):
        """Return sums of floats, and maxima of integers, over all warpgroups.

        Args:
            turn: number of the pass; neighbours use different memory.
            sums: tiles of float32.
            maxima: tiles of int32.
            floats_maximum: take maxima of the floats instead.
        """
        shared, own = self.shared, pl.ds(self.warpgroup * 8, 8)
        reduce = lambda x: jnp.max(x, 1) if floats_maximum else jnp.sum(x, 1)
        parity = lax.rem(turn, jnp.int32(2))
        for i, tile in enumerate(sums):
            shared.floats[parity, i, own] = reduce(tile)
        for i, tile in enumerate(maxima):
            shared.integers[parity, i, own] = jnp.max(tile, 1)
        self.meet()
        columns = layout(8 * self.static.warpgroups)
        load = lambda ref: plgpu.load(ref.at[parity], layout=columns)
        if sums:
            shared.total_floats[self.warpgroup] = reduce(load(shared.floats))
        if maxima:
            shared.total_integers[self.warpgroup] = jnp.max(load(shared.integers), 1)
        return (
            [shared.total_floats[self.warpgroup, i] for i in range(len(sums))],
            [shared.total_integers[self.warpgroup, i] for i in range(len(maxima))],
        )

    def find_highest(self):
        """Set `highest`: the first pass."""

        def step(highest, tile: Tile):
            return jnp.maximum(highest, tile.logits)

        highest = self.scan(step, full(-jnp.inf))
        (self.highest,), _ = self.total(
            jnp.int32(0), sums=(highest,), floats_maximum=True
        )

    # -- sums of blocks --------------------------------------------------------------

    def store_blocks(self, tile: Tile, amounts):
        """Keep the sums of a tile's blocks in shared memory."""
        group = tile.place // BLOCK_SIZE
        places = pl.ds(lax.rem(tile.place, jnp.int32(BLOCK_SIZE)), TILE_BLOCKS)
        self.shared.blocks[group, places] = jnp.sum(amounts, axis=1)

    def find_block(self, target: Callable):
        """Return the first block that passes a sum, and the sum before it."""
        shared, static = self.shared, self.static
        sums = plgpu.load(shared.blocks, layout=TILE)
        groups = plgpu.broadcasted_iota(jnp.int32, sums.shape, 0, layout=TILE)
        # Nobody has written behind the padded row.
        sums = jnp.where(groups < static.num_padded // BLOCK_SIZE, sums, 0.0)
        if static.num_groups < BLOCK_SIZE:
            zeros = jnp.zeros((BLOCK_SIZE,), jnp.float32)
            shared.groups[...] = plgpu.layout_cast(zeros, OVER_COLUMNS)
        shared.groups[pl.ds(0, static.num_groups)] = jnp.sum(sums, axis=1)
        group = first_past(plgpu.load(shared.groups, layout=OVER_COLUMNS), target)
        of_blocks = plgpu.load(shared.blocks.at[group.place], layout=OVER_COLUMNS)
        block = first_past(of_blocks, lambda _: group.target - group.before)
        place = group.place * BLOCK_SIZE + block.place
        # From padded order to the row's.
        tail = (static.num_tiles - 1) * TILE_BLOCKS
        shift = static.num_blocks - TILE_BLOCKS - tail
        before = group.before + block.before
        return jnp.where(place < tail, place, place + shift), before

    def of_block(self, block):
        """Return weights, patterns and ids of one block, [64]."""
        source = self.logits_ref.at[self.index, block]
        logits = plgpu.load(source, layout=OVER_COLUMNS, optimized=False)
        weights = jnp.exp(self._scaled(logits) - self.highest)
        places = plgpu.broadcasted_iota(
            jnp.int32, (BLOCK_SIZE,), 0, layout=OVER_COLUMNS
        )
        patterns = lax.bitcast_convert_type(weights, jnp.int32)
        return weights, patterns, block * BLOCK_SIZE + places

    def logit(self, block, place):
        """Return one scaled logit."""
        return self._scaled(self.logits_ref[self.index, block, place])


class Found(NamedTuple):
    """A place where running sums pass a target, and the sum before it."""

    place: jax.Array
    before: jax.Array
    target: jax.Array


def first_past(amounts, target: Callable) -> Found:
    """Find the first of 64 places where running sums pass a target.

    It has an amount, if any has. Where rounding leaves the target behind all sums, it
    is the last place with an amount.

    Args:
        amounts: over the columns of a tile.
        target: of the sum of all.
    """
    shape = (BLOCK_SIZE, BLOCK_SIZE)
    rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
    columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
    square = plgpu.layout_cast(lax.broadcast_in_dim(amounts, shape, (1,)), TILE)
    sums = jnp.sum(jnp.where(columns <= rows, square, 0.0), axis=1)
    own = jnp.sum(jnp.where(columns == rows, square, 0.0), axis=1)
    places = plgpu.broadcasted_iota(jnp.int32, (BLOCK_SIZE,), 0, layout=OVER_ROWS)
    aim = target(jnp.max(sums))
    first = jnp.min(jnp.where((sums > aim) & (own > 0), places, BLOCK_SIZE))
    last = jnp.max(jnp.where(own > 0, places, 0))
    place = jnp.minimum(first, last)
    return Found(place, jnp.max(jnp.where(places < place, sums, 0.0)), aim)


def full(value: float, dtype: Any = jnp.float32):
    """Return a tile of one value."""
    return plgpu.layout_cast(jnp.full(TILE_SHAPE, value, dtype), TILE)
