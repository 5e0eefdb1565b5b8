"""A run whose rollouts stop at a budget goes on with what it carried, if resumed."""

import shutil

import numpy as np
import pytest

from realjax.core.metrics import read_metrics
from tests.e2e.small_ppo import fields, train, write_world
from tests.runtime.small_runs import check_same_arrays, check_same_metrics, saved_arrays

BUDGET = {
    "hp.delivery.token_budget": 30,
    "hp.delivery.num_carried": 8,
    "evaluation.every_steps": 0,
}


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_with_the_groups_it_carried(tmp_path):
    world = write_world(tmp_path)
    values = fields(world, epochs=1, **BUDGET)
    whole, halfway = tmp_path / "whole", tmp_path / "halfway"
    result, _ = train(values, whole)
    assert result.is_finished
    steps = int(result.metrics["step"][-1])
    shutil.copytree(whole, halfway)
    for step in range(3, steps + 1):
        shutil.rmtree(halfway / "checkpoints" / f"{step}", ignore_errors=True)
    shutil.rmtree(halfway / "export", ignore_errors=True)
    resumed, text = train(values, halfway)
    assert "resumed from the checkpoint of step 2" in text
    assert resumed.is_finished
    check_same_metrics(halfway, whole)
    check_same_arrays(saved_arrays(halfway, steps), saved_arrays(whole, steps))
    carried = np.asarray(read_metrics(whole / "metrics.jsonl")["completions/carried"])
    assert carried[1] > 0
