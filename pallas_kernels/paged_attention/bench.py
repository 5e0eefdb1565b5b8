"""Shapes at which paged attention is checked, compiled and timed.

Rows of decoding have one new token each, chunks of prompts 512. The tiny cases are what
goes wrong first: tokens that fill no tile, holes in a table, rows without a page,
windows, and keys in several parts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels import _dispatch, _tuning
from pallas_kernels.paged_attention import mosaic_sm90
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.reference import Pages, Rows, stored
from pallas_kernels.paged_attention.request import Request
from pallas_kernels.paged_attention.tile import Blocks
from pallas_kernels.testing.cases import Case, Limits

MODELS = {
    "llama-3.2-1b": (32, 8, 64),
    "llama-3.1-8b": (32, 8, 128),
    "qwen2.5-7b": (28, 4, 128),
    "gemma-2-9b": (16, 8, 256),
}
"""Query heads, key heads, and the width of one."""

GOAL = 0.75
"""Share of the bandwidth of memory that decoding aims at, with 64 rows or more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call.

    Attributes:
        heads: query heads, key heads, and the width of one.
        lengths: tokens of each row, the new ones included; 0 for none.
        num_tokens: new ones of each row.
        stored: type of the pages.
        dtype: of the queries.
        page_size: tokens of a page.
        num_columns: of the table; None is what the longest row takes.
        first_page: pages of each row before those in the table.
        window: as for `paged_attention`.
        soft_cap: likewise.
        holes: row and column of pages that are missing.
        blocks: of the kernel; None is its choice.
    """

    heads: tuple[int, int, int]
    lengths: tuple[int, ...]
    num_tokens: int = 1
    stored: DTypeLike = jnp.bfloat16
    dtype: DTypeLike = jnp.bfloat16
    page_size: int = 32
    num_columns: int | None = None
    first_page: int = 0
    window: int | None = None
    soft_cap: float | None = None
    holes: tuple[tuple[int, int], ...] = ()
    blocks: Blocks | None = None

    @property
    def columns(self) -> int:
        """Columns of the table."""
        longest = -(-max(self.lengths) // self.page_size) - self.first_page
        return self.num_columns or longest

    @property
    def is_scaled(self) -> bool:
        """Whether pages are of 8 bits, with scales."""
        return jnp.dtype(self.stored).itemsize == 1

    @property
    def request(self) -> Request:
        """What the choice of blocks looks at, on an H200."""
        num_heads, num_kv_heads, head_dim = self.heads
        batch = len(self.lengths)
        pages = batch * self.columns
        return Request(
            query_shape=(batch, self.num_tokens, num_heads, head_dim),
            pages_shape=(2, pages, num_kv_heads, self.page_size, head_dim),
            num_columns=self.columns,
            dtype=self.dtype,
            pages_dtype=_bits(self.stored),
            device=_dispatch.H200,
            window=self.window,
            soft_cap=self.soft_cap,
            is_scaled=self.is_scaled,
        )


def cases() -> tuple[Case, ...]:
    """Return the cases of paged attention."""
    return tuple(
        _case(name, shape, is_tiny=is_tiny)
        for shapes, is_tiny in ((_LARGE, False), (TINY, True))
        for name, shape in shapes.items()
    )


def _models() -> dict[str, Shape]:
    llama = MODELS["llama-3.1-8b"]
    half_full = (4096,) * 4 + (2048,) * 4
    found = {
        f"{model}, 256 rows of 1024 tokens": Shape(heads=heads, lengths=(1024,) * 256)
        for model, heads in MODELS.items()
        if model != "gemma-2-9b"
    }
    for stored_as in (jnp.int8, jnp.float8_e4m3fn):
        for model in ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b"):
            name = f"{model}, 256 rows of 1024 tokens in {jnp.dtype(stored_as)}"
            found[name] = Shape(
                heads=MODELS[model], lengths=(1024,) * 256, stored=stored_as
            )
    ragged = tuple(range(256, 4096, 60))
    return found | {
        "llama-3.1-8b, 64 rows of 4096 tokens": Shape(
            heads=llama, lengths=(4096,) * 64
        ),
        "llama-3.1-8b, 64 rows of 256 to 4036 tokens": Shape(
            heads=llama, lengths=ragged
        ),
        "llama-3.1-8b, 1 row of 16384 tokens": Shape(heads=llama, lengths=(16384,)),
        "gemma-2-9b, 64 rows of 4096 tokens with a window of 1024": Shape(
            heads=MODELS["gemma-2-9b"],
            lengths=(4096,) * 64,
            window=1024,
            soft_cap=50.0,
        ),
        "llama-3.1-8b, 8 chunks of 512 tokens": Shape(
            heads=llama, lengths=half_full, num_tokens=512
        ),
        "llama-3.1-8b, 8 chunks of 512 tokens in int8": Shape(
            heads=llama, lengths=half_full, stored=jnp.int8, num_tokens=512
        ),
        "llama-3.2-1b, 8 chunks of 512 tokens": Shape(
            heads=MODELS["llama-3.2-1b"], lengths=half_full, num_tokens=512
        ),
        "qwen2.5-7b, 8 chunks of 512 tokens in float8_e4m3fn": Shape(
            heads=MODELS["qwen2.5-7b"],
            lengths=half_full,
            stored=jnp.float8_e4m3fn,
            num_tokens=512,
        ),
        "gemma-2-9b, 8 chunks of 512 tokens with a window of 1024": Shape(
            heads=MODELS["gemma-2-9b"],
            lengths=half_full,
            window=1024,
            soft_cap=50.0,
            num_tokens=512,
        ),
    }


_LARGE = _models()

TINY = {
    "one token of rows of any length, one of none": Shape(
        heads=(8, 2, 64), lengths=(150, 1, 0, 64), page_size=16
    ),
    "a group of 7 in int8, holes": Shape(
        heads=(14, 2, 128),
        lengths=(140, 96),
        stored=jnp.int8,
        holes=((0, 1), (1, 0)),
        # So few stages that copies go to where others were.
        blocks=Blocks(rows=8, keys=64, stages=2, splits=1),
    ),
    "5 tokens of a group of 3 in float8_e4m3fn, moved on": Shape(
        heads=(6, 2, 64),
        lengths=(190, 133),
        num_tokens=5,
        stored=jnp.float8_e4m3fn,
        first_page=2,
        window=70,
    ),
    "keys in 3 parts, a window, a soft cap": Shape(
        heads=(8, 1, 64),
        lengths=(260, 40),
        page_size=64,
        window=150,
        soft_cap=2.0,
        blocks=Blocks(rows=8, keys=64, stages=2, splits=3),
    ),
    "20 tokens in several tiles, pages of two steps, float16": Shape(
        heads=(4, 1, 64),
        lengths=(150, 20),
        num_tokens=20,
        stored=jnp.float16,
        dtype=jnp.float16,
        page_size=128,
        blocks=Blocks(rows=32, keys=64, stages=3, splits=1),
    ),
    "heads of 256": Shape(heads=(2, 1, 256), lengths=(100,), window=20),
}
"""Shapes for the interpreter."""


def inputs(shape: Shape, key: Array) -> tuple[Array, ...]:
    """Draw queries, pages and scales, and make a table of shuffled pages."""
    keys = jax.random.split(key, 6)
    batch, pages_shape = len(shape.lengths), shape.request.pages_shape
    query = jax.random.normal(keys[0], shape.request.query_shape, shape.dtype)
    lengths = jnp.array(shape.lengths, jnp.int32)
    column = jnp.arange(shape.columns, dtype=jnp.int32)[None]
    in_use = -(-lengths // shape.page_size)[:, None] - shape.first_page
    table = jax.random.permutation(keys[1], pages_shape[1]).astype(jnp.int32)
    table = jnp.where(column < in_use, table.reshape(batch, -1), -1)
    for row, hole in shape.holes:
        table = table.at[row, hole].set(-1)
    first_page = jnp.full((batch,), shape.first_page, jnp.int32)
    start = jnp.maximum(lengths - shape.num_tokens, 0)
    found = (query, table, first_page, start, jnp.max(in_use))
    if not shape.is_scaled:
        draw = functools.partial(
            jax.random.normal, shape=pages_shape, dtype=shape.stored
        )
        return *found, draw(keys[2]), draw(keys[3])
    stacks = [_draw_bits(key, pages_shape, shape.stored) for key in keys[2:4]]
    draw = functools.partial(
        jax.random.uniform, shape=pages_shape[:-1], minval=0.01, maxval=0.03
    )
    return *found, *stacks, draw(keys[4]), draw(keys[5])


def _draw_bits(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Draw numbers of 8 bits up to 127; floats as their bits."""
    whole = jax.random.randint(key, shape, -127, 128, jnp.int8)
    if dtype == jnp.int8:
        return whole
    return jax.lax.bitcast_convert_type(whole.astype(dtype), jnp.uint8)


