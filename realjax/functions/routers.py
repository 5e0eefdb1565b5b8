"""Losses and statistics of routers in training.

The loss that is trained on is, with means over all tokens and layers of a minibatch,

    loss + aux_loss_coef × mean of the load-balancing losses + z_loss_coef × mean of z

The gradient of a minibatch is a sum over its microbatches divided by the weight of the
algorithm's loss at the end. What routers add to the sum is therefore multiplied by that
weight, and it is the same however the minibatch was cut.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from realjax.core.arrays import Array
from realjax.models.config import ModelConfig
from realjax.models.moe import RouterSums
from realjax.rl.masking import Mean

_COUNTS = "router/counts"


class RouterInputs(NamedTuple):
    """What the microbatches of one minibatch share."""

    scale: Any  # Weight of the algorithm's loss, by token of the minibatch.
    noise_key: Any  # Also of dropout; None for a model with neither.


def added_loss(config: ModelConfig, sums: RouterSums, scale: Array) -> Array:
    """Return what routers add to the sum of a microbatch's loss."""
    moe = config.moe
    assert moe is not None
    total = moe.aux_loss_coef * sums.aux.sum() + moe.z_loss_coef * sums.z.sum()
    return total * scale / config.num_layers


def measures(config: ModelConfig, sums: RouterSums) -> dict[str, Mean]:
    """Return sums over a microbatch, to be added up over a minibatch."""
    assert config.moe is not None
    tokens = sums.tokens.sum()
    return {
        "router/aux_loss": Mean(sums.aux.sum(), tokens),
        "router/z_loss": Mean(sums.z.sum(), tokens),
        "router/dropped": Mean(sums.dropped.sum(), tokens * config.moe.top_k),
        _COUNTS: Mean(sums.counts, jnp.float32(1.0)),
    }


def finished(means: dict[str, Mean]) -> dict[str, Mean]:
    """Replace the counts of a minibatch by what they say.

    "router/max_load" is the share of the fullest expert, in even shares, and
    "router/idle" the fraction of experts without a token, both means over layers.
    """
    if _COUNTS not in means:
        return means
    means = dict(means)
    counts = means.pop(_COUNTS).total
    even = jnp.maximum(counts.sum(axis=-1) / counts.shape[-1], 1.0)
    one = jnp.float32(1.0)
    means["router/max_load"] = Mean(jnp.mean(counts.max(axis=-1) / even), one)
    means["router/idle"] = Mean(jnp.mean((counts == 0).astype(jnp.float32)), one)
    return means
