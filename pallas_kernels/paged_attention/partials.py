"""What some of the keys say to each query, and how it is put together.

    maximum, total, weighted  =  max_j score_j,  sum_j w_j,  sum_j w_j value_j
                                 with w_j = exp(score_j - maximum)

A sequence may be cut anywhere, over parts of a kernel or over devices: what is said of
the whole follows from what is said of the parts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The maximum where no key is seen: finite, so that nothing is ever NaN.
OUT_OF_SIGHT = -1e30


class Partials(NamedTuple):
    """Of each token and query head; all float32.

    Where no key is seen, the maximum is `OUT_OF_SIGHT` and the others are finite: they
    count for nothing beside a part that sees some.
    """

    maximum: Float[Array, "*parts B T H"]
    total: Float[Array, "*parts B T H"]
    weighted: Float[Array, "*parts B T H K"]


def combine(
    partials: Partials, *, axis_name: str | tuple[str, ...] | None = None
) -> Float[Array, "B T H K"]:
    """Return the outputs of attention, from what parts of the keys say.

        weights_i = exp(maximum_i - max_i maximum_i)
        out = (sum_i weights_i weighted_i) / (sum_i weights_i total_i)

    Args:
        partials: of one part, or of several that are stacked as a first dimension.
        axis_name: of the mesh, inside `jax.shard_map`, whose devices have a part of the
            sequence each; all get the whole output. None: all parts are here.
    """
    if partials.maximum.ndim == 4:
        partials = merged(partials)
    if axis_name is not None:
        maximum = jax.lax.pmax(partials.maximum, axis_name)
        partials = _sum(partials, maximum, lambda x: jax.lax.psum(x, axis_name))
    total = jnp.maximum(partials.total, jnp.finfo(jnp.float32).tiny)
    return partials.weighted / total[..., None]


def merged(partials: Partials) -> Partials:
    """Make one part of several that are stacked as a first dimension."""
    maximum = partials.maximum.max(axis=0, keepdims=True)
    added = _sum(partials, maximum, lambda x: x.sum(axis=0))
    return added._replace(maximum=maximum[0])


def _sum(partials: Partials, maximum: Array, add: Callable[[Array], Array]) -> Partials:
    """Add parts up, each brought to the maximum of all."""
    weights = jnp.exp(partials.maximum - maximum)
    return Partials(
        maximum=maximum,
        total=add(partials.total * weights),
        weighted=add(partials.weighted * weights[..., None]),
    )
