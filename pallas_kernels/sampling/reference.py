"""The definition: tokens in order, running sums, and a cut.

Nothing here is fast: it sorts the vocabulary.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.sampling import bisection
from pallas_kernels.sampling.filters import Draw, Filters, Request
from pallas_kernels.sampling.sets import pack


def sample(
    request: Request,
    logits: Float[Array, "B V"],
    uniforms: Float[Array, "B 2"],
    forbidden: Bool[Array, "B V"] | None,
) -> Draw:
    """Draw as `api.sample` says, from logits that are divided by the temperature."""
    filters = request.filters
    order = jnp.argsort(-logits, axis=-1, stable=True)
    if request.is_small_set:
        ids = order[:, : filters.top_k]
        highest = jnp.take_along_axis(logits, ids, axis=-1)
        total = bisection.total_for_union(logits, highest, filters)
        return bisection.draw_of_highest(highest, ids, total, uniforms, filters)
    below, weights = bisection.exponentials(logits)
    mask = is_kept(weights, order, filters)
    drawn = bisection.draw(below, jnp.where(mask, weights, 0.0), uniforms)
    if request.kept is None:
        return Draw(*drawn, None)
    if filters.is_empty:
        return Draw(*drawn, bisection.unfiltered_bits(logits, forbidden))
    return Draw(*drawn, pack(mask))


def is_kept(
    weights: Float[Array, "B V"], order: Array, filters: Filters
) -> Bool[Array, "B V"]:
    """Return which tokens the filters leave.

    Args:
        weights: exponentials of the logits below the highest.
        order: ids by weight, the largest first, and of equals the lower id.
        filters: temperature aside.
    """
    ranks = jnp.arange(weights.shape[-1], dtype=jnp.int32)[None, :]
    sorted_weights = jnp.take_along_axis(weights, order, axis=-1)
    kept = sorted_weights > 0
    if filters.top_k:
        kept &= ranks < filters.top_k
    if filters.top_p < 1:
        mass = sorted_weights if filters.union else jnp.where(kept, sorted_weights, 0.0)
        sums = jnp.cumsum(mass, axis=-1)
        kept &= sums - mass < filters.top_p * sums[:, -1:]
    kept &= sorted_weights >= filters.min_p
    places = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(kept, places, axis=-1)
