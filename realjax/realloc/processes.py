"""Which process has which devices, and arrays that lie in other processes."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from realjax.core.arrays import Array
from realjax.realloc.hosts import Hosts


def handle(shape: Sequence[int], dtype: Any, sharding: Sharding) -> Array:
    """Return an array none of whose shards is here: its name in this process.

    It can be passed on like any other, to calls on its mesh and to `reallocate`.

    Raises:
        ValueError: if the sharding has devices of this process.
    """
    if sharding.addressable_devices:
        raise ValueError(
            f"{sharding} has devices of process {jax.process_index()}. Only arrays of"
            " other processes have handles; make this one from its shards."
        )
    return jax.make_array_from_single_device_arrays(
        tuple(shape), sharding, [], dtype=dtype
    )


def processes_of(*shardings: Sharding) -> set[int]:
    """Return the processes whose devices the shardings have."""
    return set().union(*map(_processes, shardings))


@functools.cache
def hosts() -> Hosts:
    """Return the process of every device."""
    return Hosts.of(jax.devices())


@functools.cache
def _devices() -> dict[int, Any]:
    return {device.id: device for device in jax.devices()}


@functools.cache
def home(device: int) -> SingleDeviceSharding:
    """Return the place of arrays on one device, of whichever process."""
    return SingleDeviceSharding(_devices()[device])


def process_of(device: int) -> int:
    """Return the process of a device."""
    return _devices()[device].process_index


def is_ours(device: int) -> bool:
    """Tell whether a device is one of this process."""
    return process_of(device) == jax.process_index()


def is_counted_by_all() -> bool:
    """Tell whether processes count the copies of others as well.

    Where the backend has no copies between processes of its own, JAX goes through
    sockets, and tells copies apart by how many a process has issued.
    """
    return jax.devices()[0].platform == "cpu"


@functools.lru_cache(maxsize=8192)
def _processes(sharding: Sharding) -> frozenset[int]:
    return frozenset(device.process_index for device in sharding.device_set)
