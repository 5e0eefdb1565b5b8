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
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """Score one target per row, and measure the entropy of its distribution.

    Returns:
        Log-probabilities and entropies, float32, in nats. Both are those of the
        distribution restricted to the kept ids and renormalised; the log-probability of
        a target outside its set is -inf.
    """
    logits = scaled_logits(project(hidden, kernel), temperature)
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


def scaled_logits(
    logits: Float[Array, "*dims V"], temperature: float
) -> Float[Array, "*dims V"]:
    """Divide float32 logits by the temperature."""
    logits = logits.astype(jnp.float32)
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
        raise TypeError(
            f"A set of kept tokens has type {kept.dtype}; it must be int32 (ids padded"
            " with -1) or uint32 (one bit per token)."
        )
    return mask | is_empty[..., None]


def _unpack(bits: UInt[Array, "*dims W"], vocab_size: int) -> Bool[Array, "*dims V"]:
    if bits.shape[-1] != -(-vocab_size // 32):
        raise ValueError(
            f"{bits.shape[-1]} words of 32 bits do not fit a vocabulary of"
            f" {vocab_size}: it takes {-(-vocab_size // 32)}."
        )
    lanes = jnp.left_shift(jnp.uint32(1), jnp.arange(32, dtype=jnp.uint32))
    words = bits[..., None]
    mask = (words & lanes.reshape((1,) * bits.ndim + (32,))) != 0
    return mask.reshape(*bits.shape[:-1], -1)[..., :vocab_size]


def _scatter(ids: Int[Array, "*dims C"], vocab_size: int) -> Bool[Array, "*dims V"]:
    # Out of range, and dropped, where there is no id: -1 would be the last token.
    ids = jnp.where(ids < 0, vocab_size, ids)
    none = jnp.zeros((vocab_size,), bool)
    mark = jax.vmap(lambda row: none.at[row].set(True, mode="drop"))
    return mark(ids.reshape(-1, ids.shape[-1])).reshape(*ids.shape[:-1], vocab_size)
