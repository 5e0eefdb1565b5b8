"""Offloading in several processes; see `offload_test.py`."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realjax.realloc.offload import HostCopy

VALUES = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)


def offload_and_reload() -> list[int]:
    """Of arrays over all devices, and in the second process alone.

    Returns:
        How many shards of the second are here: on the host, and back on the devices.
    """
    num_shards = []
    for devices in (jax.devices(), jax.devices()[2:]):
        sharding = NamedSharding(Mesh(np.array(devices), "a"), PartitionSpec("a"))
        x = jax.make_array_from_callback(
            VALUES.shape, sharding, lambda index: VALUES[index], dtype=VALUES.dtype
        )
        copy = HostCopy({"x": x})
        back = copy.reload()["x"]
        host = copy.tree["x"]
        assert host.sharding.memory_kind == "pinned_host"
        assert host.sharding.with_memory_kind("device") == x.sharding == back.sharding
        for array in (host, back):
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, VALUES[shard.index])
        num_shards = [len(a.addressable_shards) for a in (host, back)]
    return num_shards
