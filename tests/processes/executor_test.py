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
        check_live_bytes(one)
        ran = {name for name, count in one["num_runs"].items() if count}
        assert ran == set(one["here"])
        assert all(one["num_runs"][name] == 2 for name in ran)
    assert set(found[0]["here"]) != set(found[-1]["here"])
    assert "reference" not in found[0]["here"] and "rollout" not in found[-1]["here"]


def check_live_bytes(found):
    """What is alive after a step is what the account says, to 5 %, on every device."""
    for kind, counted in found["counted"].items():
        live = found["live"][kind]
        for index, size in counted.items():
            # 100 bytes: counters, and the state of the advantages.
            wanted = pytest.approx(size, rel=0.05, abs=100)
            assert live.get(index, 0) == wanted, (kind, index)


def test_live_bytes_after_a_step_are_those_of_the_account(alone):
    assert sum(alone["counted"]["pinned_host"].values()) > 0
    check_live_bytes(alone)


def test_reloading_the_reference_overlaps_a_call_of_the_other_process(tmp_path):
    found = launch(runs.traced_steps, str(tmp_path), num_processes=2, num_devices=1)
    overlaps = 0
    for name, _, step, start, end in found[1]:
        if name == "Reload reference parameters" and step > 1:  # The first compiles.
            overlaps += any(
                kind == "call" and begin < end and start < stop
                for _, kind, _, begin, stop in found[0]
            )
    assert overlaps >= 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "timeline0.json",
        "timeline1.json",
    }
