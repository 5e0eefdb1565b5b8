"""Hosts say which devices share one, the same in every process."""

import dataclasses

import numpy as np
import pytest

from realjax.realloc.hosts import Hosts


@dataclasses.dataclass
class Device:
    id: int
    process_index: int


def test_uniform_hosts_take_devices_in_the_order_of_their_ids():
    found = Hosts.uniform(4).of_devices(np.array([[0, 3], [4, 11]]))
    assert found.tolist() == [[0, 0], [1, 2]]
    assert Hosts.uniform(4).of_device(7) == 1


def test_the_host_of_a_jax_device_is_its_process():
    # Two CPU processes of two devices: ids do not follow each other.
    devices = [Device(131073, 1), Device(0, 0), Device(131072, 1), Device(1, 0)]
    hosts = Hosts.of(devices)
    assert hosts.of_devices(np.array([1, 131072, 131073, 0])).tolist() == [0, 1, 1, 0]
    # The order in which devices are listed does not matter.
    assert hosts == Hosts.of(reversed(devices))
    assert hash(hosts) == hash(Hosts.of(reversed(devices)))


def test_a_device_that_the_table_lacks_is_named():
    with pytest.raises(ValueError, match=r"No host is known for devices \[2\]"):
        Hosts(table=((0, 0), (1, 0), (5, 1))).of_devices(np.array([1, 2, 5]))


def test_hosts_are_told_in_one_way():
    with pytest.raises(ValueError, match="Give one of the two"):
        Hosts()
    with pytest.raises(ValueError, match="Give one of the two"):
        Hosts(devices_per_host=2, table=((0, 0),))
    with pytest.raises(ValueError, match="at least one"):
        Hosts.uniform(0)
    with pytest.raises(ValueError, match="by rising id"):
        Hosts(table=((1, 0), (0, 0)))
