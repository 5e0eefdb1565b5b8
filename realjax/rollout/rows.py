"""Completions as arrays of rows: their state during a rollout, and the result."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float, Int, Key, PyTree, Shaped, UInt
from realjax.models.axes import Axes

ROW: Axes = ("batch",)
OF_ROW: Axes = ("batch", None)


class Rollout(NamedTuple):
    """Completions, one row each; tokens [prompt, completion, padding]."""

    tokens: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    is_truncated: Bool[Array, " B"]
    lengths: Int[Array, " B"]
    kept: Array | None
    entropy: Float[Array, "B T"]


class Rows(NamedTuple):
    """The state of every completion, [R]; lengths are of prompt and completion."""

    tokens: Int[Array, "R T"]
    logprobs: Float[Array, "R T"]
    entropy: Float[Array, "R T"]
    kept: Array | None
    lengths: Int[Array, " R"]
    prompt_lengths: Int[Array, " R"]
    minimums: Int[Array, " R"]
    limits: Int[Array, " R"]
    has_ended: Bool[Array, " R"]
    keys: UInt[Array, "R W"]


def axes_of(tree: PyTree) -> PyTree:
    """Arrays of rows are cut over rows."""
    return jax.tree.map(lambda x: ("batch", *(None for _ in x.shape[1:])), tree)


def kept_dtype(form: tuple[str, int]) -> Any:
    """Of the sets that a sampler records: ids, or words of bits."""
    return jnp.int32 if form[0] == "ids" else jnp.uint32


def empty(num_rows: int, width: int, *, kept_form: tuple[str, int] | None) -> Rows:
    """Return rows without a prompt, which have ended.

    Args:
        num_rows: R.
        width: T.
        kept_form: form of the sets that are recorded, see `sampling.kept_width`.
    """
    lengths = jnp.zeros(num_rows, jnp.int32)
    zeros = jnp.zeros((num_rows, width), jnp.float32)
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), num_rows))
    return Rows(
        tokens=zeros.astype(jnp.int32),
        logprobs=zeros,
        entropy=zeros,
        kept=empty_kept(kept_form, num_rows, width),
        lengths=lengths,
        prompt_lengths=lengths,
        minimums=lengths,
        limits=lengths,
        has_ended=lengths == 0,
        keys=keys,
    )


def start(
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    ids: UInt[Array, " B"],
    key: Key[Array, ""],
    row_prompt: Int[Array, " R"],
    row_sample: Int[Array, " R"],
    row_limits: Int[Array, "R 2"],
    *,
    num_rows: int,
    width: int,
    kept_form: tuple[str, int] | None,
) -> tuple[Rows, Int[Array, ""]]:
    """Lay out the rows of a rollout.

    Args:
        prompts: left-aligned.
        lengths: of the prompts; 0 for a row of padding.
        ids: of the data, which draws depend on.
        key: of the call.
        row_prompt: prompt of each row; past the last for a row that only fills up.
        row_sample: number of the row among those of its prompt.
        row_limits: least and most new tokens.
        num_rows: R.
        width: T.
        kept_form: form of the sets that are recorded, see `sampling.kept_width`.

    Returns:
        The rows, and the number of tokens that all prompts begin with, the last of each
        left out.
    """
    shared = _num_shared(prompts, lengths)
    of_prompt = functools.partial(take, index=row_prompt)
    lengths = of_prompt(lengths)
    keys = jax.vmap(
        lambda data_id, sample: jax.random.key_data(
            jax.random.fold_in(jax.random.fold_in(key, data_id), sample)
        )
    )(of_prompt(ids), row_sample)
    missing = max(width - prompts.shape[1], 0)
    tokens = jnp.pad(of_prompt(prompts), ((0, 0), (0, missing)))[:, :width]
    places = jnp.arange(width)[None]
    zeros = jnp.zeros((num_rows, width), jnp.float32)
    rows = Rows(
        tokens=jnp.where(places < lengths[:, None], tokens, 0),
        logprobs=zeros,
        entropy=zeros,
        kept=empty_kept(kept_form, num_rows, width),
        lengths=lengths,
        prompt_lengths=lengths,
        minimums=lengths + row_limits[:, 0],
        limits=jnp.where(lengths > 0, lengths + row_limits[:, 1], 0),
        has_ended=lengths == 0,
        keys=keys,
    )
    return rows, shared


def finish(
    rows: Rows,
    cuts: Int[Array, " R"],
    is_stopped: Bool[Array, " R"],
    *,
    is_end: Callable[[Array], Array],
) -> Rollout:
    """Return rows as a result, cut where a stop string ended them.

    What was sampled behind a cut, before the host knew, is dropped.

    Args:
        rows: as they are.
        cuts: tokens that a row keeps at most.
        is_stopped: whether a row ended by a stop string.
        is_end: tells ids that end a completion.
    """
    lengths = jnp.minimum(rows.lengths, cuts)
    places = jnp.arange(rows.tokens.shape[1])[None]
    is_there = places < lengths[:, None]
    mask = is_there & (places >= rows.prompt_lengths[:, None])
    last = jnp.take_along_axis(
        rows.tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1
    )[:, 0]
    kept = rows.kept
    if kept is not None:
        kept = jnp.where(mask[:, :, None], kept, _empty(kept.dtype))
    is_complete = is_end(last) | is_stopped
    return Rollout(
        tokens=jnp.where(is_there, rows.tokens, 0),
        completion_mask=mask,
        old_logprobs=jnp.where(mask, rows.logprobs, 0.0),
        is_truncated=~is_complete & (lengths > 0),
        lengths=lengths,
        kept=kept,
        entropy=jnp.where(mask, rows.entropy, 0.0),
    )


def select(rows: Rows, index: Int[Array, " K"]) -> Rows:
    """Return rows in another order; -1 is an empty one."""
    return jax.tree.map(functools.partial(take, index=index), rows)


def join(rows: Rows, others: Rows, *, num_rows: int) -> Rows:
    """Return rows, others after them, and empty ones up to a number."""

    def joined(x: Array, y: Array) -> Array:
        missing = num_rows - len(x) - len(y)
        return jnp.concatenate([x, y, jnp.zeros((missing, *x.shape[1:]), x.dtype)])

    return jax.tree.map(joined, rows, others)


def take(x: Shaped[Array, "R *dims"], index: Int[Array, " K"]) -> Array:
    """Return rows of an array; zeros where the index is -1 or past the last."""
    index = jnp.where(index < 0, len(x), index)
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def empty_kept(form: tuple[str, int] | None, num_rows: int, width: int) -> Array | None:
    """Return sets that keep everything, or None where no sets are recorded."""
    if form is None:
        return None
    dtype = kept_dtype(form)
    return jnp.full((num_rows, width, form[1]), _empty(dtype), dtype)


def _empty(dtype: Any) -> Array:
    return jnp.asarray(-1 if jnp.dtype(dtype) == jnp.int32 else 0, dtype)


def _num_shared(
    prompts: Int[Array, "B P"], lengths: Int[Array, " B"]
) -> Int[Array, ""]:
    is_real = lengths > 0
    first = jnp.take(prompts, jnp.argmax(is_real), axis=0)
    places = jnp.arange(prompts.shape[1])[None]
    is_equal = (prompts == first[None]) & (places < (lengths - 1)[:, None])
    return jnp.sum(jnp.cumprod(jnp.all(is_equal | ~is_real[:, None], axis=0)))
