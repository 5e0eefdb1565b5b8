"""One tile of products after the other, for a kernel on Hopper.

    ┌─ copies (TMA) ────────┐      ┌─ 2 computing warpgroups (wgmma) ─┐
    │ hidden  [128, 64]     │ ───▶ │ products [64, 256] each          │
    │ columns [64, 256]     │      │ consume(first column, products)  │
    └─ 4 steps ahead ───────┘ ◀─── └─ "used" ─────────────────────────┘

The steps of all tiles are one sequence: while a tile is consumed, the copies for the
next one are under way.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

WORD = 32
"""Columns of one word of bits."""
WARPGROUPS = 2
"""Warpgroups that compute."""
NUM_SMS = 132
ALIGNMENT = 64
"""The copy engine reads whole rows of 64 elements, 8 at a time, as wgmma wants them."""
_ROWS = 8

_gpu: Any = plgpu  # Its types are not all exported.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sizes of the kernel.

    Attributes:
        rows: tokens of a tile, for each of the two warpgroups; a multiple of 64.
        columns: of a tile; a multiple of 64, at most 256.
        depth: elements of the products' inner dimension that are copied together.
        stages: steps that are copied ahead.
        group: tiles of tokens that run at the same time, with the same columns.
    """

    rows: int = 64
    columns: int = 256
    depth: int = 64
    stages: int = 4
    group: int = 16


class Counted(NamedTuple):
    """Which logits count; both None: all of them.

    Attributes:
        bounds: the first column that counts, and the one after the last.
        words: bit v % 32 of word v // 32 says whether column v counts; the bounds are
            not looked at then.
    """

    bounds: Int[Array, " 2"] | None = None
    words: Int[Array, "T W"] | None = None


