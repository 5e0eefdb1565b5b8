"""Tests of `realjax/runtime/given_plans.py` and of `plan` in `run_config.py`."""

import json

import pytest

from realjax.algorithms import sft
from realjax.dataflow.plan import make_plan
from realjax.planner.cluster import Cluster
from realjax.runtime.given_plans import asked, given_plan, mode_of
from realjax.runtime.run_config import RunConfig

GRAPH = sft.graph(sft.SFT())
MACHINE = Cluster.load("8xcpu")


def allocation(config, machine=MACHINE):
    plan = given_plan(config, GRAPH, machine)
    return None if plan is None else str(plan.calls["train_policy"].allocation)


def test_what_is_given_by_hand_is_not_looked_for():
    assert mode_of(RunConfig(), 8) == "search"
    assert mode_of(RunConfig(), 1) == ""
    assert mode_of(RunConfig(allocation="d2"), 8) == ""
    assert mode_of(RunConfig(allocations={"train_policy": "d2"}), 8) == ""
    assert mode_of(RunConfig(allocations={"train_policy": ""}), 8) == "search"
    # Allocations for more devices than there are say nothing.
    eight = RunConfig(allocations={"train_policy": "d8"}, allocations_devices=8)
    assert (mode_of(eight, 8), mode_of(eight, 4)) == ("", "search")
    assert mode_of(RunConfig(plan="search", allocations={"x": "d2"}), 8) == "search"


def test_a_mode_gives_the_plan_or_leaves_it_to_the_planner():
    assert allocation(RunConfig()) is None
    assert allocation(RunConfig(plan="heuristic")) is None
    assert allocation(RunConfig(plan="symmetric")) is None
    assert allocation(RunConfig(plan="symmetric:d4t2")) == "d4t2@0-7"
    assert allocation(RunConfig(plan="f4t2")) == "f4t2@0-7"
    assert allocation(RunConfig(allocation="d2@4-5")) == "d2@4-5"
    by_hand = RunConfig(plan="d8", allocations={"train_policy": "t2@6-7"})
    assert allocation(by_hand) == "t2@6-7"
    assert allocation(RunConfig(), Cluster.load("1xcpu")) == "d1@0"


def test_a_plan_is_read_from_a_file(tmp_path):
    plan = make_plan(
        GRAPH, num_devices=8, allocation="f2@2-3", rows={"train_policy": 4}
    )
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan.as_dict() | {"origin": "search"}))
    config = RunConfig(plan=str(file))
    assert given_plan(config, GRAPH, MACHINE) == plan
    on_top = RunConfig(plan=str(file), allocations={"train_policy": "d4"})
    assert allocation(on_top) == "d4@0-3"
    with pytest.raises(ValueError, match=r"plan\.json: .*there are 2 devices"):
        given_plan(config, GRAPH, Cluster.load("2xcpu"))
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.plan, .*plan\.json"):
        given_plan(config, GRAPH, MACHINE)
    with pytest.raises(FileNotFoundError, match=r"leaves its plan in plan\.json"):
        given_plan(RunConfig(plan="no.json"), GRAPH, MACHINE)


def test_a_text_that_says_no_plan_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'search'"):
        RunConfig(plan="serach")
    with pytest.raises(ValueError, match="as in d4t2"):
        RunConfig(plan="symmetric:q4")
    with pytest.raises(ValueError, match="Leave one of them out"):
        RunConfig(plan="search", allocation="d8")
    with pytest.raises(ValueError, match="does not have"):
        allocation(RunConfig(plan="search", allocations={"train": "d8"}))


def test_a_plan_answers_what_was_asked_and_nothing_else():
    config = RunConfig(steps=3)
    assert asked(config, 8) == asked(RunConfig(steps=9, seed=4), 8)
    assert asked(config, 8) != asked(config, 4)
    assert asked(config, 8) != asked(RunConfig(plan="search"), 8)
    assert asked(config, 8) != asked(RunConfig(memory_gib=1.0), 8)
    json.dumps(asked(config, 8))
