"""The same draws where devices have parts of the vocabulary, without gathering logits.

To be called in `jax.shard_map`. What devices exchange per row, for a vocabulary of V
tokens over n devices:

    top-k, top-p    a few sums a pass, as `fewest` counts them
    ids             the C most likely tokens of each part
    the draw        V / 64 sums of blocks, and one block
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.linear_logprob.reference import scaled_logits
from pallas_kernels.sampling import bisection
from pallas_kernels.sampling.filters import (
    BLOCK_SIZE,
    LARGEST_ID_SET,
    Draw,
    Filters,
    Form,
)
from pallas_kernels.sampling.sets import fewest, most_likely, pack


def sharded_sample(
    logits: Float[Array, "B V"],
    uniforms: Float[Array, "B 2"],
    *,
    axes: tuple[str, ...],
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    union: bool = False,
    forbidden: Bool[Array, "B V"] | None = None,
    kept: Form | None = None,
) -> Draw:
    """Draw one token per row, as `sample` does of the whole vocabulary.

    The token is that of `sample` for the same uniform numbers, up to rounding where a
    sum decides.

    Args:
        logits: of this device's part of the vocabulary. All parts are equally wide, in
            the order of `axes`, slowest first.
        uniforms: two per row, the same on the devices of `axes`.
        axes: mesh axes that cut the vocabulary.
        vocab_size: tokens in all; columns past it are padding.
        temperature: as for `sample`, and so are all filters.
        top_k: see there.
        top_p: see there.
        min_p: see there.
        union: see there.
        forbidden: tokens of this part of probability 0.
        kept: "ids" of all parts on each device, or "bits" of the own part: words for
            `out_specs` to put together.

    Raises:
        ValueError: a filter is out of its range, ids are asked for and top_k is not in
            1 to `LARGEST_ID_SET`, or words of bits would belong to two parts.
    """
    filters = Filters(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, union=union
    ).of(vocab_size)
    width = logits.shape[1]
    if kept == "bits" and width % 32:
        raise ValueError(
            f"Parts of {width} tokens do not fill words of 32 bits. Pad the vocabulary"
            " to a multiple of 32 times the number of parts."
        )
    if kept == "ids" and not 0 < filters.top_k <= LARGEST_ID_SET:
        raise ValueError(
            f"Ids of the kept tokens are asked for, but top_k is {filters.top_k}; it"
            f" takes 1 to {LARGEST_ID_SET}. Ask for bits."
        )
    first = lax.axis_index(axes) * width
    ids = first + jnp.arange(width, dtype=jnp.int32)[None, :]
    is_out = ids >= vocab_size if forbidden is None else forbidden | (ids >= vocab_size)
    logits = scaled_logits(jnp.where(is_out, -jnp.inf, logits), temperature)
    if 0 < filters.top_k <= LARGEST_ID_SET and kept != "bits":
        draw = _draw_of_highest(logits, uniforms, filters, first, axes)
        return draw if kept else draw._replace(kept=None)
    highest = lax.pmax(jnp.max(logits, axis=-1, keepdims=True), axes)
    below = logits - highest
    weights = jnp.exp(below)
    left = _filtered(weights, filters, axes)
    tokens, logprobs, entropy = _draw(below, left, uniforms, first, vocab_size, axes)
    if kept is None:
        return Draw(tokens, logprobs, entropy, None)
    if filters.is_empty and forbidden is None:
        return Draw(tokens, logprobs, entropy, pack(jnp.zeros(logits.shape, bool)))
    return Draw(
        tokens, logprobs, entropy, pack(~is_out if filters.is_empty else left > 0)
    )


def _filtered(weights, filters: Filters, axes: tuple[str, ...]):
    """Return `bisection.filtered` of this part."""
    total = lambda x: lax.psum(jnp.sum(x, axis=-1), axes)
    kept = weights
    if filters.top_k:
        counts = (weights > 0).astype(jnp.float32)
        enough = jnp.minimum(filters.top_k, total(counts))
        kept = jnp.where(fewest(weights, counts, enough, axes=axes), weights, 0.0)
    if filters.top_p < 1:
        mass = weights if filters.union else kept
        enough = filters.top_p * total(mass)
        kept = jnp.where(fewest(mass, mass, enough, axes=axes), kept, 0.0)
    if filters.min_p > 0:
        kept = jnp.where(weights >= filters.min_p, kept, 0.0)
    return kept


def _draw(below, weights, uniforms, first, vocab_size: int, axes: tuple[str, ...]):
    """Draw a block of the whole vocabulary, which may be of two parts, and a token."""
    num_rows, width = weights.shape
    # Put where the row's blocks begin.
    shift = first % BLOCK_SIZE
    num_own = -(-width // BLOCK_SIZE) + 1
    padding = num_own * BLOCK_SIZE - width
    own = jnp.roll(jnp.pad(weights, ((0, 0), (0, padding))), shift, axis=1)
    own = jnp.sum(own.reshape(num_rows, -1, BLOCK_SIZE), axis=-1)
    num_blocks = -(-vocab_size // BLOCK_SIZE)
    place = first // BLOCK_SIZE + jnp.arange(num_own, dtype=jnp.int32)
    blocks = jnp.zeros((num_rows, num_blocks), jnp.float32)
    blocks = lax.psum(blocks.at[:, place].set(own, mode="drop"), axes)

    block = bisection.inverse_cdf(blocks, uniforms[:, 0])
    inside = block[:, None] * BLOCK_SIZE + jnp.arange(BLOCK_SIZE, dtype=jnp.int32)[None]
    tokens = bisection.inverse_cdf(_of(weights, inside - first, axes), uniforms[:, 1])
    tokens += block * BLOCK_SIZE
    total = jnp.sum(blocks, axis=-1)
    mean = jnp.sum(jnp.where(weights > 0, weights * below, 0.0), axis=-1)
    log_total = jnp.log(total)
    logprobs = _of(below, (tokens - first)[:, None], axes)[:, 0] - log_total
    return tokens, logprobs, log_total - lax.psum(mean, axes) / total


def _of(x, places, axes: tuple[str, ...]):
    """Return what is at some places, from whichever device has them."""
    is_here = (places >= 0) & (places < x.shape[1])
    found = jnp.take_along_axis(x, jnp.clip(places, 0, x.shape[1] - 1), axis=1)
    return lax.psum(jnp.where(is_here, found, 0.0), axes)


def _draw_of_highest(logits, uniforms, filters: Filters, first, axes) -> Draw:
    """Draw from the most likely tokens of all parts."""
    count = min(filters.top_k, logits.shape[1])
    highest, ids = most_likely(logits, count)
    gather = lambda x: lax.all_gather(x, axes, axis=1, tiled=True)
    highest, ids = gather(highest), gather(ids + first)
    # Of equals, the lower id: parts are in order, and so are equals in a part.
    highest, order = lax.top_k(highest, filters.top_k)
    ids = jnp.take_along_axis(ids, order, axis=1)
    total = None
    if filters.union and filters.top_p < 1:
        total = jnp.sum(jnp.exp(logits - highest[:, :1]), axis=-1, keepdims=True)
        total = lax.psum(total, axes)
    return bisection.draw_of_highest(highest, ids, total, uniforms, filters)
