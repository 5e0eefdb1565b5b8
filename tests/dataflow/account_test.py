"""Tests of `realjax/dataflow/account.py`."""

import numpy as np
import pytest

from realjax.algorithms import ppo
from realjax.dataflow import DataflowGraph, call
from realjax.dataflow.account import GIB, DoesNotFitError, Sizes, account
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import home_places, make_schedule, place_of
from realjax.functions import Infer

GRAPH = ppo.graph(ppo.PPO())
FLOAT = dict.fromkeys(GRAPH.roles, "float32")


def sizes_of(plan, graph, *, part=10, copy=4, working=3, batch=0, streamed=()):
    copies = {}
    for name, node in graph.calls.items():
        if node.role is not None:
            key = node.role, place_of(graph, plan, FLOAT, name).key
            copies[key] = copy * GIB
    return Sizes(
        parts={
            (role, what): part * GIB
            for role in graph.roles
            for what in ("parameters", "optimizer")
        },
        copies=copies,
        moving=dict.fromkeys(copies, GIB),
        working=dict.fromkeys(plan.calls, working * GIB),
        batch=dict.fromkeys(plan.calls, batch * GIB),
        streamed=frozenset(streamed),
    )


def account_of(plan, *, graph=GRAPH, limit=0, **sizes):
    steps = make_schedule(graph, plan, FLOAT)
    homes = home_places(graph, plan, FLOAT)
    found = sizes_of(plan, graph, **sizes)
    return account(steps, graph, plan, homes, found, limit_bytes=limit * GIB)


def gib(values):
    return (np.asarray(values) / GIB).tolist()


def test_what_roles_keep_a_copy_and_a_call_add_up_to_the_peak():
    # 0-3: policy and critic keep 20 each, reward and reference 10: 60. The rollout on
    # 4-7 takes a copy of 4, and pieces of 1 at both ends while it moves; a call has 3.
    plan = make_plan(
        GRAPH, num_devices=8, allocation="d4@0-3", allocations={"rollout": "t4@4-7"}
    )
    found = account_of(plan)
    assert found.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert gib(found.peak_bytes) == [63, 7]
    by_step = {str(m.step): gib(m.device_bytes) for m in found.moments}
    assert by_step["Move policy → t4@4-7 float32"] == [61, 5]
    assert by_step["Run rollout"] == [60, 7]
    assert by_step["Run reward"] == [63, 0]
    assert gib(found.resting_bytes) == [60, 0]


def test_what_waits_on_the_host_counts_there_and_its_copy_stays():
    plan = make_plan(GRAPH, num_devices=2, offloaded=("reference", "policy"))
    found = account_of(plan)
    assert gib(found.resting_bytes) == [30]
    assert gib(found.resting_host_bytes) == [30]
    by_step = {str(m.step): gib(m.host_bytes) for m in found.moments}
    assert by_step["Run reference"] == [30]
    # The update makes the copies of the old masters and moments worthless.
    assert by_step["Offload policy optimizer"] == [20]
    assert by_step["Offload policy parameters"] == [30]


def test_a_host_copy_of_what_no_call_changes_serves_every_step():
    infer = Infer(output="scores")
    graph = DataflowGraph(
        one=call("reward", infer, scores="a"),
        two=call("reference", infer, scores="b"),
        three=call("reward", infer, scores="c"),
    )
    # Its last call keeps reward on the device; the copy made in between stays, too.
    plan = make_plan(graph, num_devices=1, allocations={"one": "d1+offload"})
    found = account_of(plan, graph=graph)
    assert gib(found.resting_bytes) == [20]
    assert gib(found.resting_host_bytes) == [10]
    assert gib(found.moments[0].host_bytes) == [10]


def test_groups_of_devices_that_lie_between_each_other_have_names_of_their_own():
    places = {"rollout": "d2@0,3", "reward": "d3@1,2,5"}
    plan = make_plan(GRAPH, num_devices=6, allocation="d1@4", allocations=places)
    heads = account_of(plan).table().splitlines()[0]
    assert heads.split("  device ")[1:] == ["0, 3", "1, 2 … 5", "4  host"]


def test_keys_of_the_batch_stay_until_the_step_ends():
    plan = make_plan(GRAPH, num_devices=1)
    found = account_of(plan, batch=2, working=0)
    assert gib(found.peak_bytes) == [60 + 2 * len(plan.calls)]
    assert gib(found.resting_bytes) == [60]


def test_streamed_moments_take_no_device_memory():
    plan = make_plan(GRAPH, num_devices=1)
    found = account_of(plan, streamed=("policy", "critic"))
    assert gib(found.resting_bytes) == [40]
    assert gib(found.resting_host_bytes) == [20]


def test_a_plan_that_does_not_fit_is_refused_with_the_table():
    plan = make_plan(
        GRAPH, num_devices=8, allocation="d4@0-3", allocations={"rollout": "t4@4-7"}
    )
    account_of(plan, limit=63).check()
    with pytest.raises(DoesNotFitError) as error:
        account_of(plan, limit=62).check()
    text = str(error.value)
    assert "needs 63.00 GiB on device 0 and it has 62.00" in text
    assert "policy optimizer 10.00" in text and "reward 3.00" in text
    lines = text.splitlines()
    assert lines[1].split() == ["step", "device", "0–3", "device", "4–7", "host"]
    (rollout,) = [line for line in lines if line.startswith("Run rollout")]
    assert rollout.split() == ["Run", "rollout", "60.00", "7.00", "◀", "0.00"]


def test_devices_that_are_treated_alike_are_one_group():
    plan = make_plan(
        GRAPH, num_devices=4096, allocations={"rollout": "d2048@2048-4095"}
    )
    assert [len(group) for group in account_of(plan).groups] == [2048, 2048]
