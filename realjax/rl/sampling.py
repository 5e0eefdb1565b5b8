"""Drawing tokens, and the sets they are drawn from.

    logits / temperature -> top-k -> top-p of what is left -> one draw, renormalised

The set of tokens kept travels with the sample, so the trainer and the reference score
the token in the distribution it was drawn from. Sets are small: ids where top-k bounds
them, one bit per token otherwise (see `pallas_kernels.linear_logprob`), nothing where
nothing is filtered. An empty set is the whole vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.linear_logprob import is_kept, kept_logits, scaled_logits
from realjax.core.arrays import Array, Bool, Float, Int, Key, UInt

__all__ = ["Sampling", "is_kept", "kept_width", "normalizer", "sample"]

Kept = Int[Array, "*dims C"] | UInt[Array, "*dims C"]

# Sets of more ids than this are kept as bits.
LARGEST_ID_SET = 256
# A draw picks a block of this many tokens first, then one of its tokens.
BLOCK_SIZE = 64
ONE_BITS = 0x3F800000  # Of 1.0, as float32.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_k: int = 0
    """Most likely tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities add up to it."""
    union: bool = False
    """ReaL's rule: top-p of the distribution before top-k, and what either removes is
    removed. Otherwise, as elsewhere, top-p of the tokens that top-k kept."""
    greedy: bool = False
    """Always the most likely token, scored in the unfiltered distribution at
    temperature 1."""
    min_new_tokens: int = 0
    """End-of-sequence tokens are forbidden before as many."""
    max_new_tokens: int = 256

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(
                f"temperature is {self.temperature}; it must be positive, or 0 for"
                " greedy completions."
            )
        if self.top_k < 0:
            raise ValueError(
                f"top_k is {self.top_k}; it must be positive, or 0 to keep all tokens."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1].")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens is"
                f" {self.max_new_tokens}; they must be in order, and not negative."
            )
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens is 0; there is nothing to sample.")
        if self.temperature == 0 or self.greedy:
            # The trainer scores greedy tokens at the temperature it finds here.
            object.__setattr__(self, "greedy", True)
            object.__setattr__(self, "temperature", 1.0)


def kept_width(sampling: Sampling, vocab_size: int) -> tuple[str, int] | None:
    """Return the form of the sets `sample` records, and the width of one.

    Returns:
        None where nothing is ever filtered; ("ids", C) for int32 ids padded with -1;
        ("bits", ceil(vocab_size / 32)) for uint32 words.
    """
    top_k = _top_k(sampling, vocab_size)
    if 0 < top_k <= LARGEST_ID_SET:
        return "ids", top_k
    if top_k or _has_top_p(sampling) or sampling.min_new_tokens > 0:
        return "bits", -(-vocab_size // 32)
    return None


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    sampling: Sampling,
    *,
    forbidden: Bool[Array, "B V"] | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"], Kept | None]:
    """Draw one token per row.

    A row's token depends on its own logits and key only. Ties of probability are kept
    and chosen by the lower id.

    Args:
        logits: of the next token.
        keys: one per row.
        sampling: temperature and filters.
        forbidden: tokens of probability 0: end-of-sequence tokens before
            `min_new_tokens`.

    Returns:
        Tokens; their log-probabilities in the distribution they were drawn from; and
        the tokens kept, in the form `kept_width` tells.
    """
    form = kept_width(sampling, logits.shape[-1])
    if forbidden is not None:
        if form is None:
            raise ValueError(
                "Tokens are forbidden, but min_new_tokens is 0, so no kept tokens are"
                " recorded: set min_new_tokens."
            )
        logits = jnp.where(forbidden, -jnp.inf, logits)
    logits = scaled_logits(logits, sampling.temperature)  # Greedy: 1.
    if sampling.greedy:
        tokens, logprobs = _greedy(logits)
        if form is None:
            return tokens, logprobs, None
        return tokens, logprobs, _unfiltered_bits(logits, forbidden)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    if form is None:
        return *_draw(*_exponentials(logits), uniforms), None
    if form[0] == "ids":
        return _sample_ids(logits, uniforms, sampling)
    return _sample_bits(logits, uniforms, sampling, forbidden)


def normalizer(
    logits: Float[Array, "*dims V"], kept: Kept | None
) -> Float[Array, "*dims"]:
    """Return the log of the summed exponentials over the kept tokens.

    `logits - normalizer` are the log-probabilities `sample` draws from, where the
    logits are divided by the temperature already.
    """
    return jax.nn.logsumexp(kept_logits(logits, kept), axis=-1)


def _top_k(sampling: Sampling, vocab_size: int) -> int:
    """Return how many tokens top-k keeps; 0 where it removes none."""
    if sampling.greedy or sampling.top_k >= vocab_size:
        return 0
    return sampling.top_k


def _has_top_p(sampling: Sampling) -> bool:
    return not sampling.greedy and sampling.top_p < 1


def _greedy(logits):
    below, weights = _exponentials(logits)
    # The first of the most likely; several times faster than argmax on a CPU.
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
    tokens = jnp.min(jnp.where(below == 0, ids, logits.shape[-1] - 1), axis=-1)
    return tokens, -jnp.log(jnp.sum(weights, axis=-1))


def _exponentials(logits):
    """Return the logits below the highest of their row, and their exponentials."""
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    return below, jnp.exp(below)


def _sample_ids(logits, uniforms, sampling: Sampling):
    """Draw from at most `LARGEST_ID_SET` tokens."""
    highest, ids = jax.lax.top_k(logits, sampling.top_k)
    below, weights = _exponentials(highest)
    keep = weights > 0
    if sampling.top_p < 1:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sampling.union:
            total = jnp.sum(jnp.exp(logits - highest[:, :1]), axis=-1, keepdims=True)
        # The tokens are in order: keep those with less than top_p before them.
        before = jnp.cumsum(weights, axis=-1) - weights
        keep &= before < sampling.top_p * total
        weights = jnp.where(keep, weights, 0.0)
    places = _inverse_cdf(weights, uniforms[:, 0])
    logprobs = _take(below, places) - jnp.log(jnp.sum(weights, axis=-1))
    return _take(ids, places), logprobs, jnp.where(keep, ids, -1)


def _sample_bits(logits, uniforms, sampling: Sampling, forbidden):
    """Draw from a set of any size."""
    below, weights = _exponentials(logits)
    top_k = _top_k(sampling, logits.shape[-1])
    if not (top_k or _has_top_p(sampling)):
        tokens, logprobs = _draw(below, weights, uniforms)
        return tokens, logprobs, _unfiltered_bits(logits, forbidden)
    kept = weights
    if top_k:
        counts = (weights > 0).astype(jnp.float32)
        enough = jnp.minimum(top_k, jnp.sum(counts, axis=-1))
        kept = jnp.where(_fewest(weights, counts, enough), weights, 0.0)
    if _has_top_p(sampling):
        mass = weights if sampling.union else kept
        enough = sampling.top_p * jnp.sum(mass, axis=-1)
        kept = jnp.where(_fewest(mass, mass, enough), kept, 0.0)
    tokens, logprobs = _draw(below, kept, uniforms)
    return tokens, logprobs, _pack(kept > 0)


def _unfiltered_bits(logits, forbidden):
    """Return sets of all tokens but the forbidden; empty ones if there are none."""
    if forbidden is not None:
        return _pack(~forbidden)
    num_rows, vocab_size = logits.shape
    return jnp.zeros((num_rows, -(-vocab_size // 32)), jnp.uint32)


def _pack(mask: Bool[Array, "B V"]) -> UInt[Array, "B W"]:
    """Return one bit per token: bit v % 32 of word v // 32."""
    num_rows, vocab_size = mask.shape
    mask = jnp.pad(mask, ((0, 0), (0, -vocab_size % 32)))
    lanes = jnp.arange(32, dtype=jnp.uint32).reshape(1, 1, 32)
    bits = mask.reshape(num_rows, -1, 32).astype(jnp.uint32) << lanes
    return jnp.sum(bits, axis=-1, dtype=jnp.uint32)


