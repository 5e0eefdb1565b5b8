"""The plain definition: all logits at once, and automatic differentiation.

A set of kept token ids comes in one of two forms, told apart by its type, and an empty
set stands for the whole vocabulary:

    int32  [..., C]             ids in any order, padded with -1
    uint32 [..., ceil(V / 32)]  bit v % 32 of word v // 32 is set if v is kept
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

Kept = Int[Array, "*dims C"] | UInt[Array, "*dims C"]


def linear_logprob(
    hidden: Float[Array, "T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, " T"],
    *,
    temperature: float = 1.0,
    kept: Kept | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Score one target per row, and measure the entropy of its distribution.

    Args:
        hidden: one vector per token.
        kernel: of the linear layer.
        targets: token ids to score.
        temperature: the logits are divided by it, after the cap.
        kept: the tokens each distribution is restricted to.
        soft_cap: logits become cap · tanh(logits / cap).
        vocab_size: columns of the kernel past it are padding; None has none.

    Returns:
        Log-probabilities and entropies, float32, in nats. Both are those of the
        distribution restricted to the kept ids and renormalised; the log-probability of
        a target outside its set is -inf.
    """
    logits = project(hidden, kernel[:, :vocab_size])
    logits = scaled_logits(logits, temperature, soft_cap=soft_cap)
    logprobs = jax.nn.log_softmax(kept_logits(logits, kept), axis=-1)
    # 0 log 0 = 0, and its gradient too.
    finite = jnp.where(logprobs == -jnp.inf, 0.0, logprobs)
    entropy = -jnp.sum(jnp.exp(logprobs) * finite, axis=-1)
    return jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0], entropy


