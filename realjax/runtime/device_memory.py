"""The memory of a run's devices."""

import jax

from realjax.dataflow.account import GIB
from realjax.runtime.agreement import Agreement
from realjax.runtime.run_config import RunConfig


def device_bytes(config: RunConfig) -> int:
    """Memory of a device: what the config says, or the device; 0 if neither knows.

    Of several processes, the least that one of them has: a plan and its schedule depend
    on it, and all must follow the same one.
    """
    if config.memory_gib:
        return int(config.memory_gib * GIB)
    own = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [int(stats.get("bytes_limit", 0)) for stats in own]
    found = Agreement("memory of a device").gather(lambda: min(limits))
    return min(found)
