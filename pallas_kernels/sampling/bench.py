"""Shapes at which draws are checked, compiled and timed.

The logits are like those of a trained model: few tokens have most of the probability,
and the others fall off as a power of their rank. The tiny cases are what goes wrong
first: a vocabulary that fills no tile, ties, logits of -inf, one token with all of the
probability.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import _dispatch, _tuning
from pallas_kernels.linear_logprob.reference import scaled_logits
from pallas_kernels.sampling import bisection, mosaic
from pallas_kernels.sampling.api import sample
from pallas_kernels.sampling.filters import BLOCK_SIZE, Draw, Filters, Form, Request
from pallas_kernels.testing.cases import Case, Limits

VOCABULARIES = {"llama 3": 128256, "qwen 2.5": 152064}

_SMALL_ACCESSES = 16
GOAL = 1 / 3
"""Share of the speed of one pass over the logits: the time of three."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call.

    Attributes:
        num_rows: B.
        vocab_size: V.
        filters: of the draw.
        kept: form of the sets.
        kind: of the logits: "peaked", "flat", "ties", "equal", "certain" or "holes".
        dtype: of the logits.
        blocks: of the kernel; None is its choice.
    """

    num_rows: int
    vocab_size: int
    filters: Filters
    kept: Form | None
    kind: str = "peaked"
    dtype: DTypeLike = jnp.float32
    blocks: mosaic.Blocks | None = None

    @property
    def request(self) -> Request:
        """What the choice of blocks looks at, on an H200."""
        return Request(
            shape=(self.num_rows, self.vocab_size),
            dtype=self.dtype,
            device=_dispatch.H200,
            filters=self.filters.of(self.vocab_size),
            kept=self.kept,
        )


def cases() -> tuple[Case, ...]:
    """Return the cases of sampling."""
    return tuple(
        _case(name, shape, is_tiny=is_tiny)
        for shapes, is_tiny in ((_models(), False), (TINY, True))
        for name, shape in shapes.items()
    )


TOP_P = Filters(top_p=0.95)
TOP_K = Filters(top_k=50)
BOTH = Filters(top_k=50, top_p=0.95)


def _models() -> dict[str, Shape]:
    found = {}
    for model, vocab_size in VOCABULARIES.items():
        for num_rows in (64, 256):
            make = functools.partial(Shape, num_rows=num_rows, vocab_size=vocab_size)
            size = f"{model}, {num_rows} rows"
            found |= {
                f"{size}, top-p 0.95": make(filters=TOP_P, kept="bits"),
                f"{size}, top-k 50": make(filters=TOP_K, kept="ids"),
                f"{size}, top-k 50 and top-p 0.95": make(filters=BOTH, kept="ids"),
            }
    make = functools.partial(Shape, num_rows=64, vocab_size=128256)
    return found | {
        "llama 3, 64 rows, no filter": make(filters=Filters(), kept=None),
        "llama 3, 64 rows, min-p 0.05": make(filters=Filters(min_p=0.05), kept="bits"),
        "llama 3, 64 flat rows, top-p 0.95": make(
            filters=TOP_P, kept="bits", kind="flat"
        ),
        "llama 3, 64 rows of bfloat16, top-p 0.95": make(
            filters=TOP_P, kept="bits", dtype=jnp.bfloat16
        ),
        "llama 3, 64 rows, top-k 1000 and top-p 0.95": make(
            filters=Filters(top_k=1000, top_p=0.95), kept="bits"
        ),
    }


_SMALL = mosaic.Blocks(warpgroups=2, tiles=4, pivots=6)
_tiny = functools.partial(Shape, num_rows=2, blocks=_SMALL)

TINY = {
    "1000 tokens, top-p": _tiny(
        vocab_size=1000, filters=Filters(top_p=0.9, temperature=0.8), kept="bits"
    ),
    "blocks that fill no tile, top-k": _tiny(
        vocab_size=1100, filters=Filters(top_k=20, top_p=0.9), kept="ids"
    ),
    "ties, a large top-k and top-p": _tiny(
        vocab_size=1000,
        filters=Filters(top_k=300, top_p=0.8),
        kept="bits",
        kind="ties",
    ),
    "equal logits, a union": _tiny(
        vocab_size=600,
        filters=Filters(top_k=290, top_p=0.6, union=True),
        kept="bits",
        kind="equal",
    ),
    "one certain token, min-p": _tiny(
        vocab_size=512, filters=Filters(min_p=1.0), kept="bits", kind="certain"
    ),
    "impossible tokens of bfloat16, no filter": _tiny(
        vocab_size=700, filters=Filters(), kept=None, kind="holes", dtype=jnp.bfloat16
    ),
    "a flat row on four warpgroups, a tiny top-p": _tiny(
        vocab_size=1472,
        filters=Filters(top_p=1e-3),
        kept="bits",
        kind="flat",
        blocks=mosaic.Blocks(warpgroups=4, tiles=2, pivots=8),
    ),
}
"""Shapes for the interpreter."""


def inputs(shape: Shape, key: Array) -> tuple[Array, Array]:
    """Make logits, and uniform numbers that draw tokens far from where rounding tells.

    Each points to the middle of a token's share, and the token is drawn at random.
    """
    keys = jax.random.split(key, 4)
    logits = _logits(shape, *keys[:2]).astype(shape.dtype)
    filters = shape.filters.of(shape.vocab_size)
    scaled = scaled_logits(logits, filters.temperature)
    if shape.request.is_small_set:
        highest = jax.lax.top_k(scaled, filters.top_k)[0]
        total = bisection.total_for_union(scaled, highest, filters)
        _, weights = bisection.kept_of_highest(highest, total, filters)
        first = second = _middle(weights, keys[2])[0]
    else:
        weights = bisection.filtered(bisection.exponentials(scaled)[1], filters)
        padding = ((0, 0), (0, -shape.vocab_size % BLOCK_SIZE))
        blocks = jnp.pad(weights, padding).reshape(shape.num_rows, -1, BLOCK_SIZE)
        first, block = _middle(jnp.sum(blocks, axis=-1), keys[2])
        inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
        second, _ = _middle(inside, keys[3])
    return logits, jnp.stack([first, second], axis=1)


def _middle(weights: Float[Array, "B N"], key: Array) -> tuple[Array, Array]:
    """Draw places, and return where in (0, 1) their shares have their middles."""
    places = jax.random.categorical(key, jnp.log(weights))
    sums = jnp.cumsum(weights, axis=-1)
    middles = (sums - weights / 2) / sums[:, -1:]
    return jnp.take_along_axis(middles, places[:, None], axis=1)[:, 0], places


def _logits(shape: Shape, order: Array, noise: Array) -> Float[Array, "B V"]:
    size = (shape.num_rows, shape.vocab_size)
    normal = jax.random.normal(noise, size)
    if shape.kind == "flat":
        return normal
    if shape.kind == "ties":
        return jnp.round(2 * normal)
    if shape.kind == "equal":
        return jnp.full(size, -3.5)
    if shape.kind == "certain":
        return normal.at[:, 77].set(1e4)
    ranks = jnp.argsort(jax.random.uniform(order, size), axis=-1)
    peaked = 0.3 * normal - 1.7 * jnp.log1p(ranks.astype(jnp.float32))
    return (
        jnp.where(ranks % 3 == 1, -jnp.inf, peaked) if shape.kind == "holes" else peaked
    )


def draw(shape: Shape, implementation: str | None, logits, uniforms) -> Any:
    """Run an implementation on `inputs`."""
    found = sample(
        logits,
        uniforms,
        **dataclasses.asdict(shape.filters),
        kept=shape.kept,
        implementation=implementation,
    )
    return compared(found)


def draw_with(shape: Shape, blocks: mosaic.Blocks, logits, uniforms) -> Any:
    """Run the kernel on `inputs`, laid out in some way."""
    request = dataclasses.replace(shape.request, device=_dispatch.device())
    return compared(mosaic.sample(request, logits, uniforms, None, blocks=blocks))


def compared(found: Draw) -> Any:
    """Return what is compared: of the kept sets, how many there are.

    Rounding may tell whether one token more is kept.
    """
    if found.kept is None:
        return found
    if found.kept.dtype == jnp.uint32:
        kept = jax.lax.population_count(found.kept)
    else:
        kept = found.kept >= 0
    number = jnp.sum(kept, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    return found._replace(kept=None), number


def _case(name: str, shape: Shape, *, is_tiny: bool) -> Case:
    kernel: Callable[..., Any] = functools.partial(draw, shape, "mosaic")
    if shape.blocks is not None:
        kernel = functools.partial(draw_with, shape, shape.blocks)
    pass_bytes = shape.num_rows * shape.vocab_size * jnp.dtype(shape.dtype).itemsize
    return Case(
        operation="sampling",
        name=name,
        is_tiny=is_tiny,
        inputs=functools.partial(inputs, shape),
        implementations={
            "mosaic": kernel,
            "bisection": functools.partial(draw, shape, "bisection"),
            "sorted": functools.partial(draw, shape, "sorted"),
        },
        reference=functools.partial(draw, shape, "sorted"),
        tolerance=2e-3,
        num_bytes=pass_bytes,
        goal=None if is_tiny else GOAL,
        # Logits come by four; words of the set and results are single.
        limits=Limits(
            temporary_bytes=_temporary_bytes(shape),
            least_access_bytes=4 * jnp.dtype(shape.dtype).itemsize,
            small_accesses=_SMALL_ACCESSES,
        ),
        gpus=("h200", "a100"),
        candidates=() if is_tiny else mosaic.candidates(shape.request),
        with_blocks=functools.partial(functools.partial, draw_with, shape),
        tuning_key=_tuning.key_of(*mosaic.tuning_of(shape.request)),
    )


def _temporary_bytes(shape: Shape) -> int:
    """What the words of the kept tokens take, in the kernel's order and in the row's.

    A padded vocabulary is copied.
    """
    words = 0 if shape.kept is None else shape.num_rows * -(-shape.vocab_size // 32) * 4
    copied = 0
    if shape.vocab_size % BLOCK_SIZE or shape.vocab_size < 8 * BLOCK_SIZE:
        copied = shape.num_rows * (shape.vocab_size + 512) * 4
    return 2**16 + 13 * words // 4 + copied
