"""Tests of `realjax/dataflow/schedule.py`."""

import pytest

from realjax.algorithms import ppo
from realjax.dataflow import DataflowGraph, call
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import (
    Move,
    Offload,
    Release,
    Reload,
    Run,
    home_places,
    make_schedule,
)
from realjax.functions import Follow, Infer, Train

GRAPH = ppo.graph(ppo.PPO())
FLOAT = dict.fromkeys(GRAPH.roles, "float32")


def names(steps):
    return [
        f"{type(s).__name__} {s.call if isinstance(s, Run) else s.role}" for s in steps
    ]


def test_one_allocation_and_one_type_need_no_move():
    plan = make_plan(GRAPH, num_devices=8)
    assert all(isinstance(s, Run) for s in make_schedule(GRAPH, plan, FLOAT))


def test_a_call_elsewhere_gets_a_copy_just_before_it_and_loses_it_after():
    plan = make_plan(GRAPH, num_devices=8, allocations={"rollout": "t4"})
    steps = names(make_schedule(GRAPH, plan, FLOAT))
    assert steps[:3] == ["Move policy", "Run rollout", "Release policy"]
    assert not any(s.startswith(("Move", "Release")) for s in steps[3:])


def test_generation_in_bfloat16_moves_a_narrower_copy_even_in_place():
    plan = make_plan(GRAPH, num_devices=8)
    dtypes = dict.fromkeys(GRAPH.roles, "bfloat16")
    moves = [s for s in make_schedule(GRAPH, plan, dtypes) if isinstance(s, Move)]
    # Policy for rollout and critic for values; masters stay float32 where they train.
    assert [(m.role, m.place.dtype) for m in moves] == [
        ("policy", "bfloat16"),
        ("critic", "bfloat16"),
    ]
    homes = home_places(GRAPH, plan, dtypes)
    assert homes["policy"].dtype == "float32"
    assert homes["reference"].dtype == "bfloat16"


def plan_of(graph=GRAPH, offloaded=(), **allocations):
    return make_plan(graph, num_devices=8, allocations=allocations, offloaded=offloaded)


def test_an_offloaded_role_comes_back_for_its_call_and_leaves_after_it():
    plan = plan_of(offloaded=("reference", "reward"))
    steps = make_schedule(GRAPH, plan, FLOAT)
    for role in ("reference", "reward"):
        mine = [
            type(s)
            for s in steps
            if getattr(s, "role", None) == role or getattr(s, "call", None) == role
        ]
        assert mine == [Reload, Run, Offload]


def test_copies_are_issued_one_call_ahead_where_memory_is_not_known():
    plan = plan_of(offloaded=("reference", "reward"), rollout="t4")
    steps = names(make_schedule(GRAPH, plan, FLOAT))
    assert steps[:7] == [
        "Move policy",
        "Reload reward",
        "Run rollout",
        "Release policy",
        "Reload reference",
        "Run reward",
        "Offload reward",
    ]


def test_copies_are_issued_as_early_as_memory_allows_in_the_order_of_use():
    plan = plan_of(offloaded=("reference", "reward"), rollout="t4")
    steps = names(make_schedule(GRAPH, plan, FLOAT, fits=lambda _: True))
    assert steps[:4] == [
        "Move policy",
        "Reload reward",
        "Reload reference",
        "Run rollout",
    ]


def test_a_reload_waits_for_the_memory_that_another_role_leaves():
    # Not both roles at the same time: reference comes when reward has gone.
    plan = plan_of(offloaded=("reference", "reward"))
    present = {"reward", "reference"}

    def fits(steps):
        here = set()
        for step in steps:
            if isinstance(step, Reload):
                here.add(step.role)
            elif isinstance(step, Offload):
                here.discard(step.role)
            if here == present:
                return False
        return True

    steps = names(make_schedule(GRAPH, plan, FLOAT, fits=fits))
    assert steps[:5] == [
        "Reload reward",
        "Run rollout",
        "Run reward",
        "Offload reward",
        "Reload reference",
    ]


def test_masters_that_rest_on_the_host_come_back_for_a_copy_and_for_training():
    plan = plan_of(offloaded=("policy",), rollout="t4@0-3")
    steps = [s for s in make_schedule(GRAPH, plan, FLOAT) if "policy" in str(s)]
    assert [str(s) for s in steps] == [
        "Reload policy parameters",
        "Move policy → t4@0-3+offload float32",
        # The masters are not needed while the copy generates.
        "Offload policy parameters",
        "Release policy t4@0-3+offload float32",
        "Reload policy parameters",
        "Reload policy optimizer",
        "Run train_policy",
        "Offload policy optimizer",
        "Offload policy parameters",
    ]


def test_what_would_leave_and_come_back_at_once_stays_where_there_is_room():
    plan = plan_of(offloaded=("policy",), rollout="t4@0-3")
    steps = make_schedule(GRAPH, plan, FLOAT, fits=lambda _: True)
    policy = [s for s in steps if isinstance(s, Offload | Reload)]
    assert [str(s) for s in policy] == [
        "Reload policy parameters",
        "Reload policy optimizer",
        "Offload policy optimizer",
        "Offload policy parameters",
    ]


def test_moments_that_are_streamed_do_not_move():
    plan = plan_of(offloaded=("policy",))
    steps = make_schedule(GRAPH, plan, FLOAT, streamed=("policy",))
    parts = {s.part for s in steps if isinstance(s, Reload | Offload)}
    assert parts == {"parameters"}