def _bits(dtype: DTypeLike) -> DTypeLike:
    return jnp.uint8 if dtype == jnp.float8_e4m3fn else dtype


def attend(shape: Shape, implementation: str | None, *arrays: Array) -> Array:
    """Run an implementation on `inputs`; rows of no tokens are 0."""
    query, table, first_page, start, num_pages, *pages = arrays
    found = paged_attention(
        query,
        *pages,
        layer=jnp.int32(1),
        table=table,
        first_page=first_page,
        start=start,
        num_pages=num_pages,
        window=shape.window,
        soft_cap=shape.soft_cap,
        implementation=implementation,
    )
    return _where_there(shape, found)


def attend_with(shape: Shape, blocks: Blocks, *arrays: Array) -> Array:
    """Run the kernel on `inputs`, cut in some way."""
    query, table, first_page, start, num_pages, *pages = arrays
    window = None if shape.window is None else jnp.int32(shape.window)
    found = mosaic_sm90.attend(
        query,
        Pages(*pages),
        Rows(table, first_page, start, window),
        layer=jnp.int32(1),
        num_pages=num_pages,
        scale=jnp.float32(shape.heads[2] ** -0.5),
        soft_cap=shape.soft_cap,
        blocks=blocks,
    )
    return _where_there(shape, found)


