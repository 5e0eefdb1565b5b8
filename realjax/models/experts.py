"""Experts: the feed-forward layers of a mixture, each applied to its own tokens.

The pairs (token, expert) are sorted by expert, so that one grouped product serves all
experts and no expert's work depends on the fullest one. Nothing is dropped.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from realjax.core.arrays import Array, Float, Int
from realjax.models.mlp import activated
from realjax.models.projection import PRODUCT


class Choice(NamedTuple):
    """The experts each token goes to; `num_experts` stands for none."""

    experts: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]


class ExpertKernels(NamedTuple):
    """The matrices of all experts of one layer."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


ApplyExperts = Callable[[Array, Choice, ExpertKernels, str], Array]


def apply_experts(
    x: Float[Array, "B T D"], choice: Choice, kernels: ExpertKernels, activation: str
) -> Float[Array, "B T D"]:
    """Sum the outputs of each token's experts by its weights.

    Args:
        x: tokens, in the dtype of the products.
        choice: experts of each token; a pair without one adds nothing.
        kernels: of the experts.
        activation: of `config.ACTIVATIONS`.
    """
    num_experts, top_k = kernels.gate.shape[0], choice.experts.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    experts = choice.experts.reshape(-1)
    order = jnp.argsort(experts, stable=True)
    group_sizes = jnp.bincount(experts, length=num_experts).astype(jnp.int32)
    out = apply_sorted(tokens[order // top_k], kernels, group_sizes, activation)
    # Back to the order of the pairs by a gather: a scatter would add in any order.
    out = out[jnp.argsort(order)].reshape(*choice.weights.shape, -1)
    weights = choice.weights.astype(jnp.float32)[..., None]
    return jnp.sum(out.astype(jnp.float32) * weights, axis=-2).astype(x.dtype)


def apply_sorted(
    x: Float[Array, "P D"],
    kernels: ExpertKernels,
    group_sizes: Int[Array, " E"],
    activation: str,
) -> Float[Array, "P D"]:
    """Apply to each group of rows its expert; rows past the last group give zeros."""

    from pallas_kernels.grouped_matmul import grouped_matmul

    def product(x: Array, kernel: Array) -> Array:
        return checkpoint_name(grouped_matmul(x, kernel, group_sizes), PRODUCT)

    hidden = activated(activation, product(x, kernels.gate), product(x, kernels.up))
    return product(hidden, kernels.down)
