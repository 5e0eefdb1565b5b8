"""Two processes save and load a checkpoint together."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from realjax.models import hf
from tests.models.together import CONFIG, MAX_SHARD_BYTES, numbers

NUM_PROCESSES = 2


def run_together(folder):
    """Runs the processes, of two devices each; returns what each found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    common = [sys.executable, "-m", "tests.models.together"]
    processes = [
        subprocess.Popen(
            [*common, *map(str, (rank, NUM_PROCESSES, port, folder))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(NUM_PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [
        json.loads(next(line for line in text.splitlines() if line.startswith("{")))
        for text in outputs
    ]


@pytest.mark.slow
def test_processes_write_files_of_their_own_and_read_only_their_shards(tmp_path):
    first, second = run_together(tmp_path)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert (
        len(files) > 4
        and max(
            path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")
        )
        < 1.2 * MAX_SHARD_BYTES
    )
    # Each wrote every second file, and nothing is left beside the folders.
    assert [first["written"], second["written"]] == [files[0::2], files[1::2]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "model"]
    for folder in ("model", "alone"):
        loaded = hf.load(tmp_path / folder)
        jax.tree.map(np.testing.assert_array_equal, loaded, numbers(CONFIG))
    assert first["is_right"] == second["is_right"] == [True, True, True]
    num_bytes = 4 * CONFIG.num_parameters
    for found in (first, second):
        # fsdp cuts all but the norms in four, of which each process has two.
        assert 0.5 <= found["bytes_read"][0] / num_bytes < 0.51
    assert first["bytes_read"][2] == num_bytes and second["bytes_read"][2] == 0
