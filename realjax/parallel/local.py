"""Work that every device does on its own parts of arrays, without the others.

The compiler's own partitioning would do for a scatter or a gather at places that only
the data knows what is right whatever these are: bring all of an array to every device.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from realjax.core.arrays import PyTree
from realjax.models.axes import Axes
from realjax.models.partition import Locally
from realjax.parallel.sharding import axes_spec, is_axes


def locally_for(mesh: Mesh) -> Locally:
    """Return `Partition.locally` for a mesh.

    The axes of a dimension must divide it; what the axes do not cut is on every device
    as a whole, and what comes out so must be equal on all of them.

    Args:
        mesh: The mesh of the call.
    """

    def locally(
        function: Callable[..., PyTree], in_axes: tuple[PyTree, ...], out_axes: PyTree
    ) -> Callable[..., PyTree]:
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=specs(in_axes),
            out_specs=specs(out_axes),
            check_vma=False,  # Kernels start their loops from plain zeros.
        )

    def specs(axes: PyTree) -> Any:
        return jax.tree.map(spec, axes, is_leaf=is_axes)

    def spec(axes: Axes) -> PartitionSpec:
        return axes_spec(axes, mesh)

    return locally
