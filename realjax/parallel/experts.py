"""Experts on a mesh: tokens are sent to the shards of the experts they chose.

    expert shard     0            1
    tokens           a b          c d           rows of a batch
    pairs            a0 a3 b2 b3  c0 c1 d1 d2   experts 0 1 on shard 0, 2 3 on shard 1
    sent             a0 · | a3 b2 c0 c1 | d2 ·  round 0: room for 2 on the way to each
                     · ·  | b3 ·  d1 ·  | · ·   round 1: what found no room

What is sent has a fixed shape, a little more than the even share; as many rounds follow
as the fullest destination of all shards needs, and with even choices none does. So no
token is dropped, and no shard has to have room for the tokens of all others at once,
as `jax.lax.ragged_all_to_all` asks (which the CPU does not have).

Everything here runs inside `jax.shard_map`: under the compiler's own partitioning, the
sort of the pairs would move all of them to every device.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.grouped_matmul import grouped_matmul
from realjax.core.arrays import Array, Float, Int
from realjax.models.experts import (
    ApplyExperts,
    Choice,
    ExpertKernels,
    collect,
    multiply_quantized,
    pair_outputs,
    sorted_pairs,
    spread,
    weighted_sum,
)
from realjax.models.quantized import Quantized
from realjax.parallel.sharding import AXES, manual_axes, num_parts

ROOM = 1.25
"""Pairs that one round takes to each shard, in even shares."""

LEAST_ROOM = 32
"""Fewer are not worth a second round, however uneven they are."""


class _Layout(NamedTuple):
    """How the arrays of one layer lie.

    Attributes:
        mesh: around the layer; its stage axis may be split by hand already.
        row_axes: split the rows.
        place_axes: split the places between blocks; here they are gathered.
        width_axes: cut the width of the kernels; here they are gathered.
        sum_axes: have parts of every token's output.
        num_experts: on all shards.
    """

    mesh: Mesh | AbstractMesh
    row_axes: tuple[str, ...]
    place_axes: tuple[str, ...]
    width_axes: tuple[str, ...]
    sum_axes: tuple[str, ...]
    num_experts: int

    @property
    def num_shards(self) -> int:
        return self.mesh.shape["expert"]

    @property
    def is_exchanged(self) -> bool:
        """Shards have tokens of their own, which others' experts need."""
        return self.num_shards > 1 and "expert" in self.row_axes

    @property
    def tokens(self) -> P:
        return self._spec(self.row_axes, self.place_axes)

    def kernels(self, kernels: ExpertKernels) -> ExpertKernels:
        """Return the specs; scales are small, and are not cut by width."""
        wide = self._spec(("expert",), self.width_axes, ("tensor",))
        tall = self._spec(("expert",), ("tensor",), self.width_axes)
        specs: Any = (wide, wide, tall)
        if isinstance(kernels.gate, Quantized):
            scale = self._spec(("expert",), ("tensor",))
            scales: Any = (scale, scale, self._spec(("expert",), ()))
            specs = map(Quantized, specs, scales)
        return ExpertKernels._make(specs)

    @property
    def parts(self) -> P:
        return self._spec(self.sum_axes, self.row_axes, self.place_axes)

    def _spec(self, first: tuple[str, ...], *others: tuple[str, ...]) -> P:
        """Write a spec that names axes of one device too.

        `shard_map` sums gradients over the axes that a spec does not name, also where
        there is nothing to sum.
        """
        named = {*first, *itertools.chain(*others)}
        free = set(self.mesh.axis_names) - named - set(self.mesh.manual_axes)
        single = [axis for axis in sorted(free) if self.mesh.shape[axis] == 1]
        return P((*first, *single) or None, *(axes or None for axes in others))


class _Sending(NamedTuple):
    """Which pair goes where: sorted by expert, those of a shard are neighbours."""

    order: Int[Array, " P"]
    rank: Int[Array, "N k"]
    experts: Int[Array, "N k"]
    counts: Int[Array, " shards"]
    num_rounds: Int[Array, ""]


def experts_for(mesh: Mesh, *, options: frozenset[str] = frozenset()) -> ApplyExperts:
    """Return `apply_experts` for a mesh.

    Rows are split over data, fsdp and expert, as far as these divide them; where expert
    does not, its shards work on the same tokens and their outputs are summed.

    Args:
        mesh: The mesh of the call.
        options: The options of its allocation.
    """

    def apply(
        x: Float[Array, "B T D"],
        choice: Choice,
        kernels: ExpertKernels,
        activation: str,
    ) -> Float[Array, "B T D"]:
        manual = manual_axes()
        # Where `shard_map` split some axes by hand, the mesh around says so.
        around = jax.sharding.get_abstract_mesh() if manual else mesh
        num_experts = kernels.gate.shape[0]
        layout = _layout(mesh, around, options, x.shape, num_experts)
        # Outputs that are to be summed come back side by side: the gradient of a sum
        # inside `shard_map` would be one more sum over the devices.
        parts = jax.shard_map(
            functools.partial(_on_device, layout, activation),
            mesh=around,
            in_specs=(layout.tokens, layout.tokens, layout.kernels(kernels)),
            out_specs=layout.parts,
            axis_names=frozenset(mesh.axis_names) - manual,
            check_vma=False,  # Kernels start their loops from plain zeros.
        )(x, choice, kernels)
        return jax.lax.reduce_sum(parts, (0,))

    return apply


