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
from realjax.functions import Infer, Train

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


def test_an_offloaded_role_comes_back_for_its_call_and_leaves_after_it():
    plan = make_plan(GRAPH, num_devices=8)
    steps = make_schedule(GRAPH, plan, FLOAT, offloaded=("reference", "reward"))
    for role in ("reference", "reward"):
        mine = [
            type(s)
            for s in steps
            if getattr(s, "role", None) == role or getattr(s, "call", None) == role
        ]
        assert mine == [Reload, Run, Offload]


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
