"""Tests of `realjax/planner/cluster.py`: machines whose devices take turns."""

import dataclasses
import os

import pytest

from realjax.planner.cluster import Cluster


def test_virtual_devices_share_the_cores_of_the_process():
    found = Cluster.detect()
    assert found.num_devices == 8
    assert found.device.kind == "cpu"
    assert found.concurrent_devices == len(os.sched_getaffinity(0))
    assert found.is_serial
    assert Cluster.from_dict(found.as_dict()) == found


def test_devices_of_other_machines_run_all_at_once():
    for text in ("8xh100", "4x8xh100", "8xcpu"):
        found = Cluster.load(text)
        assert not found.is_serial
        assert found.turns(8) == found.turns(1) == 1.0


def test_turns_are_those_of_the_devices_of_a_node():
    # Eight devices on three cores; of two nodes each has its own.
    found = dataclasses.replace(Cluster.load("2x8xcpu"), concurrent_devices=3)
    assert [found.turns(n) for n in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert found.turns(4) == pytest.approx(4 / 3)
    assert found.turns(8) == found.turns(16) == pytest.approx(8 / 3)
    with pytest.raises(ValueError, match="concurrent_devices is -1"):
        dataclasses.replace(found, concurrent_devices=-1)
