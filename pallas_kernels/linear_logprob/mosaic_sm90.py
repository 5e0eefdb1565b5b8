"""The Hopper kernel: a tile of logits at a time, in the registers of two warpgroups.

                          columns of the kernel
            ┌──────────┬──────────┬──────────┬─
    128     │   tile   │   tile   │   tile   │   one block of threads goes along a row
    tokens  ├ 128×256 ─┴──────────┴──────────┴─  of tiles, or a part (split) of it
            │

A third warpgroup copies parts of the hidden states and of the kernel to shared memory,
some steps ahead (TMA); the two others multiply them, 64 tokens each (wgmma). Then a
tile is used up in place:

    sums            four numbers a token, as `chunked` adds them up
    logit_gradient  the gradient to the logits, written in the type of the hidden states

float32 logits never reach memory. Blocks of threads that run at the same time are
`group` tiles high, so that what they read fits the cache between them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_logprob.request import Request
from pallas_kernels.linear_logprob.tiles_sm90 import (
    ALIGNMENT,
    WARPGROUPS,
    WORD,
    Blocks,
    Counted,
    Form,
    for_each_tile,
    form_of,
    kernel_of,
    operands,
    own_rows_of,
    padded,
    place_of,
    transforms_of,
    whole_rows,
)

# As in `chunked`: finite, and the softmax of it is exactly 0.
NOT_KEPT = -1e30
NOWHERE = 2**30
"""Place of a target that is not among the columns."""

_LOG2_E = math.log2(math.e)
# exp2 of it is exactly 0.
_FAR_BELOW = -1e4
_ROW = plgpu.Layout.WGMMA.reduce(1)


def unsupported(request: Request) -> str | None:
    """Return why the kernel cannot serve a request, or None."""
    device = request.device
    if device.platform != "gpu":
        return f"it is for Hopper GPUs, and this is a {device.platform}"
    if device.compute_capability is None or device.compute_capability[0] != 9:
        found = device.compute_capability or "not known"
        return (
            "its instructions are those of compute capability 9.0 (Hopper), and that of"
            f" {device.kind or 'this GPU'} is {found}"
        )
    dtype = jnp.dtype(request.dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return (
            f"the hidden states are {dtype}, and it multiplies bfloat16 or float16"
            " (matrix units round float32 to 10 bits)"
        )
    if request.has_several:
        return "it scores one target of a token, and there are several"
    if request.width % ALIGNMENT:
        return f"its copies are {ALIGNMENT} wide, and the width is {request.width}"
    return None


def default_blocks(request: Request) -> Blocks:
    """Return sizes for a shape where none were measured.

    What blocks of threads at the same time read, `group` tiles of tokens and 132 /
    `group` of columns, should stay in half of the cache of 50 MB.
    """
    tokens = 2 * request.width * WARPGROUPS * Blocks.rows
    group = max(4, min(16, 16 * 2**20 // tokens))
    return Blocks(group=group)


def candidates(request: Request) -> tuple[Blocks, ...]:
    """Return sizes worth a try."""
    default = default_blocks(request)
    groups = sorted({default.group, 8, 16, 32})
    tiles = ((64, 256), (128, 128))
    return tuple(
        Blocks(rows=rows, columns=columns, group=max(1, group * 64 // rows))
        for rows, columns in tiles
        for group in groups
    )


def padded_columns(num_columns: int) -> int:
    """Return how many columns there must be."""
    return num_columns + -num_columns % ALIGNMENT


def sums(
    hidden: Float[Array, "T D"],
    columns: Float[Array, "D W"],
    targets: Int[Array, " T"],
    counted: Counted,
    *,
    temperature: float,
    soft_cap: float | None,
    blocks: Blocks,
) -> Float[Array, "S 4 T"]:
    """Sum over the columns, in some parts (splits) of them.

    Args:
        hidden: one vector per token, bfloat16 or float16.
        columns: of the linear layer, in the same type; W is a multiple of 64.
        targets: which of the columns is a token's target, or `NOWHERE`.
        counted: which logits count.
        temperature: divides the logits.
        soft_cap: bounds them before.
        blocks: sizes of the kernel.

    Returns:
        For each split: the highest logit; and with weights exp((logit - highest) /
        temperature) their sum and that of weight · (logit - highest) / temperature;
        and the target's logit or 0. Logits are capped and not divided.
    """
    form = form_of(hidden, columns, temperature, soft_cap, counted, blocks)

    def body(hidden, columns, targets, *rest):
        *counted, out, buffers, sums_smem = rest
        place = place_of(form)
        own_sums, own_rows = sums_smem.at[place.warpgroup], own_rows_of(form, place)

        def start():
            full = lambda x: plgpu.layout_cast(
                jnp.full((form.blocks.rows,), x, jnp.float32), _ROW
            )
            for i, x in enumerate((NOT_KEPT, 0.0, 0.0, 0.0)):
                own_sums[i] = full(x)

        def consume(first_column, products):
            target = _load(targets.at[own_rows])
            pieces = _logits(form, first_column, own_rows, products, counted, target)
            _add(form, own_sums, pieces)

        def finish():
            # From here on the weighted sum is one of natural logarithms.
            own_sums[2] = plgpu.load(own_sums.at[2], layout=_ROW) * (1 / _LOG2_E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_sums, out.at[place.split, :, own_rows])
            plgpu.wait_smem_to_gmem(0)

        for_each_tile(form, place, hidden, columns, buffers, consume, start, finish)

    out = jax.ShapeDtypeStruct((form.num_splits, 4, form.padded_tokens), jnp.float32)
    scratch = [plgpu.SMEM((WARPGROUPS, 4, form.blocks.rows), jnp.float32)]
    call = kernel_of(form, body, out, scratch)
    targets = padded(form, targets)
    found = call(whole_rows(hidden), columns, targets, *operands(form, counted))
    return found[..., : form.num_tokens]


def logit_gradient(
    hidden: Float[Array, "T D"],
    columns: Float[Array, "D W"],
    targets: Int[Array, " T"],
    counted: Counted,
    rows: Sequence[Float[Array, " T"]],
    *,
    temperature: float,
    soft_cap: float | None,
    blocks: Blocks,
) -> Float[Array, "T W"]:
    """Return the gradient to the products of hidden states and columns.

        gradient_v = ([v = target] a - p_v (b + c log p_v)) · (1 - (logit_v / cap)²)

    Args:
        hidden: as for `sums`.
        columns: as for `sums`.
        targets: as for `sums`.
        counted: as for `sums`.
        rows: of each token the log-normalizer, as a logit that is not divided; a; b;
            and c, which may be missing.
        temperature: as for `sums`.
        soft_cap: as for `sums`.
        blocks: as for `sums`.

    Returns:
        The gradient in the type of the hidden states.
    """
    form = form_of(hidden, columns, temperature, soft_cap, counted, blocks)
    num_slots = 2

    def body(hidden, columns, targets, rows, *rest):
        *counted, out, buffers, out_smem = rest
        place = place_of(form)
        own_rows = own_rows_of(form, place)

        def consume(first_column, products):
            target = _load(targets.at[own_rows])
            pieces = _logits(form, first_column, own_rows, products, counted, target)
            of_row = [_load(rows.at[i, own_rows]) for i in range(num_rows)]
            for i, piece in enumerate(pieces):
                slot = out_smem.at[place.warpgroup, i % num_slots]
                # The copy from this slot has read it.
                plgpu.wait_smem_to_gmem(num_slots - 1, wait_read_only=True)
                slot[...] = _gradient(form, piece, of_row).astype(form.dtype)
                plgpu.commit_smem()
                own_columns = pl.ds(first_column + i * form.piece, form.piece)
                plgpu.copy_smem_to_gmem(slot, out.at[own_rows, own_columns])

        def finish():
            plgpu.wait_smem_to_gmem(0)

        for_each_tile(
            form, place, hidden, columns, buffers, consume, lambda: None, finish
        )

    num_rows = len(rows)
    hidden = whole_rows(hidden)
    out = jax.ShapeDtypeStruct((hidden.shape[0], form.num_columns), form.dtype)
    scratch = [
        plgpu.SMEM(
            (WARPGROUPS, num_slots, form.blocks.rows, form.piece),
            form.dtype,
            transforms=transforms_of(form, form.piece),
        )
    ]
    call = kernel_of(form, body, out, scratch)
    gradient = call(
        hidden,
        columns,
        padded(form, targets),
        jnp.stack([padded(form, row) for row in rows]),
        *operands(form, counted),
    )
    return gradient[: form.num_tokens]


class _Piece(NamedTuple):
    """Some columns of a tile of logits."""

    logits: Array
    is_target: Array


# -- a tile of logits, in registers --------------------------------------------------


def _load(ref: Any) -> Array:
    """Load a number for each row of a tile."""
    return plgpu.load(ref, layout=_ROW, optimized=False)


def _across(row: Array, like: Array) -> Array:
    return jax.lax.broadcast_in_dim(row, like.shape, [0])


def _logits(
    form: Form, first_column, own_rows, products, counted: Sequence[Any], target
) -> Iterator[_Piece]:
    """Return capped logits, -1e30 where they do not count, and where the target is."""
    for start in range(0, form.blocks.columns, form.piece):
        logits = _capped(form, products[:, start : start + form.piece])
        place = plgpu.broadcasted_iota(
            jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA
        )
        if form.has_words:
            [words] = counted
            word = jax.lax.div(first_column, WORD) + start // WORD
            word = _across(_load(words.at[own_rows, word]), logits)
            # In these halves, the second is known to the compiler.
            bits = jax.lax.shift_right_arithmetic(word, place & 7)
            is_counted = bits & jax.lax.shift_left(1, place & 24) != 0
            logits = jnp.where(is_counted, logits, NOT_KEPT)
        elif form.is_bounded:
            [bounds] = counted
            lower, upper = (bounds[i] - (first_column + start) for i in (0, 1))
            is_counted = (place >= lower) & (place < upper)
            logits = jnp.where(is_counted, logits, NOT_KEPT)
        own_target = _across(target - (first_column + start), logits)
        yield _Piece(logits, place == own_target)


def _capped(form: Form, products: Array) -> Array:
    """Return cap · tanh(x / cap), from an exponential: the GPU's own has 11 bits."""
    cap = form.soft_cap
    if cap is None:
        return products
    return cap - 2 * cap / (1 + jnp.exp2(products * (2 * _LOG2_E / cap)))


