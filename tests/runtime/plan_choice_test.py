"""Tests of `realjax/runtime/plan_choice.py`: plans found for PPO on four devices."""

import dataclasses
import json

import pytest

from realjax.algorithms import ppo
from realjax.functions.role import Role, RoleConfig
from realjax.models.families import llama
from realjax.parallel.allocation import Allocation
from realjax.planner.cluster import Cluster
from realjax.planner.memory import Work, memory_account
from realjax.rl import Sampling
from realjax.runtime import plan_choice
from realjax.runtime.given_plans import asked
from realjax.runtime.plan_choice import (
    Chosen,
    Setting,
    choose_plan,
    lengths_of,
    padded_roles,
)
from realjax.runtime.run_config import RunConfig

GIB = 2**30


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    """What is found here is found early."""
    monkeypatch.setattr(plan_choice, "MOVES", 192)


def setting(cluster="4xh100", limit_gib=80.0):
    graph = ppo.graph(ppo.PPO(sampling=Sampling(max_new_tokens=128), minibatches=2))
    roles = {
        name: Role(
            name=name,
            config=RoleConfig(),
            model=dataclasses.replace(
                llama.size("3.2-1b"),
                head="scalar" if name in ("reward", "critic") else "language",
            ),
            eos_ids=(2,),
            dtype="bfloat16",
            is_trained=name in graph.trained_roles,
        )
        for name in graph.roles
    }
    work = Work(num_rows=32, width=256, prompt_width=128)
    return Setting(
        graph=graph,
        roles=roles,
        work=work,
        lengths=lengths_of(RunConfig(), graph, 100.0, work),
        cluster=Cluster.load(cluster),
        limit_bytes=int(limit_gib * GIB),
    )


def peak_bytes(setting, plan):
    roles = padded_roles(setting.roles, setting.graph, plan)
    found = memory_account(
        setting.graph, plan, roles, setting.work, limit_bytes=setting.limit_bytes
    )
    return found.peak_bytes.max()


def test_the_search_is_no_slower_than_one_strategy_and_its_plan_fits():
    here, told = setting(), []
    found = choose_plan(RunConfig(), here, tell=told.append)
    assert found.symmetric is not None
    strategy, seconds = found.symmetric
    assert found.step_seconds <= seconds
    assert set(found.call_seconds) == set(here.graph.calls) - {"advantages"}
    assert peak_bytes(here, found.plan) <= here.limit_bytes
    assert "plans on 1x4xh100" in told[0]
    assert f"({seconds:.4f} s with {strategy} for every call)" in found.summary()
    # The same question has the same answer.
    assert choose_plan(RunConfig(), here) == found
    # A strategy by name is expected to take what the search says it would.
    same = choose_plan(RunConfig(plan="symmetric"), here)
    assert same.step_seconds == pytest.approx(seconds)
    assert {a.allocation.strategy for a in same.plan.calls.values()} == {strategy}


def test_calls_are_planned_around_those_that_are_given():
    config = RunConfig(
        plan="search", allocations={"rollout": "t2@2-3", "value": "d1@1"}
    )
    found = choose_plan(config, setting())
    assert found.plan.calls["rollout"].allocation == Allocation.parse("t2@2-3")
    assert found.plan.calls["value"].allocation == Allocation.parse("d1@1")


def test_a_plan_that_was_found_is_kept_while_the_question_is_the_same():
    here, config = setting(), RunConfig(plan="heuristic")
    first = choose_plan(config, here)
    kept = json.loads(json.dumps(first.as_dict() | {"asked": asked(config, 4)}))
    kept["calls"]["rollout"]["allocation"] = "t2@0-1"  # As nobody would find it.
    again = choose_plan(config, here, kept=kept)
    assert str(again.plan.calls["rollout"].allocation) == "t2@0-1"
    assert again.origin == "heuristic, as before"
    assert choose_plan(RunConfig(plan="symmetric"), here, kept=kept) != again
    by_hand = choose_plan(RunConfig(plan="d4"), here, kept=kept)
    assert by_hand.origin == "d4"


def test_a_choice_survives_json():
    found = choose_plan(RunConfig(plan="d4"), setting())
    values = json.loads(json.dumps(found.as_dict()))
    assert Chosen.from_dict(setting().graph, values, num_devices=4) == found
    assert all(seconds > 0 for seconds in found.call_seconds.values())


def test_memory_that_is_too_little_is_refused_with_the_call_the_bytes_and_a_remedy():
    with pytest.raises(ValueError, match=r"Call '.*' fits no devices") as caught:
        choose_plan(RunConfig(), setting(limit_gib=6.0))
    message, advice = str(caught.value).split("\n")
    assert "GiB of each device's 6.0" in message
    # Tried, and so.
    assert advice == "A plan fits with config.roles.policy.optimizer.offload=True."
