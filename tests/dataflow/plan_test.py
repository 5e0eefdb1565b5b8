"""Tests of `realjax/dataflow/plan.py`."""

import pytest

from realjax.algorithms import ppo
from realjax.dataflow.plan import make_plan

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
