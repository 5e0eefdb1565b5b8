"""How many values one layer holds for each token, on each device.

    dense     x  norm(x)  q k v out   norm(x)  gate up          in one forward pass
    experts   x  norm(x)  q k v out   norm(x)  k × (sent received gate up)

What is counted are the largest arrays that exist at the same time: XLA fuses norms,
rotations and activation functions, and kernels of attention keep no scores. Other
numbers, such as those of routers, are left out.
"""

import dataclasses
import functools
import math

import jax

from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.experts import ROOM
from realjax.planner.stored import MOST_LAYOUTS, abstract


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerValues:
    """Sizes of one layer's arrays on a device, in values of a token.

    Attributes:
        stream: the residual stream, cut over tensor with `sequence`.
        width: D, where it is whole.
        heads: queries, and what attention gives.
        kv_heads: keys, and as many values.
        mlp: F of a feed-forward layer, or of an expert.
        num_matrices: of a feed-forward layer before its activation: gate and up.
        pairs: (token, expert) that an exchange has room for; 0 without experts.
        is_summed: whether devices sum what products with their parts of weights give.
    """

    stream: float
    width: float
    heads: float
    kv_heads: float
    mlp: float
    num_matrices: int
    pairs: float
    is_summed: bool

    @property
    def forward(self) -> float:
        """The most at one time without gradients."""
        attention = 2 * self.heads + 2 * self.kv_heads
        feed_forward = 2 * self.mlp
        if self.pairs:
            # Sent and received, or given back.
            feed_forward = self.pairs * (2 * self.width + 2 * self.mlp)
        summed = self.width if self.is_summed else 0
        return self.stream + self.width + max(attention, feed_forward) + summed

    def backward(self, remat: str) -> float:
        """The most at one time while a layer is computed anew and differentiated.

        Args:
            remat: one of `transformer.REMATS`.
        """
        if remat == "none":  # Nothing is computed anew: gradients alone.
            experts = self.pairs or 1
            of_experts = self.pairs * self.width
            return 2 * self.width + of_experts + experts * 2 * self.mlp
        attention = 2 * self.heads + 2 * self.kv_heads
        # Those before the activation, what it gives, and its gradient.
        feed_forward = (self.num_matrices + 2) * self.mlp
        if self.pairs:
            feed_forward = self.pairs * (3 * self.width + feed_forward)
        return 2 * self.stream + 2 * self.width + attention + feed_forward

    def kept(self, remat: str) -> float:
        """What a layer leaves for the backward pass.

        Args:
            remat: one of `transformer.REMATS`.
        """
        experts = self.pairs or 1
        mlp = experts * self.num_matrices * self.mlp
        match remat:
            case "block":
                return self.stream
            case "offload":
                return 0
            case "dots":  # The input, and what products give that are used again.
                of_experts = self.pairs * self.width
                products = self.heads + 2 * self.kv_heads + mlp
                return 2 * self.stream + products + of_experts
        # Inputs of the products, too, and what attention gives.
        mlp += experts * self.mlp
        of_experts = 2 * self.pairs * self.width
        attention = 2 * self.heads + 2 * self.kv_heads
        return 2 * self.stream + 2 * self.width + attention + mlp + of_experts


@functools.lru_cache(maxsize=MOST_LAYOUTS)
def layer_values(
    model: ModelConfig, tensor: int, expert: int, is_sequence_cut: bool
) -> LayerValues:
    """Return the sizes of a model's layers under a strategy.

    Args:
        model: of the call.
        tensor: parts of heads and of feed-forward layers.
        expert: groups of experts.
        is_sequence_cut: whether the allocation has the option `sequence`.
    """
    pairs = 0.0
    if model.moe is not None:
        # To devices of its own every expert shard sends what it has room for.
        pairs = model.moe.top_k * (ROOM if expert > 1 else 1.0)
    return LayerValues(
        stream=model.width / (tensor if is_sequence_cut else 1),
        width=model.width,
        heads=model.num_heads * model.head_dim / tensor,
        kv_heads=math.lcm(model.num_kv_heads, tensor) * model.head_dim / tensor,
        mlp=model.mlp_width / tensor,
        num_matrices=2 if model.is_gated else 1,
        pairs=pairs,
        is_summed=tensor > 1,
    )


def layer_weights(model: ModelConfig, allocation: Allocation) -> float:
    """Count the weights of one layer that a device works with, gathered over fsdp.

    Args:
        model: of the call.
        allocation: of the call.
    """
    attention = _num_weights(model)[0] / allocation.tensor
    return attention + feed_forward_weights(model, allocation)


def feed_forward_weights(model: ModelConfig, allocation: Allocation) -> float:
    """Count those of the feed-forward part of a layer.

    Args:
        model: of the call.
        allocation: of the call.
    """
    return _num_weights(model)[1] / (allocation.tensor * allocation.expert)


def largest_weights(model: ModelConfig, allocation: Allocation) -> float:
    """Count those of the largest matrix of a layer.

    Args:
        model: of the call.
        allocation: of the call.
    """
    return _num_weights(model)[2] / (allocation.tensor * allocation.expert)


def cut_weights(model: ModelConfig, allocation: Allocation) -> float:
    """Count the weights of all layers on a device, cut over fsdp.

    Args:
        model: of the call.
        allocation: of the call.
    """
    layers = model.padded_num_layers // allocation.stage
    return layers * layer_weights(model, allocation) / allocation.fsdp


@functools.lru_cache(maxsize=MOST_LAYOUTS)
def _num_weights(model: ModelConfig) -> tuple[int, int, int]:
    """Count attention's, the feed-forward layer's, and its largest matrix's."""
    layers = dict(abstract(model)["layers"])
    feed_forward = _sizes(layers.pop("moe" if model.moe else "mlp"))
    return sum(_sizes(layers)), sum(feed_forward), max(feed_forward)


def _sizes(stacks) -> list[int]:
    leaves = jax.tree.leaves(stacks, is_leaf=lambda node: hasattr(node, "axes"))
    return [math.prod(leaf.shape[1:]) for leaf in leaves]
