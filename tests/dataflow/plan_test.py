"""Tests of `realjax/dataflow/plan.py`."""

import pytest

from realjax.algorithms import ppo
from realjax.dataflow.plan import MOST_SLOTS, make_plan

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
