"""Tests of `realjax/planner/strategies.py` and `cluster.py`."""

import dataclasses
import itertools
import json
import math

import pytest

from realjax.models.families import llama
from realjax.planner.cluster import Cluster
from realjax.planner.strategies import factorizations, range_sizes, ranges, strategies


def test_ranges_are_within_each_other_or_apart():
    for name in ("8xh100", "4x8xh100", "3x4xa100"):
        cluster = Cluster.load(name)
        found = [set(range(start, start + size)) for start, size in ranges(cluster)]
        for one, other in itertools.combinations(found, 2):
            assert one <= other or other <= one or not one & other
        assert max(map(len, found)) == cluster.num_devices


def test_sizes_of_ranges_are_powers_of_two_of_a_node_and_of_nodes():
    assert range_sizes(Cluster.load("4x8xh100")) == (1, 2, 4, 8, 16, 32)
    # All there is, whatever it is.
    assert range_sizes(Cluster.load("3x8xh100")) == (1, 2, 4, 8, 16, 24)
    # One of 8, two of 4, four of 2 and eight of 1.
    assert len(ranges(Cluster.load("8xh100"))) == 15


def test_factorizations_multiply_to_the_number_and_are_all_there_are():
    for number, count in ((1, 3), (12, 2), (8, 5)):
        found = list(factorizations(number, count))
        assert len(set(found)) == len(found)
        assert all(math.prod(one) == number for one in found)
        brute = itertools.product(range(1, number + 1), repeat=count)
        assert len(found) == sum(math.prod(one) == number for one in brute)


def test_strategies_keep_to_what_model_and_machine_allow():
    model, cluster = llama.size("3.1-8b"), Cluster.load("2x8xh100")
    found = list(strategies(16, model, cluster, num_rows=8))
    assert len({a.strategy for a in found}) == len(found)
    for allocation in found:
        assert allocation.size == 16
        assert allocation.tensor <= 8  # Within a node.
        assert allocation.num_row_shards <= 8
        assert allocation.expert == 1  # The model has none.
    assert any(a.stage > 1 for a in found)
    generating = strategies(16, model, cluster, num_rows=8, is_generating=True)
    assert all(a.stage == 1 for a in generating)


def test_clusters_are_read_from_names_files_and_themselves(tmp_path):
    cluster = Cluster.load("4x8xh100")
    assert (cluster.num_nodes, cluster.devices_per_node) == (4, 8)
    assert cluster.device.memory_bytes == 80e9
    assert Cluster.load("h200").num_devices == 1
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(cluster.as_dict()))
    assert Cluster.load(str(path)) == cluster
    path.write_text(json.dumps({"device": "a100", "devices_per_node": 4}))
    assert Cluster.load(str(path)) == Cluster.load("4xa100")
    here = Cluster.detect()
    assert (here.num_devices, here.device.kind) == (8, "cpu")


def test_what_is_no_cluster_is_said():
    with pytest.raises(ValueError, match=r"'8xh800' is no cluster.*4x8xh100"):
        Cluster.load("8xh800")
    with pytest.raises(ValueError, match=r"no 'nodes'.*num_nodes"):
        Cluster.from_dict({"device": "h100", "nodes": 2})
    with pytest.raises(ValueError, match="num_nodes is 0; it must be at least 1"):
        dataclasses.replace(Cluster.load("h100"), num_nodes=0)
