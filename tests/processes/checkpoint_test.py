"""Checkpoints of several processes: one folder, for any number of them."""

import itertools
import json

import pytest

from realjax.runtime import manifest
from realjax.runtime.checkpoint import Checkpointer
from tests.processes import checkpoints, exports
from tests.processes.launch import launch

NUM_DEVICES = 8


def in_processes(num_processes, function, *arguments, **options):
    """Runs a function in so many processes, in this one if it is one."""
    if num_processes == 1:
        return [json.loads(json.dumps(function(*arguments)))]
    num_devices = NUM_DEVICES // num_processes
    return launch(
        function,
        *arguments,
        num_processes=num_processes,
        num_devices=num_devices,
        **options,
    )


def test_two_processes_save_restore_export_and_fail_as_one(tmp_path):
    alone, folder = str(tmp_path / "alone"), str(tmp_path / "two")
    checkpoints.save(alone, "wide")
    # One launch: starting processes costs more than what they do.
    exported = tmp_path / "export"
    found = in_processes(2, checkpoints.live_and_export, folder, alone, str(exported))
    assert [one["left"] for one in found] == [["3", "5", "damaged-4", "run"]] * 2
    exports.check_files(exported / "model", found)
    exports.check_reads(found)
    assert checkpoints.restore(folder, "wide", 5) == [5, {"position": 5}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "saving, restoring", [*itertools.product((1, 2, 4), (1, 2, 4)), (8, 2)]
)
def test_any_number_of_processes_restores_what_any_number_saved(
    saving, restoring, tmp_path
):
    folder = str(tmp_path)
    left = in_processes(saving, checkpoints.save, folder, "wide")
    assert left == [["2", "3"]] * saving
    for layout in ("wide", "narrow"):
        found = in_processes(restoring, checkpoints.restore, folder, layout, 3)
        assert found == [[3, {"position": 3}]] * restoring


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_processes, victim, moment",
    [(2, 1, "writes"), (4, 3, "writes"), (2, 0, "writes"), (2, 0, "listed")],
)
def test_a_process_killed_inside_a_save_leaves_the_last_complete_one(
    num_processes, victim, moment, tmp_path
):
    results = in_processes(
        num_processes,
        checkpoints.save_until_killed,
        str(tmp_path),
        victim,
        moment,
        may_fail=True,
    )
    assert all(status for status, _ in results)
    assert results[victim][0] == -9
    # Step 4 has no name, be it complete or not.
    (left,) = tmp_path.glob("4*")
    assert left.name.endswith("-tmp")
    assert (left / manifest.FILE).exists() == (moment == "listed")
    assert checkpoints.restore(str(tmp_path), "narrow", 3)[0] == 3
    with Checkpointer(tmp_path) as checkpointer:
        assert not any(tmp_path.glob("*-tmp*"))
        assert checkpointer.steps() == [2, 3]
