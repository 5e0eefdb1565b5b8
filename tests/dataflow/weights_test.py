"""Tests of weights of 8 bits in plans, schedules and the account of memory."""

import dataclasses

import numpy as np
import pytest

from realjax.algorithms import ppo
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import (
    Move,
    Release,
    home_places,
    make_schedule,
    place_of,
)
from realjax.functions.role import Role, RoleConfig
from realjax.planner import Work, memory_account, memory_sizes
from realjax.testing import tiny_model

GRAPH = ppo.graph(ppo.PPO())
FLOAT = dict.fromkeys(GRAPH.roles, "float32")


def plan_of(graph=GRAPH, **options):
    return make_plan(graph, num_devices=8, **options)


def test_a_call_with_weights_of_its_own_gets_a_copy_even_at_home():
    plan = plan_of(weights={"rollout": "int8"})
    place = place_of(GRAPH, plan, FLOAT, "rollout")
    assert (place.dtype, place.weights) == ("float32", "int8")
    steps = list(map(str, make_schedule(GRAPH, plan, FLOAT)))
    assert steps[0] == "Move policy → d8@0-7 float32 int8"
    assert "Release policy d8@0-7 float32 int8" in steps
    assert "Move policy" not in " ".join(
        map(str, make_schedule(GRAPH, plan_of(), FLOAT))
    )


def test_a_frozen_role_stays_in_8_bits_and_never_moves():
    plan = plan_of(role_weights={"reference": "int8", "reward": "float8_e4m3fn"})
    homes = home_places(GRAPH, plan, FLOAT)
    assert homes["reference"].weights == "int8"
    assert homes["reward"].weights == "float8_e4m3fn"
    assert homes["policy"].weights == ""
    steps = make_schedule(GRAPH, plan, FLOAT)
    moved = [s for s in steps if isinstance(s, Move | Release)]
    assert not {s.role for s in moved} & {"reference", "reward"}


def test_a_reference_that_follows_keeps_masters_and_is_copied_into_8_bits():
    graph = ppo.graph(ppo.PPO(reference_ema=0.01))
    plan = plan_of(graph, role_weights={"reference": "int8"})
    home = home_places(graph, plan, FLOAT)["reference"]
    assert (home.dtype, home.weights) == ("float32", "")
    assert plan.calls["follow"].weights == ""
    moves = [s for s in make_schedule(graph, plan, FLOAT) if isinstance(s, Move)]
    assert [(m.role, m.place.weights) for m in moves] == [("reference", "int8")]


def test_weights_of_a_call_win_over_those_of_its_role():
    plan = plan_of(
        weights={"reference": "float8_e4m3fn"}, role_weights={"reference": "int8"}
    )
    assert plan.calls["reference"].weights == "float8_e4m3fn"
    assert "weights float8_e4m3fn" in plan.table()
    assert plan.as_dict()["calls"]["reference"]["weights"] == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role_weights": {"policy": "int8"}}, r"roles.policy.weights .* trains this"),
        ({"weights": {"train_policy": "int8"}}, r"weights.train_policy .*leave it out"),
        ({"weights": {"advantages": "int8"}}, r"does not sample or infer"),
        ({"weights": {"rollout": "int4"}}, r"weights.rollout is 'int4'.*int8"),
        ({"weights": {"rolout": "int8"}}, r"Did you mean 'rollout'"),
    ],
)
def test_what_cannot_be_of_8_bits_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**options)


def test_the_trainer_scores_with_its_masters_and_where_it_trains():
    graph = ppo.graph(ppo.PPO(importance_cap=2.0))
    plan = plan_of(
        graph, allocations={"train_policy": "f4@4-7"}, weights={"rollout": "int8"}
    )
    dtypes = dict.fromkeys(graph.roles, "bfloat16")
    home = home_places(graph, plan, dtypes)["policy"]
    assert place_of(graph, plan, dtypes, "proximal").key == home.key
    assert str(home) == "f4@4-7 float32"
    with pytest.raises(ValueError, match=r"weights.proximal .* whole numbers"):
        plan_of(graph, weights={"proximal": "int8"})


# -- the account -------------------------------------------------------------------

# Wide enough for scales to be few.
MODEL = tiny_model(width=64, mlp_width=256, head_dim=32, num_heads=8, num_kv_heads=8)


def sizes_of(plan):
    heads = {"policy": "language", "reference": "language"}
    roles = {
        name: Role(
            name=name,
            config=RoleConfig(),
            model=dataclasses.replace(MODEL, head=heads.get(name, "scalar")),
            eos_ids=(1,),
            dtype="bfloat16",
            is_trained=name in GRAPH.trained_roles,
        )
        for name in GRAPH.roles
    }
    work = Work(num_rows=8, width=32, prompt_width=16)
    moments = memory_account(GRAPH, plan, roles, work).moments
    return memory_sizes(GRAPH, plan, roles, work), moments


def test_the_account_counts_8_bits_and_what_is_there_until_they_are_made():
    options = {"allocation": "d1", "allocations": {"rollout": "t2@2-3"}}
    whole, moments = sizes_of(plan_of(**options))
    small, small_moments = sizes_of(
        plan_of(
            **options, weights={"rollout": "int8"}, role_weights={"reference": "int8"}
        )
    )
    matrices = MODEL.num_layers * (4 * 64 * 256 + 3 * 64 * 256)
    outputs = MODEL.num_layers * (3 * 256 + 64 + 2 * 256 + 64)
    saved = matrices - 4 * outputs  # A byte a weight, less the scales.
    assert (
        whole.parts["reference", "parameters"] - small.parts["reference", "parameters"]
        == saved
    )
    (copy,), (small_copy,) = (
        [(k, s.copies[k]) for k in s.copies if k[0] == "policy"] for s in (whole, small)
    )
    # Cut over two devices; scales of what is summed over both are on both.
    cut = (matrices - 4 * MODEL.num_layers * 5 * 256) // 2 - 4 * MODEL.num_layers * 128
    assert copy[1] - small_copy[1] == cut
    assert small.arriving[small_copy[0]] == cut
    assert whole.arriving[copy[0]] == 0
    # While it moves there is room for the whole, and while it runs for 8 bits.
    held = lambda moments, index: moments[index].held["policy at " + str_of(moments)]
    assert np.max(held(moments, 0)) == np.max(held(small_moments, 0)) == copy[1]
    assert np.max(held(moments, 1)) == copy[1]
    assert np.max(held(small_moments, 1)) == small_copy[1]


def str_of(moments):
    """The place of the first move."""
    step = moments[0].step
    assert isinstance(step, Move)
    return str(step.place)
