"""Completions as arrays of rows: their state during a rollout, and the result."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float, Int, PyTree, UInt
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
