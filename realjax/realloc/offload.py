"""Offload: arrays in pinned host memory, each shard beside the device it came from.

Only the kind of memory changes here; the sharding stays as it is. To bring an
offloaded array to another allocation, bring it back first and reallocate then: both
changes in one `jax.device_put` would pass through ordinary host memory.

A stacked array moves as a whole, by the copy engines. They work beside whatever the
devices compute, need nothing but the destination, and give back what was copied array
by array. Cut into layers it would have to be put together by a program, which waits
its turn behind the call that it was to overlap. What does stream by the layer is the
optimizer's update, which is a program: `functions/streamed.py`.
"""

import jax
from jax.sharding import Sharding

from realjax.core.arrays import Array, PyTree
from realjax.realloc.processes import handle

HOST = "pinned_host"
DEVICE = "device"


def to_host(tree: PyTree) -> PyTree:
    """Copy every array to pinned host memory; those already there stay as they are.

    The copies are asynchronous. Device memory is freed once the caller has dropped its
    references to the sources (`del`, or rebinding the name) and the copies are done.
    Counters go along: a few bytes each, and then nothing is left behind.
    """
    leaves, structure = jax.tree.flatten(tree)
    shardings = [leaf.sharding.with_memory_kind(HOST) for leaf in leaves]
    return jax.tree.unflatten(structure, _copied(leaves, shardings))


def to_device(tree: PyTree, shardings: PyTree | None = None) -> PyTree:
    """Copy every array back to the devices of its sharding.

    Args:
        tree: arrays in host memory; those on their devices stay as they are.
        shardings: what each array shall have. Those whose sharding is in host memory
            stay there. None brings all of them.

    Raises:
        ValueError: a sharding that differs in more than the kind of memory.
    """
    leaves, structure = jax.tree.flatten(tree)
    if shardings is None:
        wanted = [leaf.sharding.with_memory_kind(DEVICE) for leaf in leaves]
    else:
        wanted = structure.flatten_up_to(shardings)
    return jax.tree.unflatten(structure, _copied(leaves, wanted))


class HostCopy:
    """One version of a tree in host memory: made once, brought back as often as needed.

    Its arrays are never donated or changed, so that what comes back is always the same.
    A changed tree needs a new copy; drop the old one first, or both take memory.

    Attributes:
        tree: the arrays, all in host memory.
        shardings: those they had. An array that was in host memory before, as the
            moments of a streamed optimizer, goes back to where it was: nowhere.
    """

    def __init__(self, tree: PyTree):
        """Starts to copy; returns at once."""
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
        self.tree = to_host(tree)

    def reload(self) -> PyTree:
        """Start to copy everything back to where it was."""
        return to_device(self.tree, self.shardings)


def moved_in_program(tree: PyTree, memory_kind: str) -> PyTree:
    """Change the kind of memory of arrays inside a program that `jax.jit` traces.

    Args:
        tree: what is traced.
        memory_kind: "device" or "pinned_host".
    """
    spaces = {DEVICE: jax.memory.Space.Device, HOST: jax.memory.Space.Host}
    return jax.device_put(tree, spaces[memory_kind])


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


def _copied(leaves: list[Array], shardings: list[Sharding]) -> list[Array]:
    """Copy the arrays whose kind of memory is another; the rest stay."""
    found = list(leaves)
    todo = []
    for index, (leaf, wanted) in enumerate(zip(leaves, shardings, strict=True)):
        same = leaf.sharding.with_memory_kind(wanted.memory_kind or DEVICE)
        if not same.is_equivalent_to(wanted, leaf.ndim):
            raise ValueError(
                f"An array of {leaf.sharding} cannot come back as {wanted}: offloading"
                " changes the kind of memory alone. Bring it back first, without"
                " `shardings`, and reallocate it then."
            )
        if leaf.sharding.memory_kind == wanted.memory_kind:
            continue
        if leaf.sharding.addressable_devices:
            todo.append(index)
        else:
            # All of it is in other processes, which move it.
            found[index] = handle(leaf.shape, leaf.dtype, wanted)
    copies = jax.device_put(
        [leaves[index] for index in todo],
        [shardings[index] for index in todo],
        may_alias=False,
    )
    for index, copy in zip(todo, copies, strict=True):
        found[index] = copy
    return found
