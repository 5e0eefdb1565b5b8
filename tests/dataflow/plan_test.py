"""Tests of `realjax/dataflow/plan.py`."""

import json

import pytest

from realjax.algorithms import ppo
from realjax.dataflow.plan import MOST_SLOTS, ExecutionPlan, make_plan

GRAPH = ppo.graph(ppo.PPO())


def test_by_default_every_call_is_data_parallel_over_all_devices():
    plan = make_plan(GRAPH, num_devices=8)
    assert {str(place.allocation) for place in plan.calls.values()} == {"d8@0-7"}


def test_a_transform_runs_where_its_first_reader_trains():
    plan = make_plan(GRAPH, num_devices=8, allocations={"train_policy": "f4@4-7"})
    assert str(plan.calls["advantages"].allocation) == "f4@4-7"


def test_unnamed_calls_take_the_default_allocation():
    plan = make_plan(
        GRAPH, num_devices=8, allocation="t2", allocations={"reward": "d2@6-7"}
    )
    assert str(plan.calls["reward"].allocation) == "d2@6-7"
    assert str(plan.calls["rollout"].allocation) == "t2@0-1"


def test_a_misspelt_call_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'rollout'"):
        make_plan(GRAPH, num_devices=8, allocations={"rolout": "d8"})


def test_an_allocation_beyond_the_machine_is_refused():
    with pytest.raises(ValueError, match=r"'reward'.*there are 4 devices"):
        make_plan(GRAPH, num_devices=4, allocations={"reward": "d2@6-7"})


def test_rows_are_a_multiple_of_the_data_shards():
    plan = make_plan(GRAPH, num_devices=8, microbatch_tokens=2048)
    # 2048 tokens are 21 rows of 96; 24 is the next multiple of 8 shards.
    assert plan.num_rows("value", max_rows=64, row_length=96) == 24
    # No more rows than there are sequences.
    assert plan.num_rows("value", max_rows=10, row_length=96) == 16


def test_rows_by_call_win_over_the_token_budget():
    plan = make_plan(GRAPH, num_devices=8, rows={"value": 40})
    assert plan.num_rows("value", max_rows=64, row_length=96) == 40


def test_generation_over_stages_is_refused_and_the_reason_given():
    with pytest.raises(ValueError, match=r"'rollout' generates.*has 2 stages") as error:
        make_plan(GRAPH, num_devices=8, allocations={"rollout": "s2t2@0-3"})
    assert "would wait for the others at every token" in str(error.value)


def test_an_engine_has_a_slot_for_every_completion_up_to_a_limit():
    plan = make_plan(GRAPH, num_devices=8, allocations={"rollout": "d4t2"})
    slots = lambda num_rows: plan.rollout_settings("rollout", num_rows=num_rows).slots
    # As many on each of four row shards.
    assert [slots(n) for n in (1, 4, 10)] == [4, 4, 12]
    assert slots(10_000) == 4 * MOST_SLOTS


def test_rows_pages_and_precision_of_a_call_are_those_of_its_engine():
    plan = make_plan(
        GRAPH,
        num_devices=8,
        rows={"rollout": 20},
        pages={"rollout": 160},
        kv_dtype={"rollout": "int8"},
    )
    settings = plan.rollout_settings("rollout", num_rows=64)
    assert (settings.slots, settings.pages, settings.kv_dtype) == (24, 160, "int8")
    assert plan.rollout_settings("rollout", num_rows=8).slots == 8
    assert "rows 20  pages 160  kv_dtype int8" in plan.table()
    own = plan.as_dict()["calls"]["rollout"]
    assert (own["pages"], own["kv_dtype"]) == (160, "int8")


@pytest.mark.parametrize(
    "option", [{"pages": {"value": 8}}, {"kv_dtype": {"value": "int8"}}]
)
def test_a_pool_of_a_call_that_does_not_generate_is_refused(option):
    with pytest.raises(ValueError, match=r"'value', which does not generate"):
        make_plan(GRAPH, num_devices=8, **option)


def test_an_unknown_type_of_keys_and_values_is_refused():
    with pytest.raises(ValueError, match=r"kv_dtype.rollout is 'int4'.*int8"):
        make_plan(GRAPH, num_devices=8, kv_dtype={"rollout": "int4"})
    with pytest.raises(ValueError, match="Did you mean 'rollout'"):
        make_plan(GRAPH, num_devices=8, kv_dtype={"rolout": "int8"})


# -- plans as plain values -------------------------------------------------------------


def test_a_plan_is_read_back_from_its_values():
    plan = make_plan(
        GRAPH,
        num_devices=8,
        allocations={"rollout": "d4t2", "train_policy": "f4@4-7+offload"},
        rows={"value": 40},
        pages={"rollout": 64},
        kv_dtype={"rollout": "int8"},
        weights={"reference": "int8"},
    )
    values = json.loads(json.dumps(plan.as_dict()))
    assert ExecutionPlan.from_dict(GRAPH, values, num_devices=8) == plan
    # Arithmetic follows its reader where the values do not say.
    del values["calls"]["advantages"]
    assert ExecutionPlan.from_dict(GRAPH, values, num_devices=8) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("calls"), "has no 'calls'"),
        (lambda v: v["calls"].pop("value"), "no allocation for the call 'value'"),
        (lambda v: v["calls"].update(valeu={}), "Did you mean 'value'"),
        (lambda v: v["calls"]["value"].update(row=3), "Did you mean 'rows'"),
        (lambda v: v["calls"]["value"].update(rows=-1), "rows of value is -1"),
        (lambda v: v["calls"]["value"].update(allocation=8), "no allocation, as in"),
        (lambda v: v["calls"]["value"].update(allocation="d9"), "there are 8 devices"),
        (lambda v: v["calls"]["value"].update(allocation="q2"), "unknown letter"),
        (lambda v: v["calls"]["value"].update(remat="some"), "remat of value='some'"),
        (lambda v: v["calls"]["value"].update(pages=3), "does not generate"),
    ],
)
def test_values_that_are_no_plan_of_the_graph_are_refused(change, message):
    values = make_plan(GRAPH, num_devices=8).as_dict()
    change(values)
    with pytest.raises(ValueError, match=message):
        ExecutionPlan.from_dict(GRAPH, values, num_devices=8)
