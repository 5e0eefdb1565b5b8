"""What a model is told about the devices it runs on: nothing but these functions.

A model names the dimensions of its arrays and calls these where a strategy may want a
say. `WHOLE` is one device; `realjax.parallel` makes the others.
"""

import dataclasses
import math
from collections.abc import Callable

import jax

from realjax.core.arrays import Array, Float, PyTree
from realjax.models.axes import Constrain, unconstrained
from realjax.models.experts import ApplyExperts, apply_experts

# layer(x, of_layer, of_rows) -> (x, sums): one layer of the stack. `of_layer` is its
# part of the stacked leaves; every leaf of `of_rows` has the rows as its first
# dimension; `sums` are sums over rows.
Layer = Callable[[Array, PyTree, PyTree], tuple[Array, PyTree]]
RunLayers = Callable[[Layer, Array, PyTree, PyTree], tuple[Array, PyTree]]

# locally(function, in_axes, out_axes) -> function: what each device does with its own
# parts of some arrays. The axes are those of the arguments, a tuple of trees, and of
# the result.
Locally = Callable[[Callable[..., PyTree], tuple[PyTree, ...], PyTree], Callable]


def scan_layers(
    layer: Layer, x: Float[Array, "R S D"], stacked: PyTree, of_rows: PyTree
) -> tuple[Float[Array, "R S D"], PyTree]:
    """Run the layers one after the other; return also their sums, stacked."""

    def step(x: Array, of_layer: PyTree) -> tuple[Array, PyTree]:
        return layer(x, of_layer, of_rows)

    return jax.lax.scan(step, x, stacked)


def on_whole_arrays(
    function: Callable[..., PyTree], in_axes: tuple[PyTree, ...], out_axes: PyTree
) -> Callable[..., PyTree]:
    """Return the function as it is: the `locally` of a program without a mesh."""
    del in_axes, out_axes
    return function


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """How the work of a forward pass is split.

    Attributes:
        constrain: gives an activation the sharding of its logical axes.
        num_head_parts: parts the attention heads are split into. Key and value heads
            are repeated until these divide them.
        run_layers: runs the stack.
        experts: applies the experts of a layer to the tokens that chose them.
        locally: makes a function work on each device's own parts of arrays, as cut by
            their logical axes, without a word between devices.
        linear_logprob: scores tokens with the language head, as
            `rl.logprobs.token_logprobs` takes it; None is that of one device.
        linear_top: finds the likeliest tokens, as `rl.logprobs.top_logprobs` takes it;
            likewise.
    """

    constrain: Constrain = unconstrained
    num_head_parts: int = 1
    run_layers: RunLayers = scan_layers
    experts: ApplyExperts = apply_experts
    locally: Locally = on_whole_arrays
    linear_logprob: Callable[..., tuple[Array, Array]] | None = None
    linear_top: Callable[..., tuple[Array, Array]] | None = None

    def num_kv_heads(self, num_kv_heads: int) -> int:
        """Key and value heads in activations and in pages.

        The least common multiple divides the query heads, as both of its terms do, and
        gives each part just the heads its queries read.
        """
        return math.lcm(num_kv_heads, self.num_head_parts)


WHOLE = Partition()
