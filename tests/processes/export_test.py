"""Several processes save one Hugging Face folder, and load only what is theirs."""

import jax
import numpy as np
import pytest

from realjax.models import hf
from tests.processes import exports
from tests.processes.launch import launch


def live(folder, num_processes, is_sample):
    num_devices = 2 * num_processes
    return launch(
        exports.live,
        str(folder),
        num_devices,
        is_sample,
        num_processes=num_processes,
        num_devices=2,
    )


def check_files(folder, found):
    """The processes took turns, and what they wrote is the model."""
    paths = sorted(folder.glob("*.safetensors"))
    names = [path.name for path in paths]
    assert len(paths) > 4
    sizes = [path.stat().st_size for path in paths]
    assert max(sizes) < 1.2 * exports.MAX_SHARD_BYTES
    for process, one in enumerate(found):
        assert one["written"] == names[process :: len(found)]
    check_model(folder)


def check_model(folder):
    loaded = hf.load(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded, exports.numbers())


def check_reads(found):
    """Each read what its devices hold, and nothing where they hold nothing."""
    num_bytes = 4 * exports.CONFIG.num_parameters
    for process, one in enumerate(found):
        whole, first, *mixed = (part / num_bytes for part in one["read"])
        # fsdp cuts all but the norms; with t2 some more is whole.
        assert 1 / len(found) <= whole < 1 / len(found) + 0.02
        assert first == (process == 0)
        assert all(1 / len(found) <= part < 1 / len(found) + 0.05 for part in mixed)


def test_two_processes_write_one_folder_and_read_only_their_shards(tmp_path):
    found = live(tmp_path, 2, True)
    check_files(tmp_path / "model", found)
    check_reads(found)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_export_whatever_lies_anywhere_and_fail_as_one(
    num_processes, tmp_path
):
    found = live(tmp_path, num_processes, False)
    check_files(tmp_path / "model", found)
    check_reads(found)
    for name in ("last", "copies", "host"):
        check_model(tmp_path / name)
