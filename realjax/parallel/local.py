"""Work that every device does on its own parts of arrays, without the others.

The compiler's own partitioning would do for a scatter or a gather at places that only
the data knows what is right whatever these are: bring all of an array to every device.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from realjax.core.arrays import PyTree
from realjax.models.axes import Axes
from realjax.models.partition import Locally
from realjax.parallel.sharding import (
    axes_spec,
    indivisible_axes,
    is_axes,
    manual_axes,
)


def locally_for(mesh: Mesh) -> Locally:
    """Return `Partition.locally` for a mesh.

    What the axes do not cut is on every device as a whole, and what comes out so must
    be equal on all of them. A mesh axis that does not divide a dimension it would cut
    cuts none at all, of no array.

    Args:
        mesh: The mesh of the call.
    """

    def locally(
        function: Callable[..., PyTree], in_axes: tuple[PyTree, ...], out_axes: PyTree
    ) -> Callable[..., PyTree]:
        def call(*arguments: PyTree) -> PyTree:
            # Inside a stage: what is left of the mesh to be split.
            manual = manual_axes()
            around = jax.sharding.get_abstract_mesh() if manual else mesh
            uncut = manual | _indivisible(arguments, in_axes, mesh)
            specs = functools.partial(_specs, mesh=mesh, uncut=uncut)
            return jax.shard_map(
                function,
                mesh=around,
                axis_names=set(mesh.axis_names) - manual,
                in_specs=specs(in_axes),
                out_specs=specs(out_axes),
                check_vma=False,  # Kernels start their loops from plain zeros.
            )(*arguments)

        return call

    return locally


def _indivisible(
    arguments: tuple[PyTree, ...], in_axes: tuple[PyTree, ...], mesh: Mesh
) -> frozenset[str]:
    """Return the mesh axes that do not divide what they would cut, the last first."""
    found: set[str] = set()

    def look(axes: Axes, array: jax.Array) -> None:
        for size, name in zip(array.shape, axes, strict=True):
            found.update(indivisible_axes(size, name, mesh))

    jax.tree.map(look, in_axes, arguments, is_leaf=is_axes)
    return frozenset(found)


def _specs(axes: PyTree, *, mesh: Mesh, uncut: frozenset[str]) -> PyTree:
    return jax.tree.map(
        lambda leaf: axes_spec(leaf, mesh, without=uncut), axes, is_leaf=is_axes
    )