def test_one_call_alone_can_offload():
    # The critic stays for its training, which is on the same devices, and goes then.
    plan = plan_of(train_critic="d8+offload")
    steps = [str(s) for s in make_schedule(GRAPH, plan, FLOAT) if "critic" in str(s)]
    assert steps == [
        "Reload critic parameters",
        "Reload critic optimizer",
        "Run train_critic",
        "Offload critic optimizer",
        "Offload critic parameters",
    ]


def follows(weight=0.001):
    return call("reference", Follow(source="policy", weight=weight))


def test_what_follows_a_role_runs_after_its_training_and_keeps_float32():
    graph = DataflowGraph(**GRAPH.calls, follow=follows())
    assert graph.order()[-1] == "follow"
    assert graph.changed_roles == ("policy", "reference", "critic")
    plan, dtypes = plan_of(graph), dict.fromkeys(graph.roles, "bfloat16")
    assert home_places(graph, plan, dtypes)["reference"].dtype == "float32"
    steps = make_schedule(graph, plan, dtypes)
    assert "Move reference" in names(steps)
    # An evaluation changes no role.
    assert "follow" not in str(make_schedule(graph, plan, dtypes, is_training=False))


def test_a_leader_stays_on_its_devices_until_it_was_followed():
    graph = DataflowGraph(**GRAPH.calls, follow=follows())
    plan = plan_of(graph, offloaded=("policy", "reference"))
    steps = [str(s) for s in make_schedule(graph, plan, FLOAT)]
    tail = steps[steps.index("Run train_policy") :]
    assert "Reload policy parameters" not in tail
    assert tail.index("Run follow") < tail.index("Offload policy parameters")


@pytest.mark.parametrize("source", ("reward", "nobody", "reference"))
def test_only_a_trained_role_can_be_followed(source):
    with pytest.raises(ValueError, match=f"lets 'reference' follow '{source}'"):
        DataflowGraph(
            **GRAPH.calls, follow=call("reference", Follow(source=source, weight=0.1))
        )


def test_versions_count_the_changes_before_a_call():
    graph = DataflowGraph(**GRAPH.calls, follow=follows())
    steps = make_schedule(graph, plan_of(graph), FLOAT)
    versions = {s.call: s.version for s in steps if isinstance(s, Run)}
    assert set(versions.values()) == {0}  # One change a step, by the last call.


def test_every_pass_ends_where_it_began():
    plan = plan_of(offloaded=("critic", "reference"), value="f8")
    for is_training in (True, False):
        here = after(
            {"policy", "reward"},
            make_schedule(
                GRAPH, plan, FLOAT, is_training=is_training, without=("train_policy",)
            ),
        )
        assert here == {"policy", "reward"}


def after(roles, steps, part="parameters"):
    """Which roles have a part on their devices after a pass."""
    here = set(roles)
    for step in steps:
        if isinstance(step, Reload) and step.part == part:
            here.add(step.role)
        elif isinstance(step, Offload) and step.part == part:
            here.remove(step.role)
    return here


@pytest.mark.parametrize("part", ("parameters", "optimizer"))
def test_an_evaluation_brings_back_what_only_an_earlier_call_offloads(part):
    # The rollout sends the masters away; their training, which would bring them back
    # and keep them, is no part of an evaluation.
    plan = plan_of(rollout="d8+offload")
    for trains in (True, False):
        steps = make_schedule(
            GRAPH,
            plan,
            FLOAT,
            is_training=trains,
            without=() if trains else ("train_policy", "train_critic"),
        )
        assert any(isinstance(step, Offload) for step in steps)
        assert after(GRAPH.roles, steps, part) == set(GRAPH.roles)


def test_a_role_whose_last_call_finds_its_copy_still_comes_back_home():
    infer = Infer(output="scores")
    graph = DataflowGraph(
        home=call("reward", infer, scores="a"),
        copy=call("reward", infer, scores="b"),
        leave=call("reward", infer, scores="c"),
        again=call("reward", infer, scores="d"),
    )
    places = {"copy": "d4", "leave": "d8+offload", "again": "d4"}
    plan = make_plan(graph, num_devices=8, allocations=places)
    steps = make_schedule(graph, plan, {"reward": "float32"})
    assert after({"reward"}, steps) == {"reward"}


def test_a_copy_that_two_calls_share_is_moved_once_and_dropped_after_the_second():
    infer = Infer(output="scores")
    graph = DataflowGraph(
        a=call("reward", infer, scores="a"),
        b=call("reward", infer, scores="b"),
        train=call("reward", Train(loss=max, output="scores", reads=("a", "b"))),
    )
    plan = make_plan(graph, num_devices=8, allocations={"a": "d4", "b": "d4"})
    steps = make_schedule(graph, plan, {"reward": "float32"})
    assert names(steps) == [
        "Move reward",
        "Run a",
        "Run b",
        "Release reward",
        "Run train",
    ]
    assert isinstance(steps[3], Release)


def test_two_calls_that_train_one_role_are_refused():
    train = Train(loss=max, reads=("tokens",))
    graph = DataflowGraph(a=call("policy", train), b=call("policy", train))
    with pytest.raises(ValueError, match="both train 'policy'"):
        make_schedule(graph, make_plan(graph, num_devices=1), {"policy": "float32"})