def _fewest(weights, amounts, enough):
    """Mark the fewest tokens, largest weights first, whose amounts reach `enough`.

    Instead of sorting, bisects for the smallest weight to keep: in 30 steps over the
    bit patterns of float32, which order numbers in [0, 1] as integers. Of several
    tokens of that weight the lower ids are kept.

    Source: the idea of sort-free sampling in FlashInfer, https://flashinfer.ai.
    """
    patterns = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        reached = jnp.sum(jnp.where(patterns >= middle[:, None], amounts, 0.0), axis=-1)
        is_enough = reached >= enough
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    # Keeping the patterns from `low` on is enough; from `high` on it is not.
    low = jnp.zeros(enough.shape, jnp.int32)
    high = jnp.full(enough.shape, ONE_BITS + 1, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
    above, ties = patterns > low[:, None], patterns == low[:, None]
    missing = enough - jnp.sum(jnp.where(above, amounts, 0.0), axis=-1)
    each = jnp.max(jnp.where(ties, amounts, 0.0), axis=-1)
    num_needed = jnp.ceil(missing / jnp.maximum(each, jnp.finfo(jnp.float32).tiny))
    ties = jax.lax.cond(
        jnp.any(jnp.sum(ties, axis=-1) > num_needed),
        lambda: ties & (jnp.cumsum(ties, axis=-1) <= num_needed[:, None]),
        lambda: ties,
    )
    return (above | ties) & (weights > 0)


def _draw(below, weights, uniforms):
    """Draw in proportion to the weights: a block of tokens, then one of them.

    Two uniform numbers give rare tokens their exact share: one alone has steps of 1e-7,
    more than the probability of many tokens of a large vocabulary.
    """
    num_rows, vocab_size = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -vocab_size % BLOCK_SIZE)))
    blocks = padded.reshape(num_rows, -1, BLOCK_SIZE)
    block_weights = jnp.sum(blocks, axis=-1)
    block = _inverse_cdf(block_weights, uniforms[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    tokens = block * BLOCK_SIZE + _inverse_cdf(inside, uniforms[:, 1])
    log_total = jnp.log(jnp.sum(block_weights, axis=-1))
    return tokens, _take(below, tokens) - log_total


def _inverse_cdf(weights, uniforms):
    """Return the first place where the summed weights pass a share of their total."""
    sums = jnp.cumsum(weights, axis=-1)
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)[None, :]
    # Rounded sums may rise at a weight of 0, or end below the share.
    passes = (sums > uniforms[:, None] * sums[:, -1:]) & (weights > 0)
    first = jnp.min(jnp.where(passes, places, weights.shape[-1]), axis=-1)
    last = jnp.max(jnp.where(weights > 0, places, 0), axis=-1)
    return jnp.minimum(first, last)


def _take(x, places):
    return jnp.take_along_axis(x, places[:, None], axis=-1)[:, 0]
