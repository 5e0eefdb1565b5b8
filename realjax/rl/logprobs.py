"""Log-probabilities and values of the tokens of packed rows.

A model's output at place p is about the token at place p + 1. Here, and nowhere else,
outputs move to the token they are about:

    segment_ids   1  1  1  2  2  0
    tokens        a  b  c  d  e  -
    hidden        ha hb hc hd he -
    logprobs      0  b  c  0  e  0      b = log π(b | ha), c = log π(c | hb), …

The first token of a segment is given, not chosen: its log-probability and value are 0,
as on padding.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import linear_logprob as linear_logprob_lib
from realjax.core.arrays import Array, Bool, Float, Int, UInt

# (hidden [R, S, D], kernel [D, V], targets [R, S], **how) -> two of [R, S]
LinearLogprob = Callable[..., tuple[Array, Array]]
# (hidden [R, S, D], kernel [D, V], num_top=K, **how) -> two of [R, S, K]
LinearTop = Callable[..., tuple[Array, Array]]
RowsOfNumbers = Float[Array, "R S *K"] | Int[Array, "R S *K"]


def shift_right(x: RowsOfNumbers) -> RowsOfNumbers:
    """Move what place p - 1 says about token p to place p; 0 at place 0."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0), *((0, 0) for _ in x.shape[2:])))


def is_chosen(segment_ids: Int[Array, "R S"]) -> Bool[Array, "R S"]:
    """Return which tokens follow another of their segment, and are not padding."""
    return (segment_ids != 0) & (segment_ids == shift_right(segment_ids))


def token_logprobs(
    hidden: Float[Array, "R S D"],
    kernel: Float[Array, "D V"],
    tokens: Int[Array, "R S"] | Int[Array, "R S K"],
    segment_ids: Int[Array, "R S"],
    *,
    temperature: float = 1.0,
    kept: Int[Array, "R S C"] | UInt[Array, "R S C"] | None = None,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    constrain_kernel: Callable[[Array], Array] | None = None,
    chunk_size: int | None = None,
    linear_logprob: LinearLogprob | None = None,
) -> tuple[Float[Array, "R S"] | Float[Array, "R S K"], Float[Array, "R S"]]:
    """Return each token's log-probability, and the entropy it was chosen at.

    The sampler's own definition: `sampling.sample` with the same temperature and kept
    sets gives the same numbers. No array of all tokens by the vocabulary exists.

    Args:
        hidden: final hidden states.
        kernel: of the language head.
        tokens: ids; or at each place several that might have been there.
        segment_ids: 1, 2, … within a row; 0 is padding.
        temperature: the tokens were sampled at.
        kept: the set each token was chosen from (at its own place), as
            `sampling.sample` returns it; an empty set is the whole vocabulary.
        soft_cap: logits become cap · tanh(logits / cap), before the division.
        vocab_size: columns of the kernel past it are padding; None has none.
        constrain_kernel: sharding constraint that gathers the kernel, once and in the
            type of `hidden`; also put on its gradient.
        chunk_size: most tokens that are scored at a time, over all devices; None
            chooses.
        linear_logprob: does the work on a mesh, with collectives of its own, in the
            place of `constrain_kernel`; None is one device's, or the compiler's.

    Returns:
        Log-probabilities and entropies in nats, float32; 0 where no token was chosen.
    """
    # What is about token p + 1, next to the hidden state at p. The last place of a row
    # scores token 0, and is not looked at.
    tokens_ahead = jnp.roll(tokens, -1, axis=1)
    kept_ahead = None if kept is None else jnp.roll(kept, -1, axis=1)
    if linear_logprob is None:
        linear_logprob = functools.partial(
            _flat_linear_logprob,
            constrain_kernel=constrain_kernel,
            chunk_size=_chunk_size(segment_ids.shape, kernel.shape[1], chunk_size),
        )
    logprobs, entropy = linear_logprob(
        hidden,
        kernel,
        tokens_ahead,
        temperature=temperature,
        kept=kept_ahead,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
    )
    return _placed(logprobs, segment_ids), _placed(entropy, segment_ids)


def top_logprobs(
    hidden: Float[Array, "R S D"],
    kernel: Float[Array, "D V"],
    segment_ids: Int[Array, "R S"],
    *,
    num_top: int,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    linear_top: LinearTop | None = None,
) -> tuple[Float[Array, "R S K"], Int[Array, "R S K"]]:
    """Return what each token was most likely to be, the likeliest first.

    No gradient, and no array of all tokens by the vocabulary.

    Args:
        hidden: final hidden states.
        kernel: of the language head.
        segment_ids: 1, 2, … within a row; 0 is padding.
        num_top: K, how many.
        temperature: divides the logits.
        soft_cap: as for `token_logprobs`.
        vocab_size: likewise.
        linear_top: does the work on a mesh; None is one device's.

    Returns:
        Log-probabilities among all tokens, in nats, float32, and ids, int32; 0 where no
        token was chosen.
    """
    options: dict[str, Any] = {"num_top": num_top, "temperature": temperature}
    options |= {"soft_cap": soft_cap, "vocab_size": vocab_size}
    if linear_top is None:
        rows = hidden.reshape(-1, hidden.shape[2])
        found = linear_logprob_lib.linear_top(rows, kernel, **options)
        found = jax.tree.map(lambda x: x.reshape(*segment_ids.shape, -1), found)
    else:
        found = linear_top(hidden, kernel, **options)
    logprobs, ids = found
    return _placed(logprobs, segment_ids), _placed(ids, segment_ids)


def _placed(x: Array, segment_ids: Array) -> Array:
    """Return what is said of the next token at that token's own place."""
    mask = is_chosen(segment_ids)
    mask = mask.reshape(*mask.shape, *(1 for _ in x.shape[2:]))
    return jnp.where(mask, shift_right(x), jnp.zeros((), x.dtype))


def _flat_linear_logprob(hidden, kernel, targets, *, kept, **options):
    """Score rows as one long row."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    scores = linear_logprob_lib.linear_logprob(
        flat(hidden), kernel, flat(targets), kept=jax.tree.map(flat, kept), **options
    )
    shape = targets.shape[:2]
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), scores)


def _chunk_size(rows_shape, vocab_size: int, chunk_size: int | None) -> int:
    """Cut all rows at the same places, so that chunks are sharded as the rows are."""
    num_rows, num_places = rows_shape
    num_tokens = num_rows * num_places
    chunk_size = chunk_size or linear_logprob_lib.default_chunk_size(
        num_tokens, vocab_size
    )
    fewest = max(1, -(-num_tokens // chunk_size))
    cuts = (n for n in range(fewest, 2 * fewest + 1) if num_places % n == 0)
    return -(-num_tokens // next(cuts, fewest))


def token_values(
    values: Float[Array, "R S"], segment_ids: Int[Array, "R S"]
) -> Float[Array, "R S"]:
    """Return the value of the state before each token, float32; 0 where none is.

    Args:
        values: the critic's scalar at each place: of the state after that token.
        segment_ids: 1, 2, … within a row; 0 is padding.
    """
    shifted = shift_right(values.astype(jnp.float32))
    return jnp.where(is_chosen(segment_ids), shifted, 0.0)
