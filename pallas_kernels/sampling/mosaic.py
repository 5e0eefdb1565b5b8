"""Draws by one kernel: a block of threads finds a row's threshold, and its token.

The kernel (see `kernel.py`) reads a row several times. Rows of a large vocabulary stay
in the GPU's cache between the passes, if not too many are worked on at once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, UInt

from pallas_kernels import _tuning
from pallas_kernels.linear_logprob.reference import scaled_logits
from pallas_kernels.sampling import bisection
from pallas_kernels.sampling.filters import BLOCK_SIZE, Draw, Filters, Request
from pallas_kernels.sampling.row import (
    TILE_BLOCKS,
    Cut,
    Row,
    Shared,
    Static,
    Tile,
    first_past,
    full,
)
from pallas_kernels.sampling.search import search
from pallas_kernels.sampling.sets import ids_of_bits

DTYPES = ("float32", "bfloat16")
LARGEST_VOCABULARY = BLOCK_SIZE**3
"""Tokens: the draw takes three steps of 64."""


_PARAMS = plgpu.CompilerParams(
    approx_math=True,
    # The layouts are all given. Looking for others took minutes where this takes
    # seconds.
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the kernel is laid out.

    Attributes:
        warpgroups: of 128 threads, which share a row: 2, 4 or 8.
        tiles: of 512 tokens that each reads before it works on them.
        pivots: weights that a pass of the search sums above; even.
    """

    warpgroups: int
    tiles: int
    pivots: int


def default_blocks(request: Request) -> Blocks:
    """Return the layout where nothing was measured."""
    capability = request.device.compute_capability
    # Four tiles at once spill registers before Hopper, and of a search in a set.
    is_old = capability is None or capability < (9, 0)
    filters = request.filters
    is_twice = filters.top_k > 0 and filters.top_p < 1 and not request.is_small_set
    return Blocks(warpgroups=4, tiles=2 if is_old or is_twice else 4, pivots=6)


def candidates(request: Request) -> tuple[Blocks, ...]:
    """Return layouts worth a try."""
    return tuple(
        Blocks(warpgroups=warpgroups, tiles=tiles, pivots=pivots)
        for warpgroups, tiles in ((4, 2), (4, 4), (8, 1), (8, 2), (2, 8))
        for pivots in (4, 6, 8)
    )


