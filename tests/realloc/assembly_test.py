"""The steps of a reallocation in pieces, without running them."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realjax.realloc.assembly import plan_moves
from realjax.realloc.requests import Request


def sharding(order, shape, axes, spec) -> NamedSharding:
    devices = np.array([jax.devices()[place] for place in order])
    return NamedSharding(Mesh(devices.reshape(shape), axes), PartitionSpec(*spec))


def test_programs_have_their_devices_in_rising_order():
    # In a set, or in the order of either mesh, they would be others in every process or
    # for every pair, and programs would be compiled again.
    source = sharding([6, 2, 7, 1, 0, 3, 5, 4], (4, 2), ("a", "b"), ("b", "a"))
    destination = sharding([3, 7, 0, 2, 5, 6, 1, 4], (8,), ("c",), ("c",))
    float32, bfloat16 = np.dtype(np.float32), np.dtype(jax.numpy.bfloat16)
    request = Request(source, destination, (16, 16), float32, bfloat16)
    (move,) = plan_moves([request], parcel_bytes=1 << 20)
    programs = [*move.cuts, *move.joins]
    assert programs
    for program in programs:
        found = [device.id for device in program.mesh.devices.flat]
        assert found == sorted(found)
    # All destinations make a shard; what is alike is one program.
    made = [device for join in move.joins for device in join.devices]
    assert sorted(made) == list(range(8))
