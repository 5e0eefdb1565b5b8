"""Tests of the executor in runs of several processes."""

import pytest

from tests.processes import runs
from tests.processes.launch import launch


pytestmark = pytest.mark.slow  # Seven programs compile in every process.


@pytest.fixture(scope="module")
def alone():
    (found,) = launch(runs.tiny_steps, num_processes=1, num_devices=8)
    return found


@pytest.mark.parametrize("num_processes", (2, 4))
def test_processes_run_the_same_steps_each_only_its_calls(alone, num_processes):
    found = launch(
        runs.tiny_steps, num_processes=num_processes, num_devices=8 // num_processes
    )
    for one in found:
        runs.check_equal(one, alone)
        ran = {name for name, count in one["num_runs"].items() if count}
        assert ran == set(one["here"])
        assert all(one["num_runs"][name] == 2 for name in ran)
    assert set(found[0]["here"]) != set(found[-1]["here"])
    assert "reference" not in found[0]["here"] and "rollout" not in found[-1]["here"]
