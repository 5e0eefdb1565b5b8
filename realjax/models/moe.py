"""The mixture-of-experts layer: the router, and what is measured of its choices.

    probabilities = softmax(x · router)          over all experts, float32
    weights       = the top k, divided by their sum where the family does
    output        = sum over the k of weight × expert(x)

Padding goes to no expert. Sources: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538;
Fedus et al. 2021, https://arxiv.org/abs/2101.03961; Jiang et al. 2024 (Mixtral),
https://arxiv.org/abs/2401.04088.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Bool, Float, Int, UInt
from realjax.models.axes import RESIDUAL, ROUTER
from realjax.models.config import ModelConfig, MoEConfig
from realjax.models.experts import Choice, ExpertKernels
from realjax.models.partition import WHOLE, Partition


class Routing(NamedTuple):
    """What a router said of every token."""

    probabilities: Float[Array, "B T E"]
    log_normalizer: Float[Array, "B T"]
    chosen: Int[Array, "B T k"]  # Before a full expert dropped any.
    choice: Choice


class RouterSums(NamedTuple):
    """Sums over tokens, of which the losses and statistics of routers are made."""

    aux: Float[Array, "*L"]
    z: Float[Array, "*L"]
    tokens: Float[Array, "*L"]
    dropped: Float[Array, "*L"]  # Pairs of token and expert.
    counts: Float[Array, "*L E"]  # Pairs that chose an expert.


class MoE(nn.Module):
    """Router and experts in the place of a feed-forward layer."""

    config: ModelConfig
    kernel_init: nn.initializers.Initializer
    output_init: nn.initializers.Initializer
    dtype: DTypeLike = jnp.float32
    partition: Partition = WHOLE

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        noise_keys: UInt[Array, "B T W"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Apply each token's experts.

        Args:
            x: tokens.
            segment_ids: sequences of a row; 0 is padding.
            noise_keys: the data of a random key for each token of this layer; None
                means no jitter.
        """
        config, moe = self.config, self.config.moe
        assert moe is not None
        width, size = x.shape[-1], config.mlp_width
        experts = (moe.num_experts,)

        def kernel(name: str, init: nn.initializers.Initializer, *shape: int) -> Any:
            return self.param(name, init, shape, jnp.float32)

        router = kernel("router", self.kernel_init, width, moe.num_experts)
        kernels = ExpertKernels(
            gate=kernel("gate", self.kernel_init, *experts, width, size),
            up=kernel("up", self.kernel_init, *experts, width, size),
            down=kernel("down", self.output_init, *experts, size, width),
        )
        x = x.astype(self.dtype)
        with jax.named_scope("router"):
            routing = route(_jittered(x, noise_keys, moe), router, moe, segment_ids)
            routing = routing._replace(
                probabilities=self.partition.constrain(routing.probabilities, ROUTER)
            )
        with jax.named_scope("experts"):
            out = self.partition.experts(x, routing.choice, kernels, config.activation)
        return self.partition.constrain(out, RESIDUAL), routing


def route(
    x: Float[Array, "B T D"],
    router: Float[Array, "D E"],
    moe: MoEConfig,
    segment_ids: Int[Array, "B T"],
) -> Routing:
    """Choose the experts of every token.

    The product is in x's dtype, as in the families' own code; all that follows is
    float32. Normalised weights are also a softmax over the k best logits, which is how
    ReaL has them always.
    """
    logits = jnp.matmul(
        x, router.astype(x.dtype), preferred_element_type=jnp.float32
    ).astype(jnp.float32)
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, moe.top_k)
    is_kept = jnp.broadcast_to(segment_ids[..., None] != 0, chosen.shape)
    if moe.capacity_factor:
        # By probability: normalised, the weight of an only choice is always 1.
        is_kept &= _within_capacity(weights, chosen, segment_ids, moe)
    if moe.is_normalized:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    choice = Choice(
        experts=jnp.where(is_kept, chosen, moe.num_experts),
        weights=jnp.where(is_kept, weights, 0.0),
    )
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    return Routing(probabilities, log_normalizer, chosen, choice)


