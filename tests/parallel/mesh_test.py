"""Meshes: devices in the grid of an allocation."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh


def test_tensor_neighbours_are_adjacent_devices():
    mesh = make_mesh(Allocation.parse("d2f2t2@0-7"))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    # Of these, data is the slowest axis, then fsdp, then tensor.
    np.testing.assert_array_equal(ids.squeeze(), [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    assert mesh.axis_names == ("stage", "data", "fsdp", "expert", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 5


def test_mesh_takes_the_devices_the_allocation_names_in_its_order():
    mesh = make_mesh(Allocation.parse("t3@6,2,4"))
    assert [device.id for device in mesh.devices.flat] == [6, 2, 4]


def test_equal_allocations_give_equal_meshes():
    first, second = (make_mesh(Allocation.parse("f4t2")) for _ in range(2))
    assert first == second and hash(first) == hash(second)


def test_too_few_devices_says_how_to_get_virtual_ones():
    with pytest.raises(ValueError, match="device_count=16") as error:
        make_mesh(Allocation.parse("f16"))
    assert "needs device 15 and this machine has 8 cpu devices" in str(error.value)


def test_devices_may_be_given():
    mesh = make_mesh(Allocation.parse("d2@0-1"), jax.devices()[4:])
    assert [device.id for device in mesh.devices.flat] == [4, 5]