def _layout(
    mesh: Mesh,
    around: Mesh | AbstractMesh,
    options: frozenset[str],
    shape: tuple[int, ...],
    num_experts: int,
) -> _Layout:
    row_axes = AXES["batch"]
    while shape[0] % num_parts(row_axes, mesh):
        row_axes = row_axes[:-1]
    is_split = "sequence" in options and shape[1] % mesh.shape["tensor"] == 0
    place_axes = ("tensor",) if is_split else ()
    is_cut = "zero1" not in options and num_parts(AXES["embed"], mesh) > 1
    summed = {"expert", "tensor"} - {*row_axes, *place_axes}
    return _Layout(
        mesh=around,
        row_axes=row_axes,
        place_axes=place_axes,
        width_axes=AXES["embed"] if is_cut else (),
        sum_axes=tuple(axis for axis in ("expert", "tensor") if axis in summed),
        num_experts=num_experts,
    )


def _on_device(
    layout: _Layout,
    activation: str,
    x: Float[Array, "B T D"],
    choice: Choice,
    kernels: ExpertKernels,
) -> Float[Array, "1 B T D"]:
    """Apply the experts to one device's tokens; its part of the sum over devices."""
    for axis in layout.place_axes:
        gather = functools.partial(
            jax.lax.all_gather, axis_name=axis, axis=1, tiled=True
        )
        x, choice = jax.tree.map(gather, (x, choice))
    tokens = x.reshape(-1, x.shape[-1])
    choice = Choice(*(leaf.reshape(len(tokens), -1) for leaf in choice))
    if layout.is_exchanged:
        total = _exchanged(layout, activation, tokens, choice, kernels)
    else:
        experts = _own_experts(layout, choice.experts)
        multiply = functools.partial(_multiply, layout)
        outputs = pair_outputs(tokens, experts, kernels, activation, multiply)
        total = weighted_sum(outputs, choice.weights)
    total = total.astype(x.dtype).reshape(x.shape)
    for axis in layout.place_axes:
        total = jax.lax.psum_scatter(total, axis, scatter_dimension=1, tiled=True)
    return total[None]


def _own_experts(layout: _Layout, experts: Array) -> Array:
    """Count experts from the first of this shard; those of others are none."""
    num_own = layout.num_experts // layout.num_shards
    experts = experts - jax.lax.axis_index("expert") * num_own
    return jnp.where((experts >= 0) & (experts < num_own), experts, num_own)


# -- the exchange ------------------------------------------------------------------


def room(num_pairs: int, num_shards: int) -> int:
    """Return how many pairs one round takes from a shard to each other."""
    share = math.ceil(ROOM * num_pairs / num_shards)
    return min(num_pairs, max(share, LEAST_ROOM))


def _exchanged(
    layout: _Layout,
    activation: str,
    tokens: Float[Array, "N D"],
    choice: Choice,
    kernels: ExpertKernels,
) -> Float[Array, "N D"]:
    """Send tokens to their experts and sum what comes back, float32."""
    sending = _sending(layout, choice.experts)
    inputs = (tokens, choice.weights, kernels, sending)
    total = _round(layout, activation, jnp.int32(0), *inputs)
    return _later_rounds(layout, activation, total, inputs)


