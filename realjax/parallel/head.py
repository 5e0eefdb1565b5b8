"""The language head of a sharded model: log-probabilities without the logits.

The head's matrix is stored as parameters are, its width over fsdp. To score tokens it
is turned once, so that fsdp cuts the vocabulary too:

    stored  [D / fsdp, V / (stage × tensor)]  ── all-to-all ──▶
    used    [D,        V / (stage × tensor × fsdp)]

Then no device ever holds more of it, nor of its float32 gradient, which is turned back
once. What moves in the loop are the hidden states of a chunk of tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from pallas_kernels.linear_logprob import sharded_linear_logprob, sharded_linear_top
from realjax.core.arrays import Array, Float, Int
from realjax.parallel.sharding import AXES, num_parts


def linear_logprob_for(
    mesh: Mesh, *, options: frozenset[str] = frozenset()
) -> Callable[..., tuple[Array, Array]] | None:
    """Return what scores tokens on a mesh, for `token_logprobs(linear_logprob=…)`.

    Axes that do not divide the rows, the tokens of a row or the vocabulary (padding
    included) are left out, the last first.

    Args:
        mesh: of the call.
        options: of its allocation. With `sequence` the hidden states are taken as they
            lie, cut over tensor along the tokens.

    Returns:
        The function; None for one device, which needs no other than the default.
    """
    return _scoring(_linear_logprob, mesh, options)


def linear_top_for(
    mesh: Mesh, *, options: frozenset[str] = frozenset()
) -> Callable[..., tuple[Array, Array]] | None:
    """Return what finds the likeliest tokens, for `top_logprobs(linear_top=…)`.

    Args:
        mesh: as for `linear_logprob_for`.
        options: likewise.
    """
    return _scoring(_linear_top, mesh, options)


def _scoring(
    function: Callable[..., tuple[Array, Array]], mesh: Mesh, options: frozenset[str]
) -> Callable[..., tuple[Array, Array]] | None:
    if mesh.size == 1:
        return None
    return functools.partial(
        function, mesh, ("tensor",) if "sequence" in options else ()
    )


def _linear_logprob(
    mesh: Mesh,
    place_axes: Sequence[str],
    hidden: Float[Array, "R S D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "R S"] | Int[Array, "R S K"],
    **options: Any,
) -> tuple[Float[Array, "R S"] | Float[Array, "R S K"], Float[Array, "R S"]]:
    axes = _axes(mesh, place_axes, hidden.shape, kernel.shape[1])
    return sharded_linear_logprob(hidden, kernel, targets, mesh=mesh, **axes, **options)


def _linear_top(
    mesh: Mesh,
    place_axes: Sequence[str],
    hidden: Float[Array, "R S D"],
    kernel: Float[Array, "D V"],
    **options: Any,
) -> tuple[Float[Array, "R S K"], Int[Array, "R S K"]]:
    axes = _axes(mesh, place_axes, hidden.shape, kernel.shape[1])
    return sharded_linear_top(hidden, kernel, mesh=mesh, **axes, **options)


def _axes(
    mesh: Mesh,
    place_axes: Sequence[str],
    hidden_shape: tuple[int, ...],
    num_columns: int,
) -> dict[str, tuple[str, ...]]:
    """Return the axes that cut rows, places and columns."""
    num_rows, num_places, _ = hidden_shape
    columns = (*AXES["vocab"], *AXES["embed"])
    return {
        "row_axes": _dividing(AXES["batch"], num_rows, mesh),
        "place_axes": _dividing(place_axes, num_places, mesh),
        "vocab_axes": _dividing(columns, num_columns, mesh),
    }


def _dividing(axes: Sequence[str], size: int, mesh: Mesh) -> tuple[str, ...]:
    """Return the axes that are more than one part, and together divide a size."""
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    while size % num_parts(axes, mesh):
        axes = axes[:-1]
    return axes