def _add(form: Form, sums: Any, pieces: Iterator[_Piece]) -> None:
    """Add a tile to a token's sums; the weighted one is of logarithms to base 2.

    Registers are scarce: a piece is summed before the next one is looked at, and what
    was summed before is loaded late.
    """
    scale = _LOG2_E / form.temperature
    before = new = plgpu.load(sums.at[0], layout=_ROW)
    found = plgpu.load(sums.at[3], layout=_ROW)
    kept = []
    for logits, is_target in pieces:
        new = jnp.maximum(new, logits.max(axis=1))
        found = found + jnp.where(is_target, logits, 0.0).sum(axis=1)
        kept.append(logits)
    sums[0], sums[3] = new, found
    total = weighted = jnp.zeros_like(new)
    for logits in kept:
        below = (logits - _across(new, logits)) * scale
        weights = jnp.exp2(below)
        total = total + weights.sum(axis=1)
        weighted = weighted + (weights * below).sum(axis=1)
    shift = jnp.maximum((before - new) * scale, _FAR_BELOW)
    factor = jnp.exp2(shift)
    total_before = plgpu.load(sums.at[1], layout=_ROW)
    weighted_before = plgpu.load(sums.at[2], layout=_ROW)
    sums[1] = total + factor * total_before
    sums[2] = weighted + factor * (weighted_before + shift * total_before)


def _gradient(form: Form, piece: _Piece, rows: Sequence[Array]) -> Array:
    """Return the gradient to the products of some columns of a tile."""
    logits, is_target = piece
    normalizer, at_target, constant, *slope = (_across(row, logits) for row in rows)
    logprobs = (logits - normalizer) * (1.0 / form.temperature)
    factor = constant + slope[0] * logprobs if slope else constant
    gradient = -jnp.exp2(logprobs * _LOG2_E) * factor
    gradient = gradient + jnp.where(is_target, at_target, 0.0)
    if form.soft_cap is not None:
        # Of a logit that does not count, -1e30, the square would be infinite.
        ratio = jnp.maximum(logits * (1.0 / form.soft_cap), -1.0)
        gradient = gradient * (1.0 - ratio * ratio)
    return gradient