def _sending(layout: _Layout, experts: Int[Array, "N k"]) -> _Sending:
    order, rank = sorted_pairs(experts)
    num_own = layout.num_experts // layout.num_shards
    shards = experts.reshape(-1) // num_own
    counts = jnp.bincount(shards, length=layout.num_shards).astype(jnp.int32)
    num_rounds = -(-counts.max() // room(experts.size, layout.num_shards))
    # All shards take part in every round, and so do all who share their kernels.
    num_rounds = jax.lax.pmax(num_rounds, AXES["batch"])
    return _Sending(order, rank, experts, counts, num_rounds)


def _round(
    layout: _Layout,
    activation: str,
    number: Int[Array, ""],
    tokens: Float[Array, "N D"],
    weights: Float[Array, "N k"],
    kernels: ExpertKernels,
    sending: _Sending,
) -> Float[Array, "N D"]:
    """Send what one round has room for; sum its outputs over each token's experts."""
    pair_at, place_of = _places(layout, number, sending)
    num_own = layout.num_experts // layout.num_shards
    exchange = functools.partial(
        jax.lax.all_to_all,
        axis_name="expert",
        split_axis=0,
        concat_axis=0,
        tiled=True,
    )
    experts = sending.experts.reshape(-1) % num_own
    experts = experts.at[pair_at].get(mode="fill", fill_value=num_own)
    with jax.named_scope("dispatch"):
        received = exchange(spread(tokens, pair_at, place_of))
        experts = exchange(experts)[:, None]
    multiply = functools.partial(_multiply, layout)
    outputs = pair_outputs(received, experts, kernels, activation, multiply)
    with jax.named_scope("combine"):
        outputs = collect(exchange(outputs[:, 0]), pair_at, place_of)
    return weighted_sum(outputs, weights)


def _places(
    layout: _Layout, number: Int[Array, ""], sending: _Sending
) -> tuple[Int[Array, " S"], Int[Array, "N k"]]:
    """Return the pair at each place of what is sent, and the place of each pair."""
    experts, counts = sending.experts, sending.counts
    num_pairs, num_shards = experts.size, layout.num_shards
    size = room(num_pairs, num_shards)
    first = jnp.cumsum(counts) - counts + number * size
    left = counts - number * size
    step = jnp.arange(size, dtype=jnp.int32)[None, :]
    pair_at = sending.order.at[first[:, None] + step].get(mode="clip")
    pair_at = jnp.where(step < left[:, None], pair_at, num_pairs)
    # A pair without an expert is of the shard past the last.
    shard = experts // (layout.num_experts // num_shards)
    step = sending.rank - first.at[shard].get(mode="clip")
    has_place = (shard < num_shards) & (step >= 0) & (step < size)
    place_of = jnp.where(has_place, shard * size + step, num_shards * size)
    return pair_at.reshape(-1), place_of


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _later_rounds(layout: _Layout, activation: str, total: Array, inputs: tuple):
    """Add the rounds after the first, as many as there are.

    Their number is known on the device alone. The backward pass runs each again, so
    that rare rounds keep nothing.
    """

    def add(number: Array, total: Array) -> Array:
        return total + _round(layout, activation, number, *inputs)

    return jax.lax.fori_loop(1, inputs[-1].num_rounds, add, total)


def _later_forward(layout: _Layout, activation: str, total: Array, inputs: tuple):
    return _later_rounds(layout, activation, total, inputs), inputs


def _later_backward(layout: _Layout, activation: str, inputs: tuple, bar: Array):
    tokens, weights, kernels, sending = inputs
    varied = (tokens, weights, kernels)

    def add(number: Array, bars: tuple) -> tuple:
        def run(tokens: Array, weights: Array, kernels: ExpertKernels) -> Array:
            return _round(layout, activation, number, tokens, weights, kernels, sending)

        _, backward = jax.vjp(run, *varied)
        return jax.tree.map(lambda a, b: a + b, bars, backward(bar))

    zeros = jax.tree.map(jnp.zeros_like, varied)
    bars = jax.lax.fori_loop(1, sending.num_rounds, add, zeros)
    return bar, (*bars, None)


_later_rounds.defvjp(_later_forward, _later_backward)


# -- kernels that fsdp cuts --------------------------------------------------------


def _multiply(
    layout: _Layout,
    rows: Array,
    kernels: Array | Quantized,
    group_sizes: Array,
    name: str,
) -> Array:
    """Multiply each group of rows by its kernel, gathered from its cuts."""
    width = 2 if name == "down" else 1
    if isinstance(kernels, Quantized):
        if layout.width_axes:  # In 8 bits: half of what the products read.
            values = _gathered(layout.width_axes, width, kernels.values)
            kernels = kernels._replace(values=values)
        return multiply_quantized(rows, kernels, group_sizes)
    if not layout.width_axes:
        return grouped_matmul(rows, kernels, group_sizes)
    return _gathered_product(layout.width_axes, width, rows, kernels, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered_product(axes, width: int, rows, kernels, group_sizes):
    """Gather in the dtype of the rows; sum gradients over devices in float32.

    Only the cuts are kept for the backward pass, which gathers again.
    """
    whole = _gathered(axes, width, kernels.astype(rows.dtype))
    return grouped_matmul(rows, whole, group_sizes)


def _gathered(axes: tuple[str, ...], width: int, kernels: Array) -> Array:
    return jax.lax.all_gather(kernels, axes, axis=width, tiled=True)


def _gathered_forward(axes, width, rows, kernels, group_sizes):
    out = _gathered_product(axes, width, rows, kernels, group_sizes)
    return out, (rows, kernels, group_sizes)


def _gathered_backward(axes, width: int, saved, bar: Array):
    rows, kernels, group_sizes = saved
    whole = _gathered(axes, width, kernels.astype(rows.dtype))
    # Of float32 kernels the gradient is float32; the product casts them back.
    whole = whole.astype(kernels.dtype)
    product = functools.partial(grouped_matmul, group_sizes=group_sizes)
    _, backward = jax.vjp(lambda rows, whole: product(rows, whole), rows, whole)
    rows_bar, whole_bar = backward(bar)
    kernels_bar = jax.lax.psum_scatter(
        whole_bar, axes, scatter_dimension=width, tiled=True
    )
    return rows_bar, kernels_bar, None


_gathered_product.defvjp(_gathered_forward, _gathered_backward)
