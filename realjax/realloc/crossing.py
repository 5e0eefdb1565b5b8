"""Arrays that lie, or shall lie, on devices of several processes."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from realjax.core.arrays import Array


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
