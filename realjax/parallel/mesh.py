"""Meshes: an allocation as devices in a grid."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from realjax.parallel.allocation import Allocation

MESH_AXES = ("stage", "data", "fsdp", "expert", "tensor")
"""The axes of every mesh, slowest first: tensor neighbours are adjacent devices, and
stages, which say least to each other, are farthest apart."""


def make_mesh(
    allocation: Allocation,
    # jax.Device is an assigned name, which basedpyright takes for no type.
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """Arrange the devices of an allocation in the grid of `MESH_AXES`.

    Axis types are Auto: the compiler propagates shardings, and the code constrains
    them where it matters.

    Args:
        allocation: Whose `devices` are indices into the next argument.
        devices: The devices of the machine; `jax.devices()` by default.

    Raises:
        ValueError: the machine has fewer devices than the allocation names.
    """
    devices = jax.devices() if devices is None else devices
    if max(allocation.devices) >= len(devices):
        platform = devices[0].platform if devices else "no"
        needed = max(allocation.devices) + 1
        raise ValueError(
            f"Allocation {allocation} needs device {needed - 1} and this machine has"
            f" {len(devices)} {platform} devices (0 to {len(devices) - 1}). Choose an"
            " allocation that fits, or for virtual CPU devices set JAX_PLATFORMS=cpu"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={needed} before JAX"
            " starts."
        )
    grid = np.array([devices[index] for index in allocation.devices], dtype=object)
    shape = [getattr(allocation, axis) for axis in MESH_AXES]
    return Mesh(
        grid.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def abstract_mesh(allocation: Allocation) -> AbstractMesh:
    """Return the axes of an allocation's mesh without devices, for counting."""
    sizes = tuple(getattr(allocation, axis) for axis in MESH_AXES)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
