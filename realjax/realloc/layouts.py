"""Layouts: how arrays lie on devices, as plain numbers.

A layout cuts each dimension of an array into equal parts, and a tile is one part in
every dimension. Every device holds one tile; a tile may lie on several devices.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from realjax.core.arrays import PyTree
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import abstract_mesh
from realjax.parallel.sharding import parameter_shardings

Box = tuple[tuple[int, int], ...]
"""A block of an array: (start, stop) of every dimension."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How an array lies on devices: a sharding as plain numbers.

    Attributes:
        devices: Device ids in mesh order, the last mesh axis fastest.
        mesh_shape: Size of every mesh axis.
        spec: For each leading dimension, the mesh axes that cut it, major first.
    """

    devices: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    spec: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check that the mesh counts its devices."""
        if math.prod(self.mesh_shape) != len(self.devices):
            raise ValueError(
                f"A mesh of shape {self.mesh_shape} has {math.prod(self.mesh_shape)}"
                f" places and {len(self.devices)} devices. Name one device per place."
            )

    @classmethod
    def of(cls, sharding: Sharding) -> "Layout":
        """Read a layout off a sharding.

        Raises:
            TypeError: a sharding over several devices that is no `NamedSharding`.
        """
        return _layout_of(sharding)

    def tiles(self, shape: Sequence[int]) -> tuple[tuple[int, ...], np.ndarray]:
        """Return the parts of every dimension, and the tile of every device.

        Args:
            shape: Of the array.

        Returns:
            The number of parts per dimension, and integers [devices, dimensions] that
            say which part each device holds.

        Raises:
            ValueError: a dimension that its parts do not divide.
        """
        if len(self.spec) > len(shape):
            raise ValueError(
                f"The spec {self.spec} names {len(self.spec)} dimensions and the array"
                f" has shape {tuple(shape)}. Give a sharding of at most its rank."
            )
        coordinates = np.indices(self.mesh_shape).reshape(len(self.mesh_shape), -1)
        tiles = np.zeros((len(self.devices), len(shape)), np.int64)
        parts = [1] * len(shape)
        for dimension, axes in enumerate(self.spec):
            for axis in axes:
                parts[dimension] *= self.mesh_shape[axis]
                tiles[:, dimension] *= self.mesh_shape[axis]
                tiles[:, dimension] += coordinates[axis]
        for size, count in zip(shape, parts, strict=True):
            if size % count:
                raise ValueError(
                    f"An array of shape {tuple(shape)} does not divide into"
                    f" {'×'.join(map(str, parts))} parts. Choose a sharding whose parts"
                    " are equal, or pad the array."
                )
        return tuple(parts), tiles

    def boxes(self, shape: Sequence[int]) -> dict[int, Box]:
        """Return the block that each device holds."""
        parts, tiles = self.tiles(shape)
        sizes = [size // count for size, count in zip(shape, parts, strict=True)]
        return {
            device: tuple(
                (index * size, (index + 1) * size)
                for index, size in zip(tile, sizes, strict=True)
            )
            for device, tile in zip(self.devices, tiles.tolist(), strict=True)
        }


@functools.lru_cache(maxsize=8192)
def _layout_of(sharding: Sharding) -> Layout:
    if sharding.num_devices == 1:
        (device,) = sharding.device_set
        return Layout(devices=(device.id,), mesh_shape=(1,))
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"Found an array with sharding {sharding}. Arrays on several devices need a"
            " NamedSharding: give its producer explicit out_shardings."
        )
    return Layout(
        devices=tuple(device.id for device in np.asarray(sharding.mesh.devices).flat),
        mesh_shape=tuple(sharding.mesh.axis_sizes),
        spec=_spec_of(sharding),
    )


def layouts_for(abstract_tree: PyTree, allocation: Allocation) -> PyTree:
    """Return the layout of every parameter, as if a device's index were its id.

    There need be no devices: thousands can be planned for on one machine.

    Args:
        abstract_tree: Leaves with `shape` and `axes`, as models describe parameters.
        allocation: Where the parameters lie.

    Raises:
        ValueError: a dimension that its mesh axes do not divide.
    """
    mesh = abstract_mesh(allocation)
    mesh_shape = (1,) if mesh.size == 1 else tuple(mesh.axis_sizes)
    shardings = parameter_shardings(abstract_tree, mesh, options=allocation.options)
    return jax.tree.map(
        lambda sharding: Layout(
            devices=allocation.devices,
            mesh_shape=mesh_shape,
            spec=() if mesh.size == 1 else _spec_of(sharding),
        ),
        shardings,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafClass:
    """The leaves of a tree that share a shape and both layouts, and so one route.

    Attributes:
        names: Their paths in the tree, joined by dots.
        shape: Of each.
        source: Where they lie.
        destination: Where they shall lie.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    source: Layout
    destination: Layout


def leaf_classes(
    abstract_tree: PyTree, source: Allocation, destination: Allocation
) -> list[LeafClass]:
    """Group the parameters of a model that share one route.

    Args:
        abstract_tree: Leaves with `shape` and `axes`, in nested dicts.
        source: Where they lie; a device's index is taken for its id.
        destination: Where they shall lie.

    Raises:
        ValueError: a dimension that an allocation does not divide.
    """
    leaves = jax.tree_util.tree_leaves_with_path(
        abstract_tree, is_leaf=lambda node: hasattr(node, "axes")
    )
    sides = [
        jax.tree.leaves(layouts_for(abstract_tree, allocation))
        for allocation in (source, destination)
    ]
    classes: dict[tuple[tuple[int, ...], Layout, Layout], list[str]] = {}
    for (path, leaf), before, after in zip(leaves, *sides, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        classes.setdefault((leaf.shape, before, after), []).append(name)
    return [
        LeafClass(names=tuple(names), shape=shape, source=before, destination=after)
        for (shape, before, after), names in classes.items()
    ]


def _spec_of(sharding: NamedSharding) -> tuple[tuple[int, ...], ...]:
    axes = {name: index for index, name in enumerate(sharding.mesh.axis_names)}
    spec = []
    for entry in sharding.spec:
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        spec.append(tuple(axes[name] for name in names))
    return tuple(spec)
