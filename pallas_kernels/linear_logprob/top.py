"""The most likely tokens of a linear layer, without its logits in memory.

Blocks of columns are looked at one after the other; the highest logits so far are kept
beside those sums that make log-probabilities of them. Devices that hold other columns
put their own together at the end: k a token and device move, and no logits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _dispatch
from pallas_kernels.linear_logprob import api, blocks, chunked
from pallas_kernels.linear_logprob.blocks import Block, Parts, Static
from pallas_kernels.linear_logprob.request import Request


def linear_top(
    hidden: Float[Array, "T D"],
    kernel: Float[Array, "D V"],
    *,
    num_top: int,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    block_size: int | None = None,
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """Find the most likely tokens of each row, the likeliest first.

    Of equal ones, those with the lowest ids. There is no gradient. For arrays on
    several devices there is `sharded_linear_top`.

    Args:
        hidden: one vector per token.
        kernel: of the linear layer.
        num_top: K, how many.
        temperature: as for `linear_logprob`, like all that follow.
        soft_cap: likewise.
        vocab_size: likewise.
        chunk_size: likewise.
        block_size: likewise.

    Returns:
        Their log-probabilities, float32, in nats, among all tokens, and their ids.

    Raises:
        ValueError: a number that means nothing, or there are not so many tokens.
    """
    static = checked_static(
        kernel.shape[1],
        num_top,
        temperature=temperature,
        soft_cap=soft_cap,
        vocab_size=vocab_size,
    )
    request = Request(
        num_tokens=hidden.shape[0],
        width=hidden.shape[1],
        num_columns=kernel.shape[1],
        dtype=hidden.dtype,
        kernel_dtype=kernel.dtype,
        device=_dispatch.device(),
        chunk_size=chunk_size,
        block_size=block_size,
    )
    cut = api.chunked_cut(request)
    static = api.apply_cut(static, cut, hidden.shape[0], kernel.shape[1])
    if static.block_size is None:
        kernel = kernel.astype(hidden.dtype)
    return highest(static, hidden, kernel, num_top)


def checked_static(
    num_columns: int,
    num_top: int,
    *,
    temperature: float,
    soft_cap: float | None,
    vocab_size: int | None,
) -> Static:
    """Check what both forms take.

    Raises:
        ValueError: a number that means nothing, or there are not so many tokens.
    """
    static = api.make_static(
        num_columns, temperature=temperature, soft_cap=soft_cap, vocab_size=vocab_size
    )
    if not 0 < num_top <= static.vocab_size:
        raise ValueError(
            f"num_top is {num_top}, of a vocabulary of {static.vocab_size}. Ask for at"
            " least 1 token and at most all of them."
        )
    return static


def highest(static: Static, hidden, kernel, num_top: int):
    """Return log-probabilities and ids of the highest logits of every row.

    Args:
        static: how much is looked at together, and which axes split the columns.
        hidden: of the tokens on this device.
        kernel: the columns on this device.
        num_top: how many.
    """

    def look(block: Block, hidden) -> tuple[Parts, tuple[Array, Array]]:
        columns = blocks.columns_of(kernel, block)
        logits = blocks.logits_of(static, block, hidden, columns, None)
        targets = jnp.zeros(len(hidden), jnp.int32)  # What is read of it goes unused.
        parts = blocks.parts_of(static, block, logits, targets)
        values, places = jax.lax.top_k(logits, min(num_top, block.width))
        return parts, (values, places + blocks.first_id(static, block))

    def of_chunk(hidden):
        if static.block_size is None:
            parts, found = look(blocks.whole(kernel), hidden)
        else:
            none = jnp.zeros(len(hidden), jnp.float32)
            nothing = Parts(none + blocks.NOT_KEPT, none, none, none)
            shape = (len(hidden), num_top)
            empty = jnp.full(shape, blocks.NOT_KEPT), jnp.zeros(shape, jnp.int32)

            def add(so_far, index):
                parts, found = so_far
                more, others = look(blocks.block_at(static, kernel, index), hidden)
                found = _highest_of(num_top, *map(_side_by_side, found, others))
                return (blocks.merge(static, parts, more), found), None

            steps = blocks.indices(static, kernel)
            (parts, found), _ = jax.lax.scan(add, (nothing, empty), steps)
        if static.vocab_axes:
            gather = lambda x: jax.lax.all_gather(
                x, static.vocab_axes, axis=1, tiled=True
            )
            found = _highest_of(num_top, *map(gather, found))
        values, ids = found
        scores = blocks.combine(static, parts)
        below = values - scores.log_normalizer[:, None]
        return below * (1.0 / static.temperature), ids

    return chunked.map_chunks(static, of_chunk, hidden)


def _side_by_side(a, b):
    return jnp.concatenate([a, b], axis=1)


def _highest_of(num_top: int, values, ids):
    """Return the highest values; of equal ones the first, as ids grow to the right."""
    values, places = jax.lax.top_k(values, num_top)
    return values, jnp.take_along_axis(ids, places, axis=1)