def tuning_of(request: Request) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Return types, with the filters, and the shape that layouts are measured for."""
    filters = request.filters
    has = f"k{int(filters.top_k > 0)}p{int(filters.top_p < 1)}"
    return (jnp.dtype(request.dtype), has), request.shape


def _tuned_blocks(request: Request) -> Blocks:
    dtypes, shape = tuning_of(request)
    return _tuning.tuned(
        "sampling",
        default_blocks(request),
        device=request.device,
        dtypes=dtypes,
        shape=shape,
    )


def unsupported(request: Request) -> str | None:
    """Return why the kernel cannot draw so, or None."""
    device = request.device
    if device.platform != "gpu":
        return f"it runs on GPUs, and this is for a {device.platform}"
    if device.compute_capability is None or device.compute_capability < (8, 0):
        return "it needs compute capability 8.0 or later"
    if jnp.dtype(request.dtype).name not in DTYPES:
        return f"logits are {jnp.dtype(request.dtype).name}, not {' or '.join(DTYPES)}"
    if request.shape[-1] > LARGEST_VOCABULARY:
        return f"there are {request.shape[-1]} tokens, more than {LARGEST_VOCABULARY}"
    return None


def sample(
    request: Request,
    logits: Float[Array, "B V"],
    uniforms: Float[Array, "B 2"],
    forbidden: Bool[Array, "B V"] | None,
    *,
    blocks: Blocks | None = None,
) -> Draw:
    """Draw as `api.sample` says; the kernel divides by the temperature."""
    blocks = blocks or _tuned_blocks(request)
    filters = request.filters
    if request.is_small_set:
        return _sample_small_set(logits, uniforms, filters, blocks)
    has_bits = request.kept is not None and not filters.is_empty
    found = run(logits, uniforms, filters, blocks, has_bits=has_bits, has_draw=True)
    bits = found.get("bits")
    if request.kept is not None and filters.is_empty:
        bits = bisection.unfiltered_bits(logits, forbidden)
    tokens, logprobs, entropy = found["drawn"]
    return Draw(tokens, logprobs, entropy, bits)


def _sample_small_set(logits, uniforms, filters: Filters, blocks: Blocks) -> Draw:
    """Take the highest logits out of the vocabulary; the rest is small work."""
    top_k = dataclasses.replace(filters, top_p=1.0, min_p=0.0, union=False)
    found = run(logits, uniforms, top_k, blocks, has_bits=True, has_draw=False)
    ids = ids_of_bits(found["bits"], filters.top_k, missing=logits.shape[-1])
    scaled = scaled_logits(logits, filters.temperature)
    some = jnp.take_along_axis(scaled, ids, 1, mode="fill", fill_value=-jnp.inf)
    # From ascending ids to the order by weight.
    highest, order = lax.top_k(some, filters.top_k)
    ids = jnp.minimum(jnp.take_along_axis(ids, order, axis=1), logits.shape[-1] - 1)
    total = bisection.total_for_union(scaled, highest, filters)
    return bisection.draw_of_highest(highest, ids, total, uniforms, filters)


def run(
    logits: Float[Array, "B V"],
    uniforms: Float[Array, "B 2"],
    filters: Filters,
    blocks: Blocks,
    *,
    has_bits: bool,
    has_draw: bool,
    has_barrier: bool = True,
) -> dict[str, Any]:
    """Run the kernel.

    Args:
        logits: of the next token.
        uniforms: two per row.
        filters: as of `Filters.of`.
        blocks: the layout.
        has_bits: whether the kept tokens are wanted.
        has_draw: whether a token is.
        has_barrier: False leaves a barrier out, for a test of the tests.

    Returns:
        "drawn", the tokens, log-probabilities and entropies, and "bits", the words of
        the kept tokens: those that are wanted.
    """
    num_rows, vocab_size = logits.shape
    # An addition that costs a copy, where there is something to add.
    width = max(TILE_BLOCKS * BLOCK_SIZE, -(-vocab_size // BLOCK_SIZE) * BLOCK_SIZE)
    if width > vocab_size:
        padding = ((0, 0), (0, width - vocab_size))
        logits = jnp.pad(logits, padding, constant_values=-jnp.inf)
    static = Static(
        filters=filters,
        num_blocks=width // BLOCK_SIZE,
        warpgroups=blocks.warpgroups,
        tiles=blocks.tiles,
        pivots=blocks.pivots,
        has_bits=has_bits,
        has_draw=has_draw,
        has_barrier=has_barrier,
    )
    outputs = {}
    if has_draw:
        row = lambda dtype: jax.ShapeDtypeStruct((num_rows,), dtype)
        outputs["drawn"] = (row(jnp.int32), row(jnp.float32), row(jnp.float32))
    if has_bits:
        shape = (num_rows, 2, static.num_padded)
        outputs["bits"] = jax.ShapeDtypeStruct(shape, jnp.int32)
    found = plgpu.kernel(
        functools.partial(_body, static),
        out_type=outputs,
        scratch_types=Shared.of(static),
        grid=(num_rows,),
        grid_names=("row",),
        num_threads=static.warpgroups,
        thread_name="warpgroup",
        compiler_params=_PARAMS,
    )(logits.reshape(num_rows, -1, BLOCK_SIZE), uniforms.astype(jnp.float32))
    if has_bits:
        found["bits"] = _words(static, found["bits"], vocab_size)
    return found


def _body(static: Static, logits_ref, uniforms_ref, outputs: Any, *shared: Any):
    """Everything for one row, in one warpgroup."""
    index, warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")
    row = Row(static, logits_ref, Shared(*shared), index, warpgroup)
    row.find_highest()
    filters, turn = static.filters, jnp.int32(1)
    by_count: Cut | None = None
    by_mass: Cut | None = None
    if filters.top_k:
        enough = lambda total: jnp.minimum(total, float(filters.top_k))
        by_count, turn = search(row, turn, enough, is_count=True, within=None)
    if filters.top_p < 1:
        enough = lambda total: filters.top_p * total
        within = None if filters.union else by_count
        by_mass, turn = search(row, turn, enough, is_count=False, within=within)
    cut = by_mass or by_count or Cut(0, -1)
    if by_count and by_mass and filters.union:
        cut = by_count.also(by_mass)
    _finish(row, turn, cut, uniforms_ref, outputs)


def _finish(row: Row, turn, cut: Cut, uniforms_ref: Any, outputs: Any):
    """Write the bits of the kept tokens, draw one, and measure the distribution."""
    static, min_p = row.static, row.static.filters.min_p

    def step(carry, tile: Tile):
        weights, patterns = row.weights(tile)
        kept = row.is_kept(tile, patterns, cut)
        if min_p > 0:
            kept &= weights >= min_p
        if static.has_bits:
            _write_bits(row, tile, kept, outputs["bits"])
        if not static.has_draw:
            return carry
        total, mean = carry
        weights = jnp.where(kept, weights, 0.0)
        row.store_blocks(tile, weights)
        below = jnp.where(kept, tile.logits - row.highest, 0.0)
        return total + weights, mean + weights * below

    carry = row.scan(step, (full(0.0), full(0.0)) if static.has_draw else ())
    if not static.has_draw:
        return
    (total, mean), _ = row.total(turn, sums=carry)

    @pl.when(row.warpgroup == 0)
    def _draw():
        first, second = uniforms_ref[row.index, 0], uniforms_ref[row.index, 1]
        block, _ = row.find_block(lambda sum_: first * sum_)
        weights, patterns, ids = row.of_block(block)
        kept = cut.keeps(patterns, ids)
        if min_p > 0:
            kept &= weights >= min_p
        weights = jnp.where(kept, weights, 0.0)
        place = first_past(weights, lambda sum_: second * sum_).place
        log_total = jnp.log(total)
        tokens_ref, logprobs_ref, entropy_ref = outputs["drawn"]
        tokens_ref[row.index] = block * BLOCK_SIZE + place
        logprobs_ref[row.index] = row.logit(block, place) - row.highest - log_total
        entropy_ref[row.index] = log_total - mean / total


def _write_bits(row: Row, tile: Tile, kept, bits_ref: Any):
    """Write two words a block, each with a bit for 32 tokens."""
    bits = jnp.where(kept, lax.shift_left(jnp.int32(1), row.columns & 31), 0)
    for half in range(2):
        is_half = (row.columns >= 32) if half else (row.columns < 32)
        words = jnp.sum(jnp.where(is_half, bits, 0), axis=1)
        bits_ref[row.index, half, pl.ds(tile.place, TILE_BLOCKS)] = words


def _words(static: Static, bits, vocab_size: int) -> UInt[Array, "B W"]:
    """Put the words that the kernel wrote in the order of the tokens."""
    tail = (static.num_tiles - 1) * TILE_BLOCKS
    end = static.num_tiles * TILE_BLOCKS
    rest = static.num_blocks - tail
    bits = jnp.concatenate([bits[..., :tail], bits[..., end - rest : end]], axis=-1)
    words = lax.bitcast_convert_type(bits, jnp.uint32).swapaxes(1, 2)
    return words.reshape(len(bits), -1)[:, : -(-vocab_size // 32)]
