"""Several processes save one Hugging Face folder, and load only what is theirs.

A sample of this is in `checkpoint_test.py`, in the same two processes.
"""

import pytest

from tests.processes import exports
from tests.processes.launch import launch


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_export_whatever_lies_anywhere_and_fail_as_one(
    num_processes, tmp_path
):
    found = launch(
        exports.live,
        str(tmp_path),
        2 * num_processes,
        False,
        num_processes=num_processes,
        num_devices=2,
    )
    exports.check_files(tmp_path / "model", found)
    exports.check_reads(found)
    for name in ("last", "copies", "host"):
        exports.check_model(tmp_path / name)
