"""Tests of `realjax/bench/offload.py`, with a tiny model in the place of its own."""

import json

import pytest

from realjax.bench import offload
from realjax.testing import tiny_model


@pytest.mark.slow
def test_on_cpus_only_ratios_are_reported(monkeypatch, capfd):
    monkeypatch.setattr(offload, "SMALL", tiny_model(width=64))
    monkeypatch.setattr(offload, "SMALL_LINK_BYTES", 2**16)
    offload.main(["--repetitions", "1", "--layers", "3"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["parameters"] == tiny_model(width=64, num_layers=3).num_parameters
    assert found["streamed_over_resident"] > 0
    assert set(found["tree_share_of_link"]) == {"to_host", "to_device", "both"}
    assert not [name for name in found if name.endswith(("second", "seconds"))]


def test_both_ways_at_once_count_twice():
    # 3 GB each way in 2 seconds are 3 GB/s together; one way alone they are 1.5.
    found = offload.rates(3 * 10**9, {"to_host": [2.0], "both": [2.0]})
    assert found["to_host"]["median"] == 1.5
    assert found["both"]["median"] == 3.0
    assert offload.shares(found, found) == {"to_host": 1.0, "both": 1.0}
