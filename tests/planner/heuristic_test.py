"""Tests of `realjax/planner/heuristic.py`: ReaL's templates on machines not here."""

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import sft
from realjax.planner.heuristic import template_plan, templates
from realjax.planner.simulate import price
from realjax.planner.strategies import REAL, Rules
from tests.planner.plan_spaces import space_of


def strings(space, found):
    return {name: str(place) for name, place in space.chosen(found.plan).items()}


def test_on_one_node_the_sequential_template_is_tensor_on_all_devices():
    space = space_of("4xh100")
    sequential, _ = templates(space)
    assert sequential.name == "sequential"
    assert set(strings(space, sequential).values()) == {"t4@0-3"}
    assert not sequential.notes


def test_over_nodes_it_has_stages_and_generates_in_them_where_the_rules_allow():
    space = space_of("2x8xh100", rules=REAL)
    sequential, divided = templates(space)
    assert set(strings(space, sequential).values()) == {"t8s2@0-15"}
    assert not sequential.notes
    # Generation: stages as nodes, data for the rest. Half the devices for each call
    # that trains, and for each that infers a number; all for log-probabilities. The
    # critic's head is a little more than the policy's, which is its embedding: it
    # chooses first.
    assert strings(space, divided) == {
        "rollout": "d8s2@0-15",
        "reward": "d2t4@0-7",
        "reference": "d2t4s2@0-15",
        "value": "d2t4@8-15",
        "train_policy": "d2t4@8-15",
        "train_critic": "d2t4@0-7",
    }
    assert not divided.notes


def test_what_a_call_cannot_have_is_said():
    space = space_of("2x2xh100")
    sequential, _ = templates(space)
    chosen = space.chosen(sequential.plan)
    # Two doublings and halvings from stages that no plan of a run generates in.
    assert chosen["rollout"].stage == 1
    assert chosen["rollout"].tensor * chosen["rollout"].data in (2, 4)
    assert len(sequential.notes) == 1
    assert sequential.notes[0].startswith(f"rollout takes {chosen['rollout']}; the")
    # 6 heads do not divide over 4.
    odd = space_of("4xh100", num_heads=6, num_kv_heads=2)
    sequential, _ = templates(odd)
    assert {place.tensor for place in odd.chosen(sequential.plan).values()} == {2}
    assert len(sequential.notes) == 6


def test_the_template_of_a_run_is_the_faster_one():
    space = space_of("4xh100")
    plan, seconds = template_plan(space)
    found = price(space.problem, jnp.asarray([plan]))
    assert seconds == pytest.approx(float(found.seconds[0]))
    assert float(found.memory_bytes[0]) <= float(space.problem.memory_bytes)
    assert seconds == min(found.seconds for found in templates(space))


def test_with_little_memory_parameters_are_cut():
    rules = Rules(varies=False)
    roomy = space_of("4xh100", rules=rules)
    divided = templates(roomy)[1]
    assert {p.fsdp for p in roomy.chosen(divided.plan).values()} == {1}
    tight = space_of("4xh100", rules=rules, memory=0.9 * divided.memory_bytes)
    again = templates(tight)[1]
    assert again.is_fitting
    assert tight.chosen(again.plan)["train_critic"].fsdp == 2
    assert any(note.startswith("train_critic takes f2") for note in again.notes)


def test_any_graph_has_a_template():
    space = space_of("4xh100", algorithm=sft)
    plan, seconds = template_plan(space)
    assert len(plan) == 1
    assert np.isfinite(seconds)