def _where_there(shape: Shape, found: Array) -> Array:
    is_there = jnp.array(shape.lengths)[:, None, None, None] > 0
    return jnp.where(is_there, found, 0)


def _reference(shape: Shape, *arrays: Array) -> Array:
    """Gather in float32."""
    query, table, first_page, start, num_pages, *pages = arrays
    pages = [stored(x).astype(jnp.float32) for x in pages[:2]] + pages[2:]
    query = query.astype(jnp.float32)
    run = jax.jit(functools.partial(attend, shape, "gathered"))
    with jax.default_matmul_precision("highest"):
        return run(query, table, first_page, start, num_pages, *pages)


def _case(name: str, shape: Shape, *, is_tiny: bool) -> Case:
    num_heads, num_kv_heads, head_dim = shape.heads
    itemsize = jnp.dtype(shape.stored).itemsize
    reach = shape.window or max(shape.lengths)
    seen = [min(n, reach + shape.num_tokens - 1) for n in shape.lengths]
    of_token = 2 * num_kv_heads * (head_dim * itemsize + 4 * shape.is_scaled)
    query_bytes = len(seen) * shape.num_tokens * num_heads * head_dim * 2
    # Of the queries of a row, each sees one token more than the one before.
    pairs = sum(
        min(length - token, reach)
        for length in shape.lengths
        for token in range(min(shape.num_tokens, length))
    )
    is_decoding = shape.num_tokens == 1
    mosaic: Any = functools.partial(attend, shape, "mosaic")
    if shape.blocks is not None:
        mosaic = functools.partial(attend_with, shape, shape.blocks)
    # What each part of the keys says; and of chunks, queries and outputs by key head.
    blocks = shape.blocks or mosaic_sm90.default_blocks(shape.request)
    of_parts = 4 * len(seen) * num_kv_heads * blocks.splits * blocks.rows * head_dim
    temporary_bytes = 2**16 + (0 if is_decoding else query_bytes)
    if blocks.splits > 1:
        temporary_bytes += of_parts + of_parts // 8
    return Case(
        operation="paged_attention",
        name=name,
        is_tiny=is_tiny,
        inputs=functools.partial(inputs, shape),
        implementations={
            "mosaic": mosaic,
            "gathered": functools.partial(attend, shape, "gathered"),
        },
        reference=functools.partial(_reference, shape),
        tolerance=1e-2,
        num_bytes=sum(seen) * of_token + 2 * query_bytes,
        num_flops=4 * pairs * num_heads * head_dim,
        goal=GOAL if is_decoding and len(seen) >= 64 else None,
        limits=Limits(
            temporary_bytes=temporary_bytes,
            num_wgmma=head_dim // 8,
            # The table, positions and options are read one by one.
            least_access_bytes=16,
            small_accesses=40,
        ),
        candidates=mosaic_sm90.candidates(shape.request),
        with_blocks=lambda blocks: functools.partial(attend_with, shape, blocks),
        tuning_key=_tuning.key_of(*mosaic_sm90.tuning_of(shape.request)),
    )
