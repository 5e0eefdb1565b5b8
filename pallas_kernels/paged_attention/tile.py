"""What one block of threads does: a tile of queries meets a part of its keys.

    step        0          1          2                    of `keys` tokens each
    memory      fetch 2    fetch 3    …                    two stages
    matrices       scores, weighted  scores, weighted  …

Pages come to shared memory by units: a page, or some tokens of one that is longer than
a step. In the place of what is no page, or is none that the tile sees, another one
comes, of which no query sees anything.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.partials import OUT_OF_SIGHT
from pallas_kernels.paged_attention.request import Request

LOG2_E = math.log2(math.e)
NEVER = 2**31 - 1
"""A position after that of any query."""

UNLIMITED = 2**30
"""A window over all there is, from which positions can be taken without overflow."""

_BOTH = plgpu.Layout.WGMMA
# Of a key, what a thread has lies side by side: 4 bytes, or the 8 that become of them.
_FOUR_BYTES = plgpu.Layout.WGMMA_UPCAST_2X
_OF_KEYS, _OF_ROWS = (_BOTH.reduce(axis) for axis in (1, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the work is cut.

    Attributes:
        rows: query vectors of a tile: 8, 16, 32 or 64.
        keys: of a step; a multiple of 64.
        stages: steps that are on their way or in use at a time.
        splits: parts of a row's keys, each with a block of threads of its own.
    """

    rows: int
    keys: int
    stages: int
    splits: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a kernel when it is compiled.

    Attributes:
        request: the shapes and types.
        blocks: how they are cut.
        is_in_part: partials come out, not outputs.
    """

    request: Request
    blocks: Blocks
    is_in_part: bool

    @property
    def head_dim(self) -> int:
        """K, of queries, keys and values."""
        return self.request.query_shape[3]

    @property
    def num_tokens(self) -> int:
        """T, new ones of each row."""
        return self.request.query_shape[1]

    @property
    def num_kv_heads(self) -> int:
        """N, key heads."""
        return self.request.pages_shape[2]

    @property
    def group_size(self) -> int:
        """Query heads of a key head."""
        return self.request.query_shape[2] // self.num_kv_heads

    @property
    def num_rows(self) -> int:
        """Query vectors of a key head."""
        return self.num_tokens * self.group_size

    @property
    def num_tiles(self) -> int:
        """Tiles of the queries of a key head."""
        return -(-self.num_rows // self.blocks.rows)

    @property
    def page_size(self) -> int:
        """S, tokens of a page."""
        return self.request.pages_shape[3]

    @property
    def unit(self) -> int:
        """Tokens of a copy: a page, or what divides both it and a step."""
        return math.gcd(self.page_size, self.blocks.keys)

    @property
    def units_of_step(self) -> int:
        """Copies of the keys of a step."""
        return self.blocks.keys // self.unit

    @property
    def units_of_page(self) -> int:
        """Copies that bring all of a page."""
        return self.page_size // self.unit

    @property
    def dims_at_a_time(self) -> int:
        """Dimensions of values that are multiplied at once, for lack of registers."""
        return 64 if self.blocks.rows > 16 else self.head_dim

    @property
    def adds_late(self) -> bool:
        """Whether there are registers to add weights up by their place in the steps.

        What is left for the end is the sum over places, for which the warps meet.
        """
        return self.blocks.rows <= 16

    @property
    def has_eight_bits(self) -> bool:
        """Whether pages are widened in shared memory."""
        return jnp.dtype(self.request.pages_dtype).itemsize == 1

    @property
    def reduction_bytes(self) -> int:
        """Shared memory in which the warps agree on a maximum."""
        return 128 * self.blocks.rows

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of threads, but for barriers."""
        found = scratch(self).values()
        arrays = [x for x in found if not isinstance(x, plgpu.Barrier)]
        sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
        whole = lambda size: -(-size // 1024) * 1024  # Each begins on its own KiB.
        return sum(map(whole, sizes)) + whole(self.reduction_bytes)


def scratch(plan: Plan) -> dict[str, Any]:
    """Return the shared memory of a tile, and its barriers."""
    request, blocks, head_dim = plan.request, plan.blocks, plan.head_dim
    step = (blocks.stages, blocks.keys, head_dim)
    num_copies = plan.units_of_step * (2 if request.is_scaled else 1)
    arrived = plgpu.Barrier(num_arrivals=num_copies, num_barriers=blocks.stages)
    found = {
        "queries": _tiled((blocks.rows, head_dim), request.dtype),
        "keys": _tiled(step, request.pages_dtype),
        "values": _tiled(step, request.pages_dtype),
        "weights": _tiled((blocks.rows, blocks.keys), request.dtype),
        "queries_arrived": plgpu.Barrier(),
        "keys_arrived": arrived,
        "values_arrived": arrived,
    }
    if plan.has_eight_bits:
        found["wide"] = _tiled(step[1:], request.dtype)
    if request.is_scaled:
        found["key_scales"] = plgpu.SMEM(step[:2], jnp.float32)
        found["value_scales"] = plgpu.SMEM(step[:2], jnp.float32)
    if plan.is_in_part:
        found["weighted"] = plgpu.SMEM((head_dim, blocks.rows), jnp.float32)
        found["maximum"] = plgpu.SMEM((blocks.rows,), jnp.float32)
        found["total"] = plgpu.SMEM((blocks.rows,), jnp.float32)
    return found


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return shared memory in the order that matrix units and copies agree on."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = 64 * itemsize
    tiling: Any = plgpu.TilingTransform  # They look abstract to the type checker.
    swizzled: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, 64)), swizzled(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def attend(plan: Plan, *refs: Any, **shared: Any) -> None:
    """Let the tile of this block of threads meet its part of the keys."""
    num_outs = 3 if plan.is_in_part else 1
    tile = _Tile(plan, _Inputs(*refs[:-num_outs]), shared)
    plgpu.copy_gmem_to_smem(
        tile.inputs.queries.at[tile.row, tile.head, tile.rows],
        shared["queries"],
        shared["queries_arrived"],
    )
    for stage in range(plan.blocks.stages):
        pl.when(stage < tile.num_steps)(functools.partial(_fetch_first, tile, stage))
    plgpu.barrier_wait(shared["queries_arrived"])
    step = functools.partial(_step, tile)
    found = jax.lax.fori_loop(0, tile.num_steps, step, _nothing(plan))
    if plan.adds_late:
        found = (*found[:2], found[2].sum(axis=0))
    write = _write_partials if plan.is_in_part else _write_output
    write(tile, found, refs[-num_outs:])
    plgpu.wait_smem_to_gmem(0)


class _Inputs:
    """The arrays of a launch, in the memory of the GPU."""

    def __init__(self, *refs: Any):
        self.queries, self.keys, self.values = refs[:3]
        self.table, self.first_page, self.start, self.scalars, self.scale = refs[3:8]
        self.key_scales, self.value_scales = refs[8:] or (None, None)


class _Tile:
    """Where a block of threads is, and what it has; numbers are int32.

    Units and positions count from the row's first position in the table on.
    """

    def __init__(self, plan: Plan, inputs: _Inputs, shared: dict[str, Any]):
        self.plan, self.inputs, self.shared = plan, inputs, shared
        self.row, self.head, part = map(jax.lax.axis_index, ("row", "head", "part"))
        blocks = plan.blocks
        self.part = part  # All splits of the first tile, then those of the next.
        tile, split = _over(part, blocks.splits), jax.lax.rem(part, blocks.splits)
        self.first_row = tile * blocks.rows
        self.rows = pl.ds(self.first_row, blocks.rows)
        self.layer, num_columns, window = (inputs.scalars[i] for i in range(3))
        self.window = jnp.minimum(window, UNLIMITED)
        before = inputs.first_page[self.row] * plan.page_size
        self.start = inputs.start[self.row] - before
        first = _over(self.first_row, plan.group_size)
        last = _over(self.first_row + (blocks.rows - 1), plan.group_size)
        last = jnp.minimum(last, plan.num_tokens - 1)
        # The units that the tile sees, and the steps over them.
        begin = jnp.maximum(self.start + first - (self.window - 1), 0)
        begin = _over(begin, plan.unit)
        end = _over(jnp.maximum(self.start + last + plan.unit, 0), plan.unit)
        num_columns = jnp.minimum(num_columns, plan.request.num_columns)
        self.end = jnp.minimum(end, num_columns * plan.units_of_page)
        num_units = jnp.maximum(self.end - begin, 0)
        num_steps = _over(num_units + (plan.units_of_step - 1), plan.units_of_step)
        most = _over(num_steps + (blocks.splits - 1), blocks.splits)
        self.num_steps = jnp.clip(num_steps - split * most, 0, most)
        self.begin = begin + split * most * plan.units_of_step

    def units(self, step: Any) -> list[Any]:
        """Return the numbers of a step's units."""
        first = self.begin + step * self.plan.units_of_step
        return [first + i for i in range(self.plan.units_of_step)]

    def places(self, step: Any) -> list[tuple[Any, Any]]:
        """Return the page of each unit, -1 for none, and where in it the unit is."""
        # After the last unit, it comes again.
        units = [jnp.minimum(unit, self.end - 1) for unit in self.units(step)]
        pages = self.inputs.table
        of_page = self.plan.units_of_page
        return [
            (
                pages[self.row, _over(unit, of_page)],
                jax.lax.rem(unit, of_page) * self.plan.unit,
            )
            for unit in units
        ]

    def fetch(self, name: str, step: Any, places: list[tuple[Any, Any]]) -> None:
        """Begin to copy the keys or the values of a step, and their scales."""
        arrived = self.shared[f"{name}_arrived"]
        stage = jax.lax.rem(step, self.plan.blocks.stages)
        names = {"keys": ("keys", "key_scales"), "values": ("values", "value_scales")}
        num_pages = self.plan.request.pages_shape[1]
        for index, (page, offset) in enumerate(places):
            page = jnp.clip(page, 0, num_pages - 1)
            slots = pl.ds(offset, self.plan.unit)
            here = pl.ds(index * self.plan.unit, self.plan.unit)
            for one in names[name][: 2 if self.plan.request.is_scaled else 1]:
                plgpu.copy_gmem_to_smem(
                    getattr(self.inputs, one).at[self.layer, page, self.head, slots],
                    self.shared[one].at[stage, here],
                    arrived.at[stage],
                )


def _fetch_first(tile: _Tile, step: int) -> None:
    step = jnp.int32(step)
    places = tile.places(step)
    tile.fetch("keys", step, places)
    tile.fetch("values", step, places)


def _nothing(plan: Plan) -> tuple[Any, ...]:
    """Return what is known before the first key."""
    rows, keys = plan.blocks.rows, plan.blocks.keys
    full = lambda shape, value, layout: plgpu.layout_cast(
        jnp.full(shape, value, jnp.float32), layout
    )
    return (
        tuple(
            full((plan.dims_at_a_time, rows), 0.0, _BOTH)
            for _ in range(plan.head_dim // plan.dims_at_a_time)
        ),
        full((rows,), OUT_OF_SIGHT * LOG2_E, _OF_ROWS),
        full((keys, rows), 0.0, _BOTH)
        if plan.adds_late
        else full((rows,), 0.0, _OF_ROWS),
    )


def _step(tile: _Tile, step: Any, found: tuple[Any, ...]) -> tuple[Any, ...]:
    """Meet the keys of one step."""
    weighted, maximum, total = found
    plan, shared, after = tile.plan, tile.shared, step + tile.plan.blocks.stages
    stage = jax.lax.rem(step, plan.blocks.stages)
    # Read early, for copies that begin late: the table is in memory, too.
    places, next_places = tile.places(step), tile.places(after)
    fetch = lambda name: pl.when(after < tile.num_steps)(
        functools.partial(tile.fetch, name, after, next_places)
    )
    _await(shared["keys_arrived"].at[stage])
    key_scales = _scales(tile, "key_scales", stage)
    keys = _wide(tile, shared["keys"].at[stage])
    scores = _product(keys, shared["queries"].transpose((1, 0)))
    scores = _scores(tile, scores, key_scales)
    fetch("keys")
    sees = _sees(tile, step, places)
    scores = jnp.where(sees, scores, OUT_OF_SIGHT * LOG2_E)
    new_maximum = jnp.maximum(maximum, scores.max(axis=0))
    shrink = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores - _across(new_maximum, scores.shape, 1))
    if plan.adds_late:
        total = total * _across(shrink, total.shape, 1) + weights
    else:
        total = total * shrink + weights.sum(axis=0)
    _await(shared["values_arrived"].at[stage])
    value_scales = _scales(tile, "value_scales", stage)
    if value_scales is not None:
        weights *= _across(value_scales, weights.shape, 0)
    shared["weights"].transpose((1, 0))[...] = weights.astype(plan.request.dtype)
    values = _wide(tile, shared["values"].at[stage])
    plgpu.commit_smem()
    weights = shared["weights"].transpose((1, 0))
    size = plan.dims_at_a_time
    sums = []
    for index, before in enumerate(weighted):
        some = values.at[:, pl.ds(index * size, size)].transpose((1, 0))
        new = _product(some, weights)
        sums.append(before * _across(shrink, before.shape, 1) + new)
    fetch("values")
    return tuple(sums), new_maximum, total


def _await(arrived: Any) -> None:
    """Wait until all copies of a step are there."""
    plgpu.barrier_wait(arrived)


def _product(left: Any, right: Any) -> Any:
    """Multiply matrices in shared memory."""

    def multiply(sums: Any) -> Any:
        plgpu.wgmma(sums, left, right)
        return sums[...]

    shape = (left.shape[0], right.shape[1])
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _wide(tile: _Tile, stored: Any) -> Any:
    """Return keys or values as the matrix units take them, in shared memory.

    After it, copies may begin to where they and their scales were.
    """
    if not tile.plan.has_eight_bits:
        return stored
    wide = tile.shared["wide"]
    for begin in range(0, tile.plan.head_dim, 64):
        some = pl.ds(begin, 64)
        numbers = plgpu.layout_cast(stored.at[:, some][...], _FOUR_BYTES)
        if numbers.dtype == jnp.uint8:
            numbers = jax.lax.bitcast_convert_type(numbers, jnp.float8_e4m3fn)
        if numbers.dtype == jnp.float8_e4m3fn:
            # All that the hardware makes of it is float16, which has all its numbers.
            numbers = numbers.astype(jnp.float16)
        wide.at[:, some][...] = numbers.astype(wide.dtype)
    plgpu.commit_smem()
    return wide


def _scales(tile: _Tile, name: str, stage: Any) -> Any:
    """Return the scales of a step's keys or values, or None."""
    if not tile.plan.request.is_scaled:
        return None
    return plgpu.load(tile.shared[name].at[stage], layout=_OF_KEYS)


def _scores(tile: _Tile, products: Any, scales: Any) -> Any:
    """Return scores, times the binary logarithm of e."""
    soft_cap = tile.plan.request.soft_cap
    factor = tile.inputs.scale[0] * (LOG2_E if soft_cap is None else 1.0)
    scores = products * factor
    if scales is not None:
        scores *= _across(scales, scores.shape, 0)
    if soft_cap is None:
        return scores
    # tanh x = 1 - 2 / (exp 2x + 1). The hardware's own is off by 0.0005, which is 0.025
    # of scores with a cap of 50.
    grown = jnp.exp2(scores * (2 * LOG2_E / soft_cap))
    return soft_cap * LOG2_E * (1.0 - 2.0 / (grown + 1.0))


def _sees(tile: _Tile, step: Any, places: list[tuple[Any, Any]]) -> Any:
    """Say which query sees which key of a step, [keys, rows]."""
    plan = tile.plan
    shape = (plan.blocks.keys, plan.blocks.rows)
    key = _count(shape[0], _OF_KEYS)
    position = key + (tile.begin + step * plan.units_of_step) * plan.unit
    for index, (unit, (page, _)) in enumerate(
        zip(tile.units(step), places, strict=True)
    ):
        hidden = jnp.where((page >= 0) & (unit < tile.end), 0, NEVER)
        is_of_unit = (key >= index * plan.unit) & (key < (index + 1) * plan.unit)
        position = jnp.where(is_of_unit, jnp.maximum(position, hidden), position)
    row = _count(shape[1], _OF_ROWS) + tile.first_row
    own = jax.lax.div(row, jnp.full_like(row, plan.group_size)) + tile.start
    own, position = _across(own, shape, 1), _across(position, shape, 0)
    sees = position <= own
    if plan.request.window is not None:
        sees &= own - position < tile.window
    return sees


def _write_partials(tile: _Tile, found: tuple[Any, ...], outs: tuple[Any, ...]) -> None:
    weighted, maximum, total = found
    shared = tile.shared
    for index, some in enumerate(weighted):
        size = some.shape[0]
        shared["weighted"].at[pl.ds(index * size, size)][...] = some
    shared["maximum"][...] = maximum
    shared["total"][...] = total
    plgpu.commit_smem()
    for name, out in zip(("weighted", "maximum", "total"), outs, strict=True):
        plgpu.copy_smem_to_gmem(shared[name], out.at[tile.row, tile.head, tile.part])


def _write_output(tile: _Tile, found: tuple[Any, ...], outs: tuple[Any, ...]) -> None:
    weighted, _, total = found
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    # In the place of the queries, which are not needed any more.
    place = tile.shared["queries"]
    for index, some in enumerate(weighted):
        out = (some / _across(total, some.shape, 1)).astype(tile.plan.request.dtype)
        size = some.shape[0]
        place.at[:, pl.ds(index * size, size)].transpose((1, 0))[...] = out
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(place, outs[0].at[tile.row, tile.head, tile.rows])


def _count(size: int, layout: Any) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def _across(x: Any, shape: tuple[int, ...], axis: int) -> Any:
    """Repeat numbers, which are those of an axis, over the other one."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def _over(x: Any, divisor: int) -> Any:
    """Divide what is not negative, and leave the remainder."""
    return jax.lax.div(x, jnp.int32(divisor))
