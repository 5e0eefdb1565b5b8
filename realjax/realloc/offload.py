"""Offload: arrays in pinned host memory, each shard beside the device it came from.

Only the kind of memory changes here; the sharding stays as it is. To bring an
offloaded array to another allocation, bring it back first and reallocate then: both
changes in one `jax.device_put` would pass through ordinary host memory.
"""

import jax

from realjax.core.arrays import PyTree

HOST = "pinned_host"
DEVICE = "device"


def to_host(tree: PyTree) -> PyTree:
    """Copy every array to pinned host memory; those already there stay as they are.

    The copies are asynchronous. Device memory is freed once the caller has dropped its
    references to the sources (`del`, or rebinding the name) and the copies are done.
    """
    return _with_memory_kind(tree, HOST)


def to_device(tree: PyTree) -> PyTree:
    """Copy every array back to the devices of its sharding."""
    return _with_memory_kind(tree, DEVICE)


def is_on_host(tree: PyTree) -> bool:
    """Tell whether every array of a tree is in pinned host memory."""
    return all(leaf.sharding.memory_kind == HOST for leaf in jax.tree.leaves(tree))


def live_bytes(memory_kind: str = DEVICE) -> int:
    """Add up the bytes of all live arrays in one kind of memory, on all devices.

    Buffers that several arrays share count once.

    Args:
        memory_kind: "device" or "pinned_host".
    """
    buffers = {}
    for array in jax.live_arrays():
        if array.is_deleted() or array.sharding.memory_kind != memory_kind:
            continue
        for shard in array.addressable_shards:
            address = shard.data.unsafe_buffer_pointer()
            buffers[shard.device, address] = shard.data.nbytes
    return sum(buffers.values())


def _with_memory_kind(tree: PyTree, memory_kind: str) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    todo = [
        index
        for index, leaf in enumerate(leaves)
        if leaf.sharding.memory_kind != memory_kind
    ]
    copies = jax.device_put(
        [leaves[index] for index in todo],
        [leaves[index].sharding.with_memory_kind(memory_kind) for index in todo],
        may_alias=False,
    )
    for index, copy in zip(todo, copies, strict=True):
        leaves[index] = copy
    return jax.tree.unflatten(structure, leaves)
