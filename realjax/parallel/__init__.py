"""Devices and strategies: allocations, meshes, and the table of shardings.

Read `allocation` first (what one model function call is given), then `mesh` (the
allocation as devices), `sharding` (how parameters and activations lie on them), and
`partition` (what a model is told of it), with `pipeline` and `experts`, the two
strategies that take more than a table.
"""

from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.parallel.sharding import (
    bytes_per_device,
    check_fit,
    constrain_for,
    padded_for,
    parameter_shardings,
    replicated,
    rows_sharding,
)

__all__ = [
    "Allocation",
    "bytes_per_device",
    "check_fit",
    "constrain_for",
    "make_mesh",
    "padded_for",
    "parameter_shardings",
    "partition_for",
    "replicated",
    "rows_sharding",
]
