"""Experts: the feed-forward layers of a mixture, each applied to its own tokens.

The pairs (token, expert) are sorted by expert, so that one grouped product serves all
experts and no expert's work depends on the fullest one. Nothing is dropped.

    tokens     a      b      c          k = 2 experts each
    pairs      a0 a2  b1 b2  c0 c1
    sorted     a0 c0 | b1 c1 | a2 b2    groups of experts 0, 1 and 2
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.grouped_matmul import grouped_matmul
from realjax.core.arrays import Array, Float, Int
from realjax.models import quantized
from realjax.models.mlp import activated
from realjax.models.projection import PRODUCT
from realjax.models.quantized import Quantized


class Choice(NamedTuple):
    """The experts each token goes to; `num_experts` stands for none."""

    experts: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]


class ExpertKernels(NamedTuple):
    """The matrices of all experts of one layer."""

    gate: Float[Array, "E D F"] | Quantized
    up: Float[Array, "E D F"] | Quantized
    down: Float[Array, "E F D"] | Quantized


ApplyExperts = Callable[[Array, Choice, ExpertKernels, str], Array]

# multiply(rows, kernels, group_sizes, name of the kernels)
Multiply = Callable[[Array, Array | Quantized, Array, str], Array]


def plain_multiply(
    rows: Float[Array, "P D"],
    kernels: Float[Array, "E D F"] | Quantized,
    group_sizes: Int[Array, " E"],
    name: str,
) -> Float[Array, "P F"]:
    """Multiply each group of rows by its kernel, where all of it is at hand."""
    del name
    if isinstance(kernels, Quantized):
        return multiply_quantized(rows, kernels, group_sizes)
    return grouped_matmul(rows, kernels, group_sizes)


def multiply_quantized(
    rows: Float[Array, "P D"], kernels: Quantized, group_sizes: Int[Array, " E"]
) -> Float[Array, "P F"]:
    """Multiply each group of rows by its kernel, and the products by its scale."""
    values = quantized.numbers(kernels, rows.dtype)
    products = grouped_matmul(rows, values, group_sizes)
    groups = jnp.arange(len(group_sizes))
    # Rows past the last group are zeros, whatever their scale.
    group = jnp.repeat(groups, group_sizes, total_repeat_length=len(rows))
    return (products * kernels.scale[group]).astype(rows.dtype)


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
    top_k, width = choice.experts.shape[-1], x.shape[-1]
    experts = choice.experts.reshape(-1, top_k)
    outputs = pair_outputs(x.reshape(-1, width), experts, kernels, activation)
    total = weighted_sum(outputs, choice.weights.reshape(-1, top_k))
    return total.astype(x.dtype).reshape(x.shape)


def pair_outputs(
    tokens: Float[Array, "N D"],
    experts: Int[Array, "N k"],
    kernels: ExpertKernels,
    activation: str,
    multiply: Multiply = plain_multiply,
) -> Float[Array, "N k D"]:
    """Return what each expert of each token says of it; zeros for none.

    Args:
        tokens: in the dtype of the products.
        experts: of each token, counted as in `kernels`; their number is none.
        kernels: of the experts.
        activation: of `config.ACTIVATIONS`.
        multiply: the grouped product; a mesh may have kernels to gather.
    """
    order, rank = sorted_pairs(experts)
    num_experts = kernels.gate.shape[0]
    sizes = jnp.bincount(experts.reshape(-1), length=num_experts).astype(jnp.int32)

    def product(x: Array, name: str) -> Array:
        out = multiply(x, getattr(kernels, name), sizes, name)
        return checkpoint_name(out, PRODUCT)

    rows = spread(tokens, order, rank)
    hidden = activated(activation, product(rows, "gate"), product(rows, "up"))
    return collect(product(hidden, "down"), order, rank)


def sorted_pairs(
    experts: Int[Array, "N k"],
) -> tuple[Int[Array, " P"], Int[Array, "N k"]]:
    """Sort pairs by expert: which pair has each place, and which place each pair."""
    order = jnp.argsort(experts.reshape(-1), stable=True).astype(jnp.int32)
    places = jnp.arange(len(order), dtype=jnp.int32)
    rank = jnp.zeros_like(order).at[order].set(places, unique_indices=True)
    return order, rank.reshape(experts.shape)


@functools.partial(jax.checkpoint, prevent_cse=False)
def weighted_sum(
    outputs: Float[Array, "N k D"], weights: Float[Array, "N k"]
) -> Float[Array, "N D"]:
    """Sum over a token's experts, float32; keep no float32 outputs for later."""
    weights = weights.astype(jnp.float32)[..., None]
    return jnp.sum(outputs.astype(jnp.float32) * weights, axis=1)


# A gather's gradient adds up rows in any order, by atomic operations on a GPU. Here
# each row has at most one place, and the way back is a gather too.


@jax.custom_vjp
def spread(
    tokens: Float[Array, "N D"], pair_at: Int[Array, " S"], place_of: Int[Array, "N k"]
) -> Float[Array, "S D"]:
    """Put the token of each pair in the pair's place; zeros where there is none.

    Args:
        tokens: one row each.
        pair_at: the pair at each place; N k for none.
        place_of: the place of each pair, the inverse; S for none.
    """
    # A token past the last stands for none.
    return tokens.at[pair_at // place_of.shape[1]].get(mode="fill", fill_value=0)


def _spread_forward(tokens: Array, pair_at: Array, place_of: Array):
    return spread(tokens, pair_at, place_of), (pair_at, place_of)


def _spread_backward(saved, bar: Array):
    tokens_bar = collect(bar, *saved).astype(jnp.float32).sum(axis=1)
    return tokens_bar.astype(bar.dtype), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def collect(
    rows: Float[Array, "S D"], pair_at: Int[Array, " S"], place_of: Int[Array, "N k"]
) -> Float[Array, "N k D"]:
    """Bring the rows back to their pairs; zeros for a pair without a place."""
    return rows.at[place_of].get(mode="fill", fill_value=0)


def _collect_forward(rows: Array, pair_at: Array, place_of: Array):
    return collect(rows, pair_at, place_of), (pair_at, place_of)


def _collect_backward(saved, bar: Array):
    pair_at, place_of = saved
    of_pairs = bar.reshape(place_of.size, -1)
    return of_pairs.at[pair_at].get(mode="fill", fill_value=0), None, None


collect.defvjp(_collect_forward, _collect_backward)
