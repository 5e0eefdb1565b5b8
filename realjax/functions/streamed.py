"""An optimizer's update whose moments wait in host memory and visit the devices.

    host      moments of all layers   [ 0 | 1 | 2 | 3 | … ]
                                            │   ▲
    devices   moments of one layer          ▼   │  updated beside its masters
              masters, gradients      [ 0 | 1 | 2 | 3 | … ]  which stay there

The update of a leaf needs nothing of another leaf once the norm of all gradients is
known, so it runs over the leading dimension in chunks: the stacked leaves a layer at a
time, together; the others, as embeddings, some rows at a time. A device holds the
moments of two chunks, one being read and one being written back.

Each device runs over its own shards (`shard_map` with all axes by hand), so layers that
are cut over stages are no special case, and nothing here communicates.

The loop carries the stacked arrays and writes into them. As inputs and outputs of
`jax.lax.scan` they would exist twice: all masters on the device, all moments on the
host.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realjax.core.arrays import PyTree

HOST = "pinned_host"
DEVICE = "device"

CHUNK_BYTES = 32 * 2**20
"""Of one moment, where one layer or row is less: smaller copies waste the link."""

type Update = Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
"""(parameters, optimizer state, gradients, scalars) to new parameters and state."""

type Move = Callable[[PyTree, str], PyTree]
"""Changes the kind of memory of a tree, within a program."""

type Leaves = dict[str, Any]
"""Arrays, or their shapes, by their path in a tree: "1/mu/layers/mlp/up/kernel"."""


def on_host(shardings: PyTree) -> PyTree:
    """Return the same shardings in pinned host memory.

    Described devices have no memories to name; a sharding of theirs says it over the
    abstract mesh.
    """

    def host(sharding: NamedSharding) -> NamedSharding:
        found = sharding.with_memory_kind(HOST)
        if found.memory_kind == HOST:
            return found
        abstract = sharding.mesh.abstract_mesh
        return NamedSharding(abstract, sharding.spec, memory_kind=HOST)

    return jax.tree.map(host, shardings)


def streamed(
    update: Update,
    init: Callable[[PyTree], PyTree],
    axes: PyTree,
    move: Move,
    *,
    mesh: Mesh,
    shardings: PyTree,
    state_shardings: PyTree,
) -> Update:
    """Return the update that brings moments from the host, chunk by chunk.

    Args:
        update: of any part of the parameters, with the part of the state that `init`
            makes for it. Its scalars hold what it needs to know of the whole.
        init: makes the optimizer's state of a tree of parameters.
        axes: the abstract twin of the parameters: leaves with `axes`.
        move: brings a tree to "device" and to "pinned_host" memory.
        mesh: where the parameters are.
        shardings: of parameters, moments and gradients while they are updated.
        state_shardings: of the optimizer's state; moments are in host memory.

    Returns:
        A function of the same arguments, to be traced under `jax.jit` with the state
        donated.
    """
    groups = _groups(axes)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    state_specs = jax.tree.map(lambda sharding: sharding.spec, state_shardings)

    def update_shards(
        parameters: PyTree, state: PyTree, gradients: PyTree, scalars: PyTree
    ) -> tuple[PyTree, PyTree]:
        parts = _Parts(update, init, move, state, scalars)
        masters, moments = _by_path(parameters), _by_path(state)
        sums = _by_path(gradients)
        for group in groups:
            parts.advance(group, masters, moments, sums)
        # An update of no parameters moves the counters alone.
        _, counters = update({}, parts.of({}, {}), {}, scalars)
        moments |= _by_path(counters)
        return _filled(parameters, masters), _filled(state, moments)

    return jax.shard_map(
        update_shards,
        mesh=mesh,
        in_specs=(specs, state_specs, specs, PartitionSpec()),
        out_specs=(specs, state_specs),
    )


class _Parts:
    """Updates parts of the parameters on one device."""

    def __init__(
        self,
        update: Update,
        init: Callable,
        move: Move,
        state: PyTree,
        scalars: PyTree,
    ):
        self.update, self.init, self.move = update, init, move
        self.scalars = scalars
        counters = _by_path(jax.eval_shape(init, {}))
        self.counters = {path: _by_path(state)[path] for path in counters}

    def of(self, parameters: PyTree, moments: Leaves) -> PyTree:
        """The optimizer's state of a part of the parameters."""
        return _filled(jax.eval_shape(self.init, parameters), moments | self.counters)

    def advance(
        self, group: Sequence[str], masters: Leaves, moments: Leaves, sums: Leaves
    ) -> None:
        """Updates the leaves of a group, in the dicts."""
        part = {path: masters[path] for path in group}
        shapes = _by_path(jax.eval_shape(self.init, _nested(part)))
        mine = {path: moments[path] for path in shapes if path not in self.counters}
        gradients = {path: sums[path] for path in group}
        total = masters[group[0]].shape[0]
        row_bytes = sum(leaf.nbytes for leaf in part.values()) // max(total, 1)
        rows = int(np.clip(CHUNK_BYTES // max(row_bytes, 1), 1, total))

        def chunk(start: Any, size: int, carried: tuple[Leaves, Leaves]):
            return self._chunk(carried, gradients, start, size)

        carried, num_whole = (part, mine), total // rows
        if num_whole == 1:
            carried = chunk(0, rows, carried)
        else:
            body = lambda index, carried: chunk(index * rows, rows, carried)
            carried = jax.lax.fori_loop(0, num_whole, body, carried)
        if rest := total - num_whole * rows:
            carried = chunk(num_whole * rows, rest, carried)
        masters |= carried[0]
        moments |= carried[1]

    def _chunk(
        self, carried: tuple[Leaves, Leaves], sums: Leaves, start: Any, size: int
    ) -> tuple[Leaves, Leaves]:
        """Updates some rows of a group, in the place they have in its arrays."""
        cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size)
        masters, moments = jax.tree.map(cut, carried)
        moments = self.move(moments, DEVICE)
        # Read once: a CPU would read anew what is being written, from a copy of all
        # layers. Leaf by leaf, so that none waits for the others.
        moments = jax.tree.map(jax.lax.optimization_barrier, moments)
        parameters = _nested(masters)
        new, state = self.update(
            parameters,
            self.of(parameters, moments),
            _nested(jax.tree.map(cut, sums)),
            self.scalars,
        )
        state = _by_path(state)
        new_moments = self.move({path: state[path] for path in moments}, HOST)
        put = lambda leaf, piece: jax.lax.dynamic_update_slice_in_dim(
            leaf, piece, start, 0
        )
        return jax.tree.map(put, carried, (_by_path(new), new_moments))


def _groups(axes: PyTree) -> list[list[str]]:
    """Paths of what is updated together: all stacked leaves, and each other leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(
        axes, is_leaf=lambda node: hasattr(node, "axes")
    )
    stacked = [_name(path) for path, leaf in leaves if leaf.axes[0] == "layer"]
    others = [[_name(path)] for path, leaf in leaves if leaf.axes[0] != "layer"]
    return [stacked, *others] if stacked else others


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_path(tree: PyTree) -> Leaves:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _filled(template: PyTree, leaves: Leaves) -> PyTree:
    pick = lambda path, _: leaves[_name(path)]
    return jax.tree_util.tree_map_with_path(pick, template)


def _nested(leaves: Leaves) -> PyTree:
    """The nested dict whose leaves these are."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree
