"""Sets of the most likely tokens, found without sorting the vocabulary.

On a GPU `jax.lax.top_k` is a sort of the vocabulary, with temporaries of twice the
logits' size (256 rows, 128k tokens, top 50, compiled for an H200); those of
`most_likely` are a seventeenth of it.

A row's tokens are ordered by weight, and equal ones by id, the lower id first; every
set is the beginning of that order:

    fewest         a mask of as many tokens as reach a sum
    most_likely    the first C tokens themselves
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels._dispatch import device

Implementation = Literal["direct", "blocks"]

ONE_BITS = 0x3F800000  # Of 1.0, as float32.
# Parts that a pass of `fewest` cuts the range of weights into, outside of a CPU: each
# pass reads the vocabulary from memory, whatever it counts.
PARTS = 8
# On a CPU both ways take the same time at 8k tokens for 16 rows, at 128k for one.
LARGEST_DIRECT_CPU = 2**15


def fewest(
    weights: Float[Array, "B V"],
    amounts: Float[Array, "B V"],
    enough: Float[Array, "B"],
    *,
    parts: int | None = None,
    axes: tuple[str, ...] = (),
) -> Bool[Array, "B V"]:
    """Mark the fewest tokens, largest weights first, whose amounts reach `enough`.

    Instead of sorting, searches for the smallest weight to keep, over the bit patterns
    of float32, which order numbers in [0, 1] as integers: 30 bits, one or several of
    them a pass. Of several tokens of that weight the lower ids are kept.

    Source: the idea of sort-free sampling in FlashInfer, https://flashinfer.ai.

    Args:
        weights: in [0, 1]; tokens of weight 0 are never marked.
        amounts: what a token adds; the same for tokens of the same weight.
        enough: per row.
        parts: of equal width that a pass tells apart. None halves on a CPU, where
            comparisons cost more than reading (64 rows of 32k: 32 ms by halves, 55 ms
            by quarters), and takes `PARTS` elsewhere.
        axes: mesh axes that cut the vocabulary, in `jax.shard_map`: a pass sums a few
            numbers per row over them. Every device marks tokens of its own part.
    """
    if parts is None:
        parts = 2 if device().platform == "cpu" else PARTS
    patterns = jax.lax.bitcast_convert_type(weights, jnp.int32)

    over_devices = lambda x: jax.lax.psum(x, axes) if axes else x

    def sum_from(pivot):
        above = jnp.where(patterns >= pivot[:, None], amounts, 0.0)
        return jnp.sum(above, axis=-1)

    def narrow(_, bounds):
        low, high = bounds
        width, rest = jnp.divmod(high - low, parts)
        pivots = [low + width * n + rest * n // parts for n in range(1, parts)]
        sums = over_devices([sum_from(pivot) for pivot in pivots])
        new_low, new_high = low, high
        for pivot, sum_ in zip(pivots, sums, strict=True):
            # Pivots of a narrow range may stand at its beginning.
            is_enough = (sum_ >= enough) | (pivot <= low)
            new_low = jnp.where(is_enough, jnp.maximum(new_low, pivot), new_low)
            new_high = jnp.where(is_enough, new_high, jnp.minimum(new_high, pivot))
        return new_low, new_high

    # Keeping the patterns from `low` on is enough; from `high` on it is not.
    low = jnp.zeros(enough.shape, jnp.int32)
    high = jnp.full(enough.shape, ONE_BITS + 1, jnp.int32)
    num_passes = math.ceil(30 / math.log2(parts))
    low, _ = jax.lax.fori_loop(0, num_passes, narrow, (low, high))
    above, ties = patterns > low[:, None], patterns == low[:, None]
    missing = enough - over_devices(jnp.sum(jnp.where(above, amounts, 0.0), axis=-1))
    each = jnp.max(jnp.where(ties, amounts, 0.0), axis=-1)
    num_ties = num_all_ties = jnp.sum(ties, axis=-1)
    if axes:
        each = jax.lax.pmax(each, axes)
        num_all_ties = jax.lax.psum(num_ties, axes)
    num_needed = jnp.ceil(missing / jnp.maximum(each, jnp.finfo(jnp.float32).tiny))
    is_cut = jnp.any(num_all_ties > num_needed)
    if axes:  # Those with lower ids come first.
        num_needed -= _sum_before(num_ties, axes)
    ties = jax.lax.cond(
        is_cut,
        lambda: ties & (jnp.cumsum(ties, axis=-1) <= num_needed[:, None]),
        lambda: ties,
    )
    return (above | ties) & (weights > 0)


def _sum_before(x: Array, axes: tuple[str, ...]) -> Array:
    """Sum over the devices that hold what comes before this one's part."""
    index = jax.lax.axis_index(axes)
    parts = jax.lax.all_gather(x, axes)
    is_before = jnp.arange(len(parts), dtype=jnp.int32) < index
    return jnp.sum(jnp.where(is_before[:, None], parts, 0), axis=0)


