"""Devices and strategies: allocations, meshes, and the table of shardings.

Read `allocation` first (what one model function call is given), then `mesh` (the
allocation as devices), then `sharding` (how parameters and activations lie on them).
"""

from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import (
    bytes_per_device,
    check_fit,
    constrain_for,
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
    "parameter_shardings",
    "replicated",
    "rows_sharding",
]