class Form(NamedTuple):
    """What a kernel is compiled for."""

    blocks: Blocks
    num_tokens: int
    width: int
    num_columns: int
    dtype: Any
    temperature: float
    soft_cap: float | None
    is_bounded: bool
    has_words: bool

    @property
    def tile_rows(self) -> int:
        """Tokens of a tile, of both warpgroups."""
        return WARPGROUPS * self.blocks.rows

    @property
    def num_groups(self) -> int:
        """Tiles of tokens are cut in so many groups."""
        return pl.cdiv(pl.cdiv(self.num_tokens, self.tile_rows), self.blocks.group)

    @property
    def group(self) -> int:
        """Tiles of tokens in a group, as even as can be."""
        return pl.cdiv(pl.cdiv(self.num_tokens, self.tile_rows), self.num_groups)

    @property
    def padded_tokens(self) -> int:
        """Tokens of whole tiles, and of whole groups of them."""
        return self.num_groups * self.group * self.tile_rows

    @property
    def num_tiles(self) -> int:
        """Tiles along the columns."""
        return pl.cdiv(self.num_columns, self.blocks.columns)

    @property
    def num_splits(self) -> int:
        """Parts of the columns, so that a group has every multiprocessor at work."""
        return min(self.num_tiles, max(1, NUM_SMS // self.group))

    @property
    def piece(self) -> int:
        """Columns of a tile that are worked on together."""
        return WORD


class Place(NamedTuple):
    """Where a thread works."""

    warpgroup: Array
    row_tile: Array
    split: Array


class Buffers(NamedTuple):
    """Shared memory for the steps that are copied ahead, and who is done with it.

    Attributes:
        hidden: of two warpgroups' tokens.
        columns: of the tile.
        filled: both copies have arrived.
        used: both warpgroups have multiplied.
    """

    hidden: Any
    columns: Any
    filled: Any
    used: Any


def buffers_of(form: Form) -> Buffers:
    """Return what to allocate for the copies."""

    def buffer(*shape: int) -> Any:
        transforms = transforms_of(form, shape[-1])
        shape = (form.blocks.stages, *shape)
        return plgpu.SMEM(shape, form.dtype, transforms=transforms)

    return Buffers(
        hidden=buffer(form.tile_rows, form.blocks.depth),
        columns=buffer(form.blocks.depth, form.blocks.columns),
        filled=plgpu.Barrier(num_arrivals=2, num_barriers=form.blocks.stages),
        used=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=form.blocks.stages),
    )


def form_of(hidden, columns, temperature, soft_cap, counted: Counted, blocks) -> Form:
    """Return what a kernel for some arrays is compiled for."""
    return Form(
        blocks=blocks,
        num_tokens=hidden.shape[0],
        width=hidden.shape[1],
        num_columns=columns.shape[1],
        dtype=hidden.dtype,
        temperature=temperature,
        soft_cap=soft_cap,
        is_bounded=counted.bounds is not None or columns.shape[1] % blocks.columns != 0,
        has_words=counted.words is not None,
    )


def kernel_of(form: Form, body: Callable, out: Any, scratch: Sequence[Any]) -> Callable:
    """Return a kernel; its body gets inputs, outputs, `Buffers` and scratch memory."""
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[buffers_of(form), *scratch],
        grid=(form.num_groups * form.num_splits * form.group,),
        grid_names=("place",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def padded(form: Form, x: Array) -> Array:
    """Pad the last dimension to whole tiles of tokens."""
    missing = form.padded_tokens - x.shape[-1]
    return jnp.pad(x, (*((0, 0) for _ in x.shape[1:]), (0, missing)))


def whole_rows(x: Array) -> Array:
    """Pad tokens to as many as the copy engine reads at a time."""
    missing = -len(x) % _ROWS
    return jnp.pad(x, ((0, missing), (0, 0))) if missing else x


def operands(form: Form, counted: Counted) -> tuple[Array, ...]:
    """Return what the kernel reads of the logits that count."""
    if counted.words is not None:
        num_tokens, num_words = counted.words.shape
        rows = form.padded_tokens - num_tokens
        columns = form.num_tiles * (form.blocks.columns // WORD) - num_words
        return (jnp.pad(counted.words, ((0, rows), (0, columns))),)
    if counted.bounds is not None:
        return (counted.bounds,)
    return (jnp.array([0, form.num_columns], jnp.int32),) if form.is_bounded else ()


def place_of(form: Form) -> Place:
    """Return where this thread works: groups, in them splits, in them tiles."""
    index = jax.lax.axis_index("place")
    rest, in_group = jax.lax.div(index, form.group), jax.lax.rem(index, form.group)
    group, split = (f(rest, form.num_splits) for f in (jax.lax.div, jax.lax.rem))
    return Place(
        warpgroup=jax.lax.axis_index("warpgroup"),
        row_tile=group * form.group + in_group,
        split=split,
    )


def own_rows_of(form: Form, place: Place) -> Any:
    """Return the tokens of a computing warpgroup."""
    tile = place.row_tile * WARPGROUPS + place.warpgroup
    return pl.ds(tile * form.blocks.rows, form.blocks.rows)


def transforms_of(form: Form, width: int) -> tuple[Any, ...]:
    """Return the order in shared memory of rows of a width, as wgmma reads them."""
    num_bytes = jnp.dtype(form.dtype).itemsize
    swizzle = plgpu.find_swizzle(width * num_bytes * 8)
    return (
        _gpu.TilingTransform((_ROWS, swizzle // num_bytes)),
        _gpu.SwizzleTransform(swizzle),
    )


def for_each_tile(
    form: Form,
    place: Place,
    hidden: Any,
    columns: Any,
    buffers: Buffers,
    consume: Callable[[Array, Array], None],
    start: Callable[[], None],
    finish: Callable[[], None],
) -> None:
    """Make the products of one tile after the other, and hand on a warpgroup's half.

    Args:
        form: of the kernel.
        place: of this thread.
        hidden: all of them, in global memory.
        columns: all of them, in global memory.
        buffers: in shared memory.
        consume: takes the first column of a tile, and its products.
        start: runs before the first tile in the warpgroups that compute.
        finish: runs after the last one.
    """
    blocks, steps = form.blocks, pl.cdiv(form.width, form.blocks.depth)
    first, last = (
        jax.lax.div((place.split + i) * form.num_tiles, form.num_splits) for i in (0, 1)
    )
    rows = pl.ds(place.row_tile * form.tile_rows, form.tile_rows)
    own_half = pl.ds(place.warpgroup * blocks.rows, blocks.rows)

    def copy(step):
        """Copy a part of a tile's rows and columns to the slot of a step."""
        slot = jax.lax.rem(step, blocks.stages)
        tile, k = first + jax.lax.div(step, steps), jax.lax.rem(step, steps)
        inner = pl.ds(k * blocks.depth, blocks.depth)
        own_columns = pl.ds(tile * blocks.columns, blocks.columns)
        filled = buffers.filled.at[slot]
        plgpu.copy_gmem_to_smem(hidden.at[rows, inner], buffers.hidden.at[slot], filled)
        plgpu.copy_gmem_to_smem(
            columns.at[inner, own_columns], buffers.columns.at[slot], filled
        )

    @pl.when(place.warpgroup == WARPGROUPS)
    def _copying():
        plgpu.set_max_registers(40, action="decrease")
        num_steps = (last - first) * steps
        num_ahead = jnp.minimum(num_steps, blocks.stages)
        pl.loop(0, num_ahead)(copy)

        def await_used(step):
            plgpu.barrier_wait(buffers.used.at[jax.lax.rem(step, blocks.stages)])

        @pl.loop(num_ahead, num_steps)
        def _step(step):
            await_used(step)
            copy(step)

        # No barrier is left with an end that nobody saw.
        pl.loop(num_steps - num_ahead, num_steps)(await_used)

    @pl.when(place.warpgroup < WARPGROUPS)
    def _computing():
        plgpu.set_max_registers(232, action="increase")
        start()

        @pl.loop(first, last)
        def _tile(tile):
            def multiply(products):
                @pl.loop(0, steps)
                def _step(k):
                    step = (tile - first) * steps + k
                    slot = jax.lax.rem(step, blocks.stages)
                    plgpu.barrier_wait(buffers.filled.at[slot])
                    plgpu.wgmma(
                        products,
                        buffers.hidden.at[slot, own_half],
                        buffers.columns.at[slot],
                    )
                    # The products of the step before are done.
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _():
                        used = jax.lax.rem(step - 1, blocks.stages)
                        plgpu.barrier_arrive(buffers.used.at[used])

                found = products[...]
                used = jax.lax.rem((tile - first + 1) * steps - 1, blocks.stages)
                plgpu.barrier_arrive(buffers.used.at[used])
                consume(tile * blocks.columns, found)

            pl.run_scoped(
                multiply, _gpu.ACC((blocks.rows, blocks.columns), jnp.float32)
            )

        finish()