def router_sums(
    routing: Routing, segment_ids: Int[Array, "B T"], moe: MoEConfig
) -> RouterSums:
    """Add up the losses and statistics of one layer.

    The load-balancing loss of a sequence of n tokens is

        E sum_e (pairs of its tokens that chose e / n) (mean probability of e)

    and counts n times, so that it is a sum over sequences, whatever rows, microbatches
    or devices they are on. The coefficients of the families' configs belong to this
    scale (k at a perfect balance), though their code takes one mean over the tokens of
    a batch and all its layers. Megatron and ReaL divide by k² (1 / k at a balance), and
    their loss changes with the microbatches that it is taken over.

    Sources: Fedus et al. 2021, eq. 4 to 6, for k = 1; DeepSeek-AI 2024,
    https://arxiv.org/abs/2412.19437, eq. 17 to 20, for sequences.

    Args:
        routing: of the layer.
        segment_ids: sequences of a row; 0 is padding.
        moe: of the model.
    """
    is_token = segment_ids != 0
    first = _first_places(segment_ids)
    ones = is_token[..., None].astype(jnp.float32)

    def by_sequence(per_token: Array) -> Array:
        """Sum [B, T, X] over each sequence, at the place of its first token."""
        add = lambda x, at: jnp.zeros_like(x).at[at].add(x)
        return jax.vmap(add)(per_token, first)

    hits = jax.nn.one_hot(routing.chosen, moe.num_experts, dtype=jnp.float32)
    counts = by_sequence(hits.sum(axis=2) * ones)
    probabilities = by_sequence(routing.probabilities * ones)
    sizes = by_sequence(ones)
    balance = jnp.sum(counts * probabilities, axis=-1, keepdims=True)
    dropped = (routing.choice.experts == moe.num_experts) & is_token[..., None]
    return RouterSums(
        aux=jnp.sum(moe.num_experts * balance / jnp.maximum(sizes, 1.0)),
        z=jnp.sum(jnp.square(routing.log_normalizer) * ones[..., 0]),
        tokens=jnp.sum(ones),
        dropped=jnp.sum(dropped.astype(jnp.float32)),
        counts=jnp.sum(counts, axis=(0, 1)),
    )


def _first_places(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return the place of the first token of each token's segment."""
    places = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jax.lax.cummax(jnp.where(segment_ids != previous, places, 0), axis=1)


def _within_capacity(
    probabilities: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
    segment_ids: Int[Array, "B T"],
    moe: MoEConfig,
) -> Bool[Array, "B T k"]:
    """Return which pairs their experts have room for, sequence by sequence.

    A sequence of n tokens gives each expert room for ceil(capacity_factor k n / E)
    pairs. It fills that alone, so that no other sequence, row or device matters.
    """
    num_rows, num_places, top_k = chosen.shape
    take = lambda x, at: jnp.take_along_axis(x, at, axis=1)
    first = _first_places(segment_ids)
    # Pairs of one sequence and expert, in the order of preference.
    group = (first[..., None] * moe.num_experts + chosen).reshape(num_rows, -1)
    places = jnp.broadcast_to(jnp.arange(num_places * top_k), group.shape)
    order = places
    if moe.drop_policy == "probs":
        order = jnp.argsort(-probabilities.reshape(num_rows, -1), axis=1, stable=True)
    order = take(order, jnp.argsort(take(group, order), axis=1, stable=True))
    sorted_group = take(group, order)
    previous = jnp.pad(sorted_group[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(sorted_group != previous, places, 0), axis=1)
    before = take(places - start, jnp.argsort(order, axis=1)).reshape(chosen.shape)
    add = lambda at: jnp.zeros(num_places, jnp.int32).at[at].add(1)
    num_tokens = take(jax.vmap(add)(first), first)
    return before < jnp.asarray(_rooms(num_places, moe))[num_tokens][..., None]


def _rooms(num_places: int, moe: MoEConfig) -> np.ndarray:
    """Return the room of an expert for 0, 1, …, num_places tokens."""
    num_tokens = np.arange(num_places + 1, dtype=np.float64)
    share = num_tokens * moe.top_k / moe.num_experts * moe.capacity_factor
    # 25 tokens of 2 experts and a factor of 1.2: 15, though 1.2 is not just that.
    return np.ceil(np.round(share, 6)).astype(np.int32)


def _jittered(
    x: Float[Array, "B T D"], noise_keys: UInt[Array, "B T W"] | None, moe: MoEConfig
) -> Float[Array, "B T D"]:
    """Multiply the router's input by noise, each token by its own."""
    if noise_keys is None or not moe.jitter:
        return x

    def draw(key: Array) -> Array:
        low, high = 1 - moe.jitter, 1 + moe.jitter
        key = jax.random.wrap_key_data(key)
        return jax.random.uniform(key, x.shape[-1:], jnp.float32, low, high)

    return x * jax.vmap(jax.vmap(draw))(noise_keys).astype(x.dtype)
