"""The grouped product experts call, and the choice of an implementation.

tokamax    on Hopper, if it is installed
blocked    in XLA, some rows at a time
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import _dispatch
from pallas_kernels.grouped_matmul import blocked, tokamax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the choice of an implementation looks at."""

    num_rows: int
    kernels_shape: tuple[int, ...]
    dtype: jnp.dtype
    device: _dispatch.Device


def grouped_matmul(
    x: Float[Array, "T D"],
    kernels: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "T F"]:
    """Multiply every row by the matrix of its group.

        out_t = x_t · kernels_e   for the group e of row t

    The first `group_sizes[0]` rows are group 0, the next ones group 1, and so on. No
    row is dropped, groups may be empty, and rows past the last group give zeros, as do
    their gradients. The products are in x's dtype, with float32 sums; the gradient of
    float32 kernels stays float32, as that of `Projection`.

    The work is that of the rows in groups and of at most a block more per group. Where
    a mesh splits the rows or D, call it inside `jax.shard_map` (with check_vma=False,
    as its loops start from zeros) and sum outside: left to XLA, every block has its own
    collectives.

    Args:
        x: rows, sorted by group.
        kernels: one matrix per group.
        group_sizes: rows of each group; at most T in all.
        implementation: "tokamax" or "blocked"; None chooses, see `explain`.

    Raises:
        ValueError: no implementation has that name, or the one asked for cannot
            multiply so.
    """
    request = Request(
        num_rows=x.shape[0],
        kernels_shape=kernels.shape,
        dtype=x.dtype,
        device=_dispatch.device(),
    )
    choice = _choose(request, implementation)
    return choice.function(x, kernels, group_sizes)


def explain(
    num_rows: int,
    kernels_shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    device: _dispatch.Device | None = None,
    implementation: str | None = None,
) -> str:
    """Say which implementation multiplies so, and why none of those before it.

    Args:
        num_rows: T.
        kernels_shape: [E, D, F].
        dtype: of the rows.
        device: the one to multiply on; None is the one of this process.
        implementation: as in `grouped_matmul`.
    """
    request = Request(
        num_rows=num_rows,
        kernels_shape=kernels_shape,
        dtype=jnp.dtype(dtype),
        device=device or _dispatch.device(),
    )
    return _choose(request, implementation).explanation


def _choose(request: Request, implementation: str | None) -> _dispatch.Choice:
    return _dispatch.choose(
        "grouped_matmul", _IMPLEMENTATIONS, request, name=implementation
    )


def _tokamax_unsupported(request: Request) -> str | None:
    return tokamax.unsupported(dtype=request.dtype, device=request.device)


_IMPLEMENTATIONS = (
    _dispatch.Implementation(
        name="tokamax", function=tokamax.multiply, unsupported=_tokamax_unsupported
    ),
    _dispatch.Implementation(name="blocked", function=blocked.blocked),
)
