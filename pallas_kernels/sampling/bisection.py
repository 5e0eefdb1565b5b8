"""Draws without a sort: passes over the vocabulary that narrow a threshold.

In plain JAX, for every device. Top-k of few tokens takes them out of the vocabulary
first; a set of any other size is a mask.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.sampling.filters import BLOCK_SIZE, Draw, Filters, Request
from pallas_kernels.sampling.sets import fewest, most_likely, pack


def sample(
    request: Request,
    logits: Float[Array, "B V"],
    uniforms: Float[Array, "B 2"],
    forbidden: Bool[Array, "B V"] | None,
) -> Draw:
    """Draw as `api.sample` says, from logits that are divided by the temperature."""
    filters = request.filters
    if request.is_small_set:
        highest, ids = most_likely(logits, filters.top_k)
        total = total_for_union(logits, highest, filters)
        return draw_of_highest(highest, ids, total, uniforms, filters)
    below, weights = exponentials(logits)
    if filters.is_empty:
        kept = None if request.kept is None else unfiltered_bits(logits, forbidden)
        return Draw(*draw(below, weights, uniforms), kept)
    kept = filtered(weights, filters)
    return Draw(
        *draw(below, kept, uniforms), None if request.kept is None else pack(kept > 0)
    )


def filtered(weights: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """Return the weights of the tokens that the filters leave, and 0 for the others."""
    kept = weights
    if filters.top_k:
        counts = (weights > 0).astype(jnp.float32)
        enough = jnp.minimum(filters.top_k, jnp.sum(counts, axis=-1))
        kept = jnp.where(fewest(weights, counts, enough), weights, 0.0)
    if filters.top_p < 1:
        mass = weights if filters.union else kept
        enough = filters.top_p * jnp.sum(mass, axis=-1)
        kept = jnp.where(fewest(mass, mass, enough), kept, 0.0)
    if filters.min_p > 0:
        kept = jnp.where(weights >= filters.min_p, kept, 0.0)
    return kept


def draw_of_highest(
    highest: Float[Array, "B C"],
    ids: Array,
    total: Float[Array, "B 1"] | None,
    uniforms: Float[Array, "B 2"],
    filters: Filters,
) -> Draw:
    """Draw from few tokens: the highest logits of each row, in order, and their ids.

    Args:
        highest: logits.
        ids: of the tokens.
        total: as `total_for_union` returns it.
        uniforms: two per row.
        filters: as of `Filters.of`.
    """
    below, weights = kept_of_highest(highest, total, filters)
    places = inverse_cdf(weights, uniforms[:, 0])
    log_total, entropy = moments(below, weights)
    return Draw(
        tokens=_take(ids, places),
        logprobs=_take(below, places) - log_total,
        entropy=entropy,
        kept=jnp.where(weights > 0, ids, -1),
    )


def total_for_union(
    logits: Float[Array, "B V"], highest: Float[Array, "B C"], filters: Filters
) -> Float[Array, "B 1"] | None:
    """Return what top-p is a share of, if it is not of the highest alone."""
    if not filters.union or filters.top_p == 1:
        return None
    return jnp.sum(jnp.exp(logits - highest[:, :1]), axis=-1, keepdims=True)


def kept_of_highest(
    highest: Float[Array, "B C"], total: Float[Array, "B 1"] | None, filters: Filters
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Return what `exponentials` does, with weight 0 where the filters remove."""
    below, weights = exponentials(highest)
    keep = (weights > 0) & (weights >= filters.min_p)
    if filters.top_p < 1:
        if total is None:
            total = jnp.sum(weights, axis=-1, keepdims=True)
        # The tokens are in order: keep those with less than top_p before them.
        before = jnp.cumsum(weights, axis=-1) - weights
        keep &= before < filters.top_p * total
    return below, jnp.where(keep, weights, 0.0)


def greedy(
    logits: Float[Array, "B V"], forbidden: Bool[Array, "B V"] | None, *, has_kept: bool
) -> Draw:
    """Take the first of the most likely tokens of each row."""
    below, weights = exponentials(logits)
    # Several times faster than argmax on a CPU.
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
    tokens = jnp.min(jnp.where(below == 0, ids, logits.shape[-1] - 1), axis=-1)
    log_total, entropy = moments(below, weights)
    kept = unfiltered_bits(logits, forbidden) if has_kept else None
    return Draw(tokens, -log_total, entropy, kept)


def exponentials(logits):
    """Return the logits below the highest of their row, and their exponentials."""
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    return below, jnp.exp(below)


def unfiltered_bits(logits, forbidden):
    """Return sets of all tokens but the forbidden; empty ones if there are none."""
    if forbidden is not None:
        return pack(~forbidden)
    num_rows, vocab_size = logits.shape
    return jnp.zeros((num_rows, -(-vocab_size // 32)), jnp.uint32)


def draw(below, weights, uniforms):
    """Draw in proportion to the weights: a block of tokens, then one of them.

    Two uniform numbers give rare tokens their exact share: one alone has steps of 1e-7,
    more than the probability of many tokens of a large vocabulary.
    """
    blocks = _blocks(weights)
    block = inverse_cdf(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    tokens = block * BLOCK_SIZE + inverse_cdf(inside, uniforms[:, 1])
    log_total, entropy = moments(below, weights)
    return tokens, _take(below, tokens) - log_total, entropy


def moments(below, weights):
    """Return the log of the summed weights, and the entropy of their distribution.

    With w the exponentials of `below`, or 0, and Z their sum, the entropy is
    log Z - sum(w · below) / Z.
    """
    total = _sum(weights)
    mean = _sum(jnp.where(weights > 0, weights * below, 0.0)) / total
    return jnp.log(total), jnp.log(total) - mean


def inverse_cdf(weights, uniforms):
    """Return the first place where the summed weights pass a share of their total."""
    sums = jnp.cumsum(weights, axis=-1)
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)[None, :]
    # Rounded sums may rise at a weight of 0, or end below the share.
    passes = (sums > uniforms[:, None] * sums[:, -1:]) & (weights > 0)
    first = jnp.min(jnp.where(passes, places, weights.shape[-1]), axis=-1)
    last = jnp.max(jnp.where(weights > 0, places, 0), axis=-1)
    return jnp.minimum(first, last)


def _sum(x):
    """Sum over the vocabulary by blocks, which rounds less than one running sum."""
    return jnp.sum(jnp.sum(_blocks(x), axis=-1), axis=-1)


def _blocks(x):
    num_rows, vocab_size = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -vocab_size % BLOCK_SIZE)))
    return padded.reshape(num_rows, -1, BLOCK_SIZE)


def _take(x, places):
    return jnp.take_along_axis(x, places[:, None], axis=-1)[:, 0]