def project(
    hidden: Float[Array, "T D"], kernel: Float[Array, "D V"]
) -> Float[Array, "T V"]:
    """Return float32 logits; the kernel takes the type of the hidden states."""
    kernel = kernel.astype(hidden.dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def capped_logits(
    logits: Float[Array, "*dims V"], soft_cap: float | None
) -> Float[Array, "*dims V"]:
    """Bound logits smoothly: cap · tanh(logits / cap), as Gemma 2 does."""
    if soft_cap is None:
        return logits
    return soft_cap * jnp.tanh(logits * (1.0 / soft_cap))


def scaled_logits(
    logits: Float[Array, "*dims V"],
    temperature: float,
    *,
    soft_cap: float | None = None,
) -> Float[Array, "*dims V"]:
    """Cap float32 logits, then divide them by the temperature."""
    logits = capped_logits(logits.astype(jnp.float32), soft_cap)
    return logits if temperature == 1.0 else logits * (1.0 / temperature)


def kept_logits(
    logits: Float[Array, "*dims V"], kept: Kept | None
) -> Float[Array, "*dims V"]:
    """Return the logits with -inf at every token that is not kept."""
    if kept is None:
        return logits
    return jnp.where(is_kept(kept, logits.shape[-1]), logits, -jnp.inf)


def is_kept(kept: Kept, vocab_size: int) -> Bool[Array, "*dims V"]:
    """Return which tokens are kept: all of them where the set is empty."""
    if kept.dtype == jnp.uint32:
        mask, is_empty = _unpack(kept, vocab_size), jnp.all(kept == 0, axis=-1)
    elif kept.dtype == jnp.int32:
        mask, is_empty = _scatter(kept, vocab_size), jnp.all(kept < 0, axis=-1)
    else:
        raise _wrong_type(kept)
    return mask | is_empty[..., None]


def _wrong_type(kept: Kept) -> TypeError:
    return TypeError(
        f"A set of kept tokens has type {kept.dtype}; it must be int32 (ids padded"
        " with -1) or uint32 (one bit per token)."
    )


def _check_words(bits: UInt[Array, "*dims W"], vocab_size: int) -> None:
    if bits.shape[-1] != -(-vocab_size // 32):
        raise ValueError(
            f"{bits.shape[-1]} words of 32 bits do not fit a vocabulary of"
            f" {vocab_size}: it takes {-(-vocab_size // 32)}."
        )


def _unpack(bits: UInt[Array, "*dims W"], vocab_size: int) -> Bool[Array, "*dims V"]:
    _check_words(bits, vocab_size)
    lanes = jnp.left_shift(jnp.uint32(1), jnp.arange(32, dtype=jnp.uint32))
    words = bits[..., None]
    mask = (words & lanes.reshape((1,) * bits.ndim + (32,))) != 0
    return mask.reshape(*bits.shape[:-1], -1)[..., :vocab_size]


def is_kept_between(
    kept: Kept, first: Int[Array, ""] | int, width: int, vocab_size: int
) -> Bool[Array, "*dims W"]:
    """Return `is_kept` of the columns first to first + width alone.

    Args:
        kept: the sets.
        first: id of the first column; may be traced.
        width: number of columns; those past the vocabulary are not kept.
        vocab_size: of the whole.
    """
    columns = first + jnp.arange(width, dtype=jnp.int32)
    per_row = columns.reshape((1,) * (kept.ndim - 1) + (width,))
    if kept.dtype == jnp.uint32:
        _check_words(kept, vocab_size)
        words = jnp.take(kept, columns >> 5, axis=-1, mode="clip")
        mask = (words >> (per_row & 31).astype(jnp.uint32)) & 1 != 0
        is_empty = jnp.all(kept == 0, axis=-1)
    elif kept.dtype == jnp.int32:
        mask, is_empty = _scatter(kept - first, width), jnp.all(kept < 0, axis=-1)
    else:
        raise _wrong_type(kept)
    return (mask | is_empty[..., None]) & (per_row < vocab_size)


def words_between(
    kept: Kept,
    first: Int[Array, ""] | int,
    width: int,
    vocab_size: int,
    *,
    num_left_out: Int[Array, ""] | int = 0,
) -> UInt[Array, "*dims W"]:
    """Return `is_kept_between` as bits: c % 32 of word c // 32 is column first + c.

    Args:
        kept: the sets.
        first: id of the first column; may be traced.
        width: number of columns; those past the vocabulary are not kept.
        vocab_size: of the whole.
        num_left_out: first columns that are not kept either; may be traced.
    """
    num_words = -(-width // 32)
    if kept.dtype == jnp.uint32:
        _check_words(kept, vocab_size)
        places = (first >> 5) + jnp.arange(num_words + 1, dtype=jnp.int32)
        words = jnp.take(kept, places, axis=-1, mode="fill", fill_value=0)
        shift = jnp.asarray(first & 31, jnp.uint32)
        # In two steps: a shift by all 32 bits means nothing.
        later = (words[..., 1:] << 1) << (31 - shift)
        words, is_empty = (words[..., :-1] >> shift) | later, jnp.all(kept == 0, -1)
    elif kept.dtype == jnp.int32:
        words = _scatter_bits(jnp.where(kept < 0, -1, kept - first), num_words)
        is_empty = jnp.all(kept < 0, axis=-1)
    else:
        raise _wrong_type(kept)
    words = jnp.where(is_empty[..., None], jnp.uint32(0xFFFFFFFF), words)
    last = jnp.clip(vocab_size - first, 0, width)
    counted = _ones_below(last, num_words) & ~_ones_below(num_left_out, num_words)
    return words & counted.reshape((1,) * (kept.ndim - 1) + (num_words,))


def _ones_below(column: Int[Array, ""] | int, num_words: int) -> UInt[Array, " W"]:
    """Return words with the bits of all columns before one."""
    count = jnp.clip(column - 32 * jnp.arange(num_words, dtype=jnp.int32), 0, 32)
    some = (jnp.uint32(1) << jnp.minimum(count, 31).astype(jnp.uint32)) - 1
    return jnp.where(count == 32, jnp.uint32(0xFFFFFFFF), some)


def _scatter_bits(ids: Int[Array, "*dims C"], num_words: int) -> UInt[Array, "*dims W"]:
    """Set the bits of ids; those of other words are dropped."""
    *rows, _ = ids.shape
    ids = jnp.where((ids < 0) | (ids >= 32 * num_words), 32 * num_words, ids)
    # Bits are added up, so an id that is there twice must count once.
    ids = jnp.sort(ids.reshape(-1, ids.shape[-1]), axis=-1)
    is_again = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)))
    bits = jnp.uint32(1) << (ids & 31).astype(jnp.uint32)
    bits = jnp.where(is_again, jnp.uint32(0), bits)
    none = jnp.zeros((num_words,), jnp.uint32)
    add = jax.vmap(lambda word, bit: none.at[word].add(bit, mode="drop"))
    return add(ids >> 5, bits).reshape(*rows, num_words)


def _scatter(ids: Int[Array, "*dims C"], vocab_size: int) -> Bool[Array, "*dims V"]:
    # Out of range, and dropped, where there is no id: -1 would be the last token.
    ids = jnp.where((ids < 0) | (ids > vocab_size), vocab_size, ids)
    none = jnp.zeros((vocab_size,), bool)
    mark = jax.vmap(lambda row: none.at[row].set(True, mode="drop"))
    return mark(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape[:-1], vocab_size)
