"""Graphs with a call that runs a step ahead: what they say, refuse and schedule."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest

from realjax.algorithms import (
    distillation,
    grpo,
    online_dpo,
    ppo,
    raft,
    reinforce_pp,
    remax,
    rloo,
    sft,
)
from realjax.dataflow import DataflowGraph, call
from realjax.dataflow.account import account
from realjax.dataflow.draw import graph_svg, graph_text
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import Run, home_places, make_schedule
from realjax.functions import Generate, Infer
from realjax.functions.function import Delivery
from tests.dataflow.account_test import gib, sizes_of

PLAIN = ppo.graph(ppo.PPO())
FLOAT = dict.fromkeys(PLAIN.roles, "float32")


def ahead(graph):
    """The same, its calls that generate a step ahead."""
    return DataflowGraph(
        **{
            name: dataclasses.replace(node, staleness=1)
            if isinstance(node.function, Generate)
            else node
            for name, node in graph.calls.items()
        }
    )


GRAPH = ahead(PLAIN)


def plan_of(rollout="t4@0-3", rest="d4@4-7", graph=GRAPH, **changes):
    return make_plan(
        graph,
        num_devices=8,
        allocation=rest,
        allocations={"rollout": rollout},
        **changes,
    )


def steps_of(plan, graph=GRAPH, **options):
    return [str(step) for step in make_schedule(graph, plan, FLOAT, **options)]


# -- what a graph says -------------------------------------------------------------


def test_only_what_is_asked_for_runs_a_step_ahead():
    assert PLAIN.stale_calls == grpo.graph(grpo.GRPO()).stale_calls == ()
    assert GRAPH.stale_calls == ("rollout",)
    # Who reads from whom is the same: the keys pass a step later.
    assert GRAPH.levels() == PLAIN.levels()


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        (distillation, {"is_on_policy": True}),
        (online_dpo, {}),
        *((a, {}) for a in (grpo, ppo, raft, reinforce_pp, remax, rloo)),
    ],
)
def test_whatever_samples_its_own_completions_can_do_so_a_step_ahead(
    algorithm, changes
):
    for staleness in (0, 1):
        hp = algorithm.HYPERPARAMETERS(staleness=staleness, **changes)
        found = algorithm.graph(hp)
        generating = [
            name
            for name, node in found.calls.items()
            if isinstance(node.function, Generate)
        ]
        assert list(found.stale_calls) == generating * staleness
        assert generating


def test_the_drawings_say_that_keys_come_one_step_later():
    lines = graph_text(GRAPH).splitlines()
    assert [line for line in lines if line.endswith("one step later")] == lines[:1]
    root = ElementTree.fromstring(graph_svg(GRAPH, plan_of()))
    paths = list(root.iter("{http://www.w3.org/2000/svg}path"))
    later = [path for path in paths if "one step later" in "".join(path.itertext())]
    dashed = [path for path in paths if path.get("stroke-dasharray")]
    # From the rollout to reward, reference, value, advantages and both trainings.
    assert len(dashed) == 6
    assert dashed == later
    assert "one step later" not in graph_svg(PLAIN)


def test_a_staleness_that_no_call_has_is_refused():
    with pytest.raises(ValueError, match="staleness is 2"):
        call("policy", Generate(), staleness=2)
    with pytest.raises(ValueError, match="1 for a call that is a Infer"):
        call("reference", Infer(), staleness=1)
    for delivery in (Delivery(portions=2), Delivery(token_budget=9, num_carried=1)):
        with pytest.raises(ValueError, match="set token_budget to 0 and portions to 1"):
            call("policy", Generate(delivery=delivery), staleness=1)


def test_a_call_ahead_reads_the_data_set_alone():
    chosen = Infer(reads=("prompts",), writes=("chosen",))
    graph = {
        "choose": call("reward", chosen),
        "rollout": call("policy", Generate(), staleness=1, prompts="chosen"),
    }
    with pytest.raises(ValueError, match="'chosen', which call 'choose' makes"):
        DataflowGraph(**graph)


def test_calls_that_generate_run_ahead_together_or_not_at_all():
    graph = remax.graph(remax.ReMax())
    assert ahead(graph).stale_calls == ("rollout", "baseline")
    mixed = graph.calls | {
        "rollout": dataclasses.replace(graph.calls["rollout"], staleness=1)
    }
    with pytest.raises(ValueError, match="call 'baseline' in its own step"):
        DataflowGraph(**mixed)


# -- schedules ---------------------------------------------------------------------


def test_beside_the_training_it_comes_last_with_a_copy_made_before():
    steps = steps_of(plan_of())
    move, run = "Move policy → t4@0-3 float32", "Run rollout"
    assert steps[-2:] == [run, "Release policy t4@0-3 float32"]
    assert steps.index(move) < steps.index("Run train_policy") < steps.index(run)
    versions = {
        step.call: step.version
        for step in make_schedule(GRAPH, plan_of(), FLOAT)
        if isinstance(step, Run)
    }
    # As it was when the step began, though it was trained by then.
    assert versions["rollout"] == 0
    early = steps_of(plan_of(), fits=lambda _: True)
    assert early[0] == move


@pytest.mark.parametrize("rollout", ["d4@4-7", "t8@0-7"])
def test_on_devices_of_the_training_it_comes_first_as_in_its_own_step(rollout):
    plan = plan_of(rollout)
    assert steps_of(plan) == steps_of(plan, graph=PLAIN)


def test_everything_is_of_its_own_step_where_nothing_is_trained():
    plan = plan_of()
    assert steps_of(plan, is_training=False) == steps_of(
        plan, graph=PLAIN, is_training=False
    )


def test_masters_in_host_memory_come_back_for_the_copy():
    steps = [s for s in steps_of(plan_of(offloaded=("policy",))) if "policy" in s]
    assert steps[0] == "Reload policy parameters"
    assert steps[1].startswith("Move policy")
    train = steps.index("Run train_policy")
    # They stay for the training, and leave after it.
    assert not any(s.startswith("Offload") for s in steps[:train])
    assert steps.count("Offload policy parameters") == 1


def test_a_role_that_nobody_changes_can_always_be_beside():
    calls = dict(sft.graph(sft.SFT()).calls)
    graph = ahead(
        DataflowGraph(
            sampled=call("teacher", Generate()),
            **{"train": calls["train_policy"]},
        )
    )
    plan = make_plan(graph, num_devices=2)
    dtypes = dict.fromkeys(graph.roles, "float32")
    assert list(map(str, make_schedule(graph, plan, dtypes))) == [
        "Run train",
        "Run sampled",
    ]


# -- memory ------------------------------------------------------------------------


def test_the_batch_that_waits_is_held_beside_the_one_that_is_made():
    plan = plan_of()
    homes = home_places(GRAPH, plan, FLOAT)
    steps = make_schedule(GRAPH, plan, FLOAT)
    found = account(steps, GRAPH, plan, homes, sizes_of(plan, GRAPH, batch=2))
    groups = dict(zip(found.groups, range(2), strict=True))
    group = groups[0, 1, 2, 3]
    by_step = {str(m.step): gib(m.device_bytes)[group] for m in found.moments}
    assert by_step["Run reward"] == 2
    # A copy of 4, the batch of this step, the next one's, and 3 of work.
    assert by_step["Run rollout"] == 4 + 2 + 2 + 3
    assert gib(found.resting_bytes)[group] == 2
