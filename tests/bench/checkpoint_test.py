"""Tests of `realjax/bench/checkpoint.py`: what it measures, and what that must be."""

import dataclasses
import json

import pytest

from realjax.bench import checkpoint
from realjax.models import hf

MAX_BYTES_OVER_SHARDS = 150 * 10**6


def test_it_writes_a_checkpoint_that_loads(tmp_path):
    small = {"vocab_size": 32, "width": 16, "num_layers": 2, "mlp_width": 24}
    config = dataclasses.replace(checkpoint.MODEL, **small)
    num_bytes = checkpoint.make_checkpoint(tmp_path / "checkpoint", config)
    found = checkpoint.measure(tmp_path / "checkpoint")
    assert hf.read_config(tmp_path / "saved") == config
    # bfloat16 in the file, and a header.
    assert 0 <= num_bytes - 2 * config.num_parameters < 4000
    # float32 on the devices; norms are whole on all eight.
    num_norms = config.width * (2 * config.num_layers + 1)
    assert found["shard_bytes"] == 4 * (config.num_parameters + 7 * num_norms)


@pytest.mark.slow
def test_loading_a_gigabyte_takes_little_memory_beside_the_shards(capfd):
    checkpoint.main(["--repetitions", "1"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    (run,) = found["runs"]
    assert 0.9e9 < found["checkpoint_bytes"] < 1.1e9
    assert run["load_peak_bytes_over_shards"] < MAX_BYTES_OVER_SHARDS
    assert run["bytes_read"] < 1.01 * found["checkpoint_bytes"]
