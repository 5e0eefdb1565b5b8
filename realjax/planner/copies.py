"""What a copy of parameters takes of devices: in closed form, of many layouts at once.

    copy_loads(source, destination, node)     what the busiest device sends or receives
    copy_work(source, destination, …)         bytes and pieces of the whole copy
    copy_quantities(one, another, …)          the same of two allocations, in seconds

The closed form is that of `realloc.routes`, whose totals it equals or is near.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array
from realjax.models.config import ModelConfig
from realjax.models.parameters import split
from realjax.models.transformer import abstract_parameters
from realjax.parallel.allocation import Allocation
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Quantities

AXES = ("tensor", "expert", "fsdp", "stage")
"""Those that cut parameters."""


class Layouts(NamedTuple):
    """Ranges of devices, and the parts that parameters are cut into on them.

    Attributes:
        start, size: of the range.
        tensor, expert, fsdp, stage: parts.
    """

    start: Any
    size: Any
    tensor: Any
    expert: Any
    fsdp: Any
    stage: Any

    @classmethod
    def of(cls, allocation: Allocation) -> "Layouts":
        """Of one allocation, whose devices follow each other."""
        axes = {axis: jnp.asarray(getattr(allocation, axis)) for axis in AXES}
        start, size = jnp.asarray(allocation.devices[0]), jnp.asarray(allocation.size)
        return cls(start=start, size=size, **axes)


class CopyLoads(NamedTuple):
    """What the busiest device sends or receives, as shares of its part of the copy.

    Attributes:
        across: between nodes.
        within: in a node.
    """

    across: Array
    within: Array


def copy_loads(source: Layouts, destination: Layouts, node: Any) -> CopyLoads:
    """Return what a copy of parameters brings every device, as `realloc.routes` has it.

    In closed form, for matrices, which are cut by all axes. A device keeps what it has
    already of its new part. Of the rest, what is on no device of its node comes from
    another, once for all of the node that need it.

    Args:
        source: ranges and strategies of where parameters lie.
        destination: of where they shall lie.
        node: devices of one.
    """
    is_joint = lambda unit: (
        (source.start // unit <= (destination.start + destination.size - 1) // unit)
        & (destination.start // unit <= (source.start + source.size - 1) // unit)
    )
    num_nodes = lambda options: -(-options.size // node)
    both_nodes = jnp.minimum(num_nodes(source), num_nodes(destination))
    both_nodes = jnp.where(is_joint(node), both_nodes, 0)
    inside = both_nodes / num_nodes(destination)
    device_share = jnp.ones_like(source.size, jnp.float32)
    mean_share, node_share = device_share, device_share
    source_stride, destination_stride = _strides(source), _strides(destination)
    for axis in AXES:
        have, want = getattr(source, axis), getattr(destination, axis)
        is_aligned = (source_stride[axis] * have == destination_stride[axis] * want) | (
            want == 1
        )
        in_node = jnp.clip(node // source_stride[axis], 1, have)
        for_node = have // in_node
        share = lambda parts, is_aligned=is_aligned, want=want: jnp.where(
            parts == 1, 1.0, jnp.where(is_aligned, jnp.minimum(1.0, want / parts), 0.0)
        )
        device_share = device_share * share(have)
        mean_share = mean_share / jnp.where(
            is_aligned & (want > 1), jnp.maximum(have / want, 1.0), have
        )
        node_share = node_share * share(for_node)
    # Of a node that has some of the source, and of those devices that do.
    common = jnp.minimum(source.size, destination.size)
    here = inside * destination.size
    common = jnp.where(is_joint(1), common / jnp.maximum(here, 1), 0.0)
    local = jnp.where(common * inside == 1, device_share, 0.0)
    entering_here = jnp.where(inside > 0, 1.0 - node_share, 0.0)
    most_entering = jnp.where(inside < 1, 1.0, entering_here)
    mean_entering = inside * entering_here + (1 - inside)
    parts_below = destination.tensor * destination.expert * destination.fsdp
    data = destination.size // (parts_below * destination.stage)
    sharing = jnp.clip(node // parts_below, 1, data)
    received = jnp.maximum(
        jnp.where(inside > 0, 1.0 - entering_here / sharing - local, 0.0),
        jnp.where(inside < 1, 1.0 - 1.0 / sharing, 0.0),
    )
    # Sources share what is sent, and who got it from another node hands it on.
    given = jnp.maximum(node_share - common * mean_share, 0.0)
    of_node = lambda options: jnp.minimum(options.size, node)
    fold_here = of_node(destination) / of_node(source)
    given = jnp.where(inside > 0, given * fold_here, 0.0)
    handed_on = most_entering * (sharing - 1) / sharing
    fold = destination.size / source.size
    return CopyLoads(
        across=jnp.maximum(most_entering, mean_entering * fold) / sharing,
        within=jnp.maximum(jnp.maximum(received, given), handed_on),
    )


def _strides(options: Layouts) -> dict[str, Array]:
    """Return how far apart the devices of an axis are; see `parallel.mesh`."""
    return {
        "tensor": jnp.ones_like(options.tensor),
        "expert": options.tensor,
        "fsdp": options.tensor * options.expert,
        "stage": options.size // options.stage,
    }


PIECE_PROGRAMS = 0.1
"""Of the launch of a program, what it takes to issue a piece of a copy."""


class CopyWork(NamedTuple):
    """What a copy takes of the busiest device, and of the thread that issues it.

    Attributes:
        memory, link, network: bytes read and written, and sent over links.
        pieces: that are cut, sent and joined on a node, issued one after another.
    """

    memory: Any
    link: Any
    network: Any
    pieces: Any


def copy_work(
    source: Layouts,
    destination: Layouts,
    *,
    copy_bytes: Any,
    num_arrays: Any,
    devices_per_node: Any,
) -> CopyWork:
    """Return what copies of parameters take.

    Args:
        source: where parameters lie.
        destination: where they shall lie.
        copy_bytes: of the destination, on one device.
        num_arrays: leaves of the parameters.
        devices_per_node: devices of one.
    """
    loads = copy_loads(source, destination, devices_per_node)
    pieces, have_axes, want_axes = jnp.ones_like(source.size), 0, 0
    for axis in AXES:
        have, want = getattr(source, axis), getattr(destination, axis)
        pieces = pieces * jnp.maximum(have // want, 1)
        have_axes = have_axes + (have > 1)
        want_axes = want_axes + (want > 1)
    # One dimension cut instead of another, on the same devices, is one program.
    is_exchange = (
        (source.start == destination.start)
        & (source.size == destination.size)
        & (have_axes == 1)
        & (want_axes == 1)
        & (pieces == source.size)
    )
    devices = jnp.minimum(destination.size, devices_per_node)
    return CopyWork(
        memory=2.0 * copy_bytes,
        link=loads.within * copy_bytes,
        network=loads.across * copy_bytes,
        pieces=num_arrays * jnp.where(is_exchange, 1, pieces * devices),
    )


def copy_quantities(
    source: Allocation,
    destination: Allocation,
    *,
    copy_bytes: float,
    num_arrays: int,
    cluster: Cluster,
) -> Quantities:
    """Return what one copy of parameters takes.

    Args:
        source: where parameters lie.
        destination: where they shall lie.
        copy_bytes: of the destination, on one device.
        num_arrays: leaves of the parameters.
        cluster: of the devices.
    """
    sides = [Layouts.of(one) for one in (source, destination)]
    work = copy_work(
        *sides,
        copy_bytes=copy_bytes,
        num_arrays=num_arrays,
        devices_per_node=cluster.devices_per_node,
    )
    moved = Quantities(
        memory=float(work.memory) / cluster.device.bytes_per_second,
        link=float(work.link) / cluster.link_bytes_per_second,
        network=float(work.network) / cluster.network_bytes_per_second,
    )
    devices = min(destination.size, cluster.devices_per_node)
    issued = Quantities(programs=PIECE_PROGRAMS * float(work.pieces))
    return moved.times(cluster.turns(devices)).plus(issued)


def num_arrays_of(model: ModelConfig) -> int:
    """Return how many arrays move with the parameters of a model: what is trained."""
    trained, _ = split(abstract_parameters(model), model)
    return len(jax.tree.leaves(trained, is_leaf=lambda node: hasattr(node, "axes")))