def most_likely(
    logits: Float[Array, "B V"],
    count: int,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """Return the `count` highest logits of each row, in order, and their ids.

    "blocks" reads the vocabulary once, for the highest logit of every block of tokens.
    The C most likely tokens stand in the C blocks that come first by it, so the rest is
    about sqrt(C V) blocks and as many tokens, where `fewest` finds them. What is sorted
    in the end is C tokens.

    Args:
        logits: of the next token.
        count: C, at most the size of the vocabulary.
        implementation: "direct" is `jax.lax.top_k`, a sort of the vocabulary on a GPU;
            None takes it on a CPU where it is the faster one.

    Returns:
        Logits and ids; those past the tokens of probability above 0 may be any of
        probability 0, and their logits are -inf.
    """
    vocab_size = logits.shape[-1]
    if implementation is None:
        is_small = vocab_size <= LARGEST_DIRECT_CPU and device().platform == "cpu"
        implementation = "direct" if is_small else "blocks"
    if implementation == "direct":
        found, ids = jax.lax.top_k(logits, count)
        return found, ids
    block_size = 2 ** max(0, round(math.log2(vocab_size / count) / 2))
    padding = ((0, 0), (0, -vocab_size % block_size))
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf)
    blocks = blocks.reshape(logits.shape[0], -1, block_size)
    highest = jnp.max(blocks, axis=-1)
    shift = jnp.max(highest, axis=-1, keepdims=True)
    chosen = _largest(jnp.exp(highest - shift), count)
    some = _take(blocks, chosen[:, :, None], -jnp.inf).reshape(logits.shape[0], -1)
    inside = _largest(jnp.exp(some - shift), count)
    ids = chosen[:, :, None] * block_size + jnp.arange(block_size)[None, None, :]
    ids = _take(ids.reshape(some.shape), inside, vocab_size - 1)
    # From ascending ids to the order by weight.
    found, order = jax.lax.top_k(_take(some, inside, -jnp.inf), count)
    return found, jnp.take_along_axis(ids, order, axis=-1)


def pack(mask: Bool[Array, "B V"]) -> UInt[Array, "B W"]:
    """Return one bit per token: bit v % 32 of word v // 32."""
    num_rows, vocab_size = mask.shape
    mask = jnp.pad(mask, ((0, 0), (0, -vocab_size % 32)))
    lanes = jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 32)
    bits = mask.reshape(num_rows, -1, 32).astype(jnp.uint32) << lanes
    return jnp.sum(bits, axis=-1, dtype=jnp.uint32)


def _largest(weights, count: int):
    """Return the places of the largest weights, ascending; past the end for none."""
    has_weight = (weights > 0).astype(jnp.float32)
    enough = jnp.minimum(count, jnp.sum(has_weight, axis=-1))
    ranks = jnp.cumsum(fewest(weights, has_weight, enough), axis=-1, dtype=jnp.int32)
    find = lambda row: jnp.searchsorted(row, jnp.arange(1, count + 1, dtype=jnp.int32))
    return jax.vmap(find)(ranks)


def _take(x, places, missing):
    return jnp.take_along_axis(x, places, axis=1, mode="fill", fill_value=missing)


def ids_of_bits(
    bits: UInt[Array, "B W"], count: int, *, missing: int
) -> Int[Array, "B C"]:
    """Return the ids of the first `count` bits of each row, in order.

    Args:
        bits: as `pack` returns them.
        count: C.
        missing: stands in the places past the bits that there are.
    """
    sums = jnp.cumsum(jax.lax.population_count(bits).astype(jnp.int32), axis=-1)
    ranks = jnp.arange(1, count + 1, dtype=jnp.int32)
    word = jax.vmap(lambda row: jnp.searchsorted(row, ranks))(sums)
    sums = jnp.pad(sums, ((0, 0), (1, 0)))  # Of the words before.
    rank = ranks[None, :] - jnp.take_along_axis(sums, word, axis=1)
    words = _take(bits, word, 0)
    lanes = jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 32)
    ones = ((words[:, :, None] >> lanes) & 1).astype(jnp.int32)
    is_bit = (jnp.cumsum(ones, axis=-1) == rank[:, :, None]) & (ones == 1)
    ids = 32 * word + jnp.argmax(is_bit, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(is_bit, axis=-1), ids, missing)
