"""Attention to pages on Hopper: pages go to shared memory, and to the matrix units.

    grid     row x key head x (tile of queries x split of the keys)

    keys     [keys, K]  @  query^T   [K, rows]    ->  scores^T   [keys, rows]
    values^T [K, keys]  @  weights^T [keys, rows] ->  weighted^T [K, rows]

A tile has `rows` query vectors of one key head, of T tokens times the heads that share
it. Everything is transposed: the matrix units take 64 of their first dimension at
least, which a step of 64 keys fills, and 8 of their second, enough for one token of
8 heads. The other way around, a step of decoding would leave most of them idle.

Only pages that a tile sees are read: from the window of its first token on, to the
place of its last. The copy engine brings the next steps while one is computed; pages of
8 bits come as they are, and are widened from shared memory to shared memory.

A step of K = 128 in bfloat16 is 32 KiB, in 8 bits 16 KiB. With the default blocks three
or more blocks of threads have room on a multiprocessor, which has then between 96 and
192 KiB on their way. 33 KiB would keep memory busy if a copy took a microsecond: 4.3
TB/s over 132 multiprocessors. Heads of 256 leave room for one, with 64 to 128 KiB.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import _dispatch, _tuning
from pallas_kernels.paged_attention import tile
from pallas_kernels.paged_attention.partials import Partials, combine, merged
from pallas_kernels.paged_attention.reference import Pages, Rows
from pallas_kernels.paged_attention.request import TRACED, Request
from pallas_kernels.paged_attention.tile import Blocks, Plan

_NUM_PROCESSORS = 132  # Of an H200.
_SHARED_BYTES = 227 * 1024  # That a block of threads may have, and all of them.
_THIRD_BYTES = 74 * 1024  # With its barriers and what the driver takes.
_EIGHT_BITS = (jnp.int8, jnp.uint8, jnp.float8_e4m3fn)


def default_blocks(request: Request) -> Blocks:
    """Return blocks that keep every multiprocessor busy, as far as arithmetic says."""
    batch, num_tokens, num_heads, head_dim = request.query_shape
    num_kv_heads, page_size = request.pages_shape[2:4]
    num_rows = num_tokens * num_heads // num_kv_heads
    # As many as there are registers for, in the largest tiles.
    most = 32 if head_dim > 128 else 64
    if jnp.dtype(request.pages_dtype).itemsize == 1:
        most -= 8
    rows = next((n for n in (8, 16, 32) if num_rows <= n <= most), most)
    # A step is to bring enough to be worth its fixed time.
    keys = 128 if head_dim == 64 and rows <= 16 else 64
    # Three blocks of threads to a multiprocessor, twice over; not for a few steps each.
    wanted = -(-6 * _NUM_PROCESSORS // (batch * num_kv_heads * -(-num_rows // rows)))
    room = request.num_columns * page_size // (4 * keys)
    splits = max(1, min(wanted, room, 32))
    blocks = Blocks(rows=rows, keys=keys, stages=2, splits=splits)
    for stages in (3, 4):
        more = dataclasses.replace(blocks, stages=stages)
        if _shared_bytes(request, more) <= _THIRD_BYTES:
            blocks = more
    return blocks


def candidates(request: Request) -> tuple[Blocks, ...]:
    """Return blocks worth a try on a GPU, the default first."""
    default = default_blocks(request)
    is_small = default.rows <= 16
    found = [default]
    for rows, keys, stages, splits in itertools.product(
        sorted({default.rows} if is_small else {32, default.rows}),
        (64, 128) if is_small else (64,),
        (2, 3, 4),
        sorted({1, 2, 4, default.splits}),
    ):
        blocks = Blocks(rows=rows, keys=keys, stages=stages, splits=splits)
        if blocks != default and _shared_bytes(request, blocks) <= _SHARED_BYTES:
            found.append(blocks)
    return tuple(found)


def _shared_bytes(request: Request, blocks: Blocks) -> int:
    is_in_part = blocks.splits > 1
    return Plan(request=request, blocks=blocks, is_in_part=is_in_part).shared_bytes


def tuning_of(request: Request) -> tuple[tuple[jnp.dtype, ...], tuple[int, ...]]:
    """Return the types and the shape that block sizes are measured for."""
    num_kv_heads, page_size = request.pages_shape[2:4]
    num_tokens = request.num_columns * page_size
    shape = (*request.query_shape, num_kv_heads, num_tokens)
    return (jnp.dtype(request.dtype), jnp.dtype(request.pages_dtype)), shape


def _tuned_blocks(request: Request) -> Blocks:
    dtypes, shape = tuning_of(request)
    return _tuning.tuned(
        "paged_attention",
        default_blocks(request),
        device=request.device,
        dtypes=dtypes,
        shape=shape,
    )


def unsupported(request: Request) -> str | None:
    """Say why a request cannot be served, or None."""
    if request.device.platform != "gpu":
        return "it is for GPUs"
    capability = request.device.compute_capability
    if capability is None or capability[0] != 9:
        return "it needs a GPU of compute capability 9, Hopper"
    dtype = jnp.dtype(request.dtype)
    pages_dtype = jnp.dtype(request.pages_dtype)
    if dtype == jnp.float32:
        return "queries are float32, which matrix units would round to 10 bits"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries are {dtype}, and it takes bfloat16 and float16"
    if pages_dtype not in (dtype, *_EIGHT_BITS):
        return (
            f"pages are {pages_dtype}, and to queries of {dtype} it takes that type,"
            " int8 and float8_e4m3fn"
        )
    if request.is_scaled and pages_dtype == dtype:
        return f"pages of {pages_dtype} have scales, and it takes them with 8 bits only"
    head_dim, page_size = request.query_shape[3], request.pages_shape[3]
    if head_dim not in (64, 128, 256):
        return f"heads have {head_dim} dimensions, and it takes 64, 128 and 256"
    # The copy engine writes rows of 128 bytes, and scales have 4 bytes a token.
    least = 32 if request.is_scaled else 8
    if page_size % least:
        scaled = " with scales" if request.is_scaled else ""
        return (
            f"pages{scaled} have {page_size} tokens, and it takes multiples of {least}"
        )
    return None


def attend(
    query: Float[Array, "B T H K"],
    pages: Pages,
    rows: Rows,
    *,
    layer: Int[Array, ""],
    num_pages: Int[Array, ""],
    scale: Float[Array, ""],
    soft_cap: float | None,
    blocks: Blocks | None = None,
) -> Float[Array, "B T H K"]:
    """Attend to the pages that each row sees."""
    plan = _plan(query, pages, rows, soft_cap, blocks)
    launch = functools.partial(_launch, query, pages, rows, layer, num_pages, scale)
    if plan.blocks.splits > 1:
        return combine(_partials(plan, launch(plan))).astype(query.dtype)
    (out,) = launch(dataclasses.replace(plan, is_in_part=False))
    return _ungrouped(plan, out)


def attend_in_part(
    query: Float[Array, "B T H K"],
    pages: Pages,
    rows: Rows,
    *,
    layer: Int[Array, ""],
    num_pages: Int[Array, ""],
    scale: Float[Array, ""],
    soft_cap: float | None,
    blocks: Blocks | None = None,
) -> Partials:
    """Return what the pages that each row sees say to its queries."""
    plan = _plan(query, pages, rows, soft_cap, blocks)
    launched = _launch(query, pages, rows, layer, num_pages, scale, plan)
    return merged(_partials(plan, launched))


def _plan(
    query: Array,
    pages: Pages,
    rows: Rows,
    soft_cap: float | None,
    blocks: Blocks | None,
) -> Plan:
    request = Request(
        query_shape=query.shape,
        pages_shape=pages.keys.shape,
        num_columns=rows.table.shape[1],
        dtype=query.dtype,
        pages_dtype=pages.keys.dtype,
        device=_dispatch.device(),
        window=None if rows.window is None else TRACED,
        soft_cap=soft_cap,
        is_scaled=pages.key_scales is not None,
    )
    blocks = blocks or _tuned_blocks(request)
    return Plan(request=request, blocks=blocks, is_in_part=True)


def _launch(
    query: Array,
    pages: Pages,
    rows: Rows,
    layer: Array,
    num_pages: Array,
    scale: Array,
    plan: Plan,
) -> tuple[Array, ...]:
    """Run the kernel on all tiles and splits."""
    blocks, grouped = plan.blocks, _grouped(plan, query)
    batch, num_kv_heads = grouped.shape[:2]
    num_parts = plan.num_tiles * blocks.splits
    outs = (jax.ShapeDtypeStruct(grouped.shape, query.dtype),)
    if plan.is_in_part:
        parts = (batch, num_kv_heads, num_parts)
        dims = ((plan.head_dim, blocks.rows), (blocks.rows,), (blocks.rows,))
        outs = tuple(jax.ShapeDtypeStruct((*parts, *d), jnp.float32) for d in dims)
    window = tile.UNLIMITED if rows.window is None else rows.window
    scalars = jnp.stack([jnp.asarray(x, jnp.int32) for x in (layer, num_pages, window)])
    whole = (x.astype(jnp.int32) for x in (rows.table, rows.first_page, rows.start))
    arrays = [grouped, *pages[:2], *whole, scalars, scale.astype(jnp.float32)[None]]
    scales = (pages.key_scales, pages.value_scales)
    arrays += (x.astype(jnp.float32) for x in scales if x is not None)
    kernel = plgpu.kernel(
        functools.partial(tile.attend, plan),
        out_type=outs,
        scratch_types=tile.scratch(plan),
        grid=(batch, num_kv_heads, num_parts),
        grid_names=("row", "head", "part"),
        kernel_name="paged_attention",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=plan.reduction_bytes
        ),
    )
    return tuple(kernel(*arrays))


def _grouped(plan: Plan, query: Float[Array, "B T H K"]) -> Float[Array, "B N R K"]:
    """Put the queries of each key head together; those of one token are."""
    batch, num_tokens, _, head_dim = query.shape
    split = (batch, num_tokens, plan.num_kv_heads, plan.group_size, head_dim)
    rows = jnp.swapaxes(query.reshape(split), 1, 2)
    rows = rows.reshape(batch, plan.num_kv_heads, plan.num_rows, head_dim)
    # The copy engine cuts a tile off at the end of an array, but no 8 rows in two.
    missing = -plan.num_rows % 8 if plan.num_rows > 8 else 0
    return jnp.pad(rows, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else rows


def _ungrouped(plan: Plan, x: Float[Array, "B N R *dims"]) -> Array:
    """Return rows to tokens and heads, [B, T, H, …]; some at the end are of none."""
    batch, num_tokens, num_heads = plan.request.query_shape[:3]
    x = x[:, :, : plan.num_rows]
    x = x.reshape(batch, plan.num_kv_heads, num_tokens, plan.group_size, *x.shape[3:])
    return jnp.swapaxes(x, 1, 2).reshape(batch, num_tokens, num_heads, *x.shape[4:])


def _partials(plan: Plan, launched: tuple[Array, ...]) -> Partials:
    """Return what each split says, [splits, B, T, H, …]."""
    weighted, maximum, total = launched

    def ordered(x: Float[Array, "B N P R *dims"]) -> Float[Array, "splits B T H *dims"]:
        batch, num_kv_heads, _, rows, *dims = x.shape
        splits = (batch, num_kv_heads, plan.num_tiles, plan.blocks.splits, rows, *dims)
        x = jnp.moveaxis(x.reshape(splits), 3, 0)
        x = x.reshape(plan.blocks.splits, batch, num_kv_heads, -1, *dims)
        return jax.vmap(functools.partial(_ungrouped, plan))(x)

    return Partials(
        maximum=ordered(maximum) / tile.LOG2_E,
        total=ordered(total),
        weighted=ordered(jnp.swapaxes(weighted, 3, 4)),
    )
