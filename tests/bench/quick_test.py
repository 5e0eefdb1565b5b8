"""Tests of `realjax/bench/quick.py`, with a tiny model in the place of its own."""

import json

import pytest

from realjax.bench import quick
from realjax.testing import tiny_model


@pytest.mark.slow
def test_it_measures_what_it_says_in_json(monkeypatch):
    monkeypatch.setattr(quick, "MODEL", tiny_model(vocab_size=64, max_positions=512))
    found = json.loads(json.dumps(quick.measure(1)))
    assert set(found) == {
        "sft_tokens_per_second",
        "generation_tokens_per_second",
        "ppo_step_seconds",
        "ppo_seconds_by_call",
        "compile_seconds",
        "peak_memory_bytes",
    }
    assert found["sft_tokens_per_second"]["median"] > 0
    assert set(found["ppo_seconds_by_call"]) >= {"rollout", "train_policy"}


@pytest.mark.slow
def test_the_command_ends_with_one_json_object(capfd):
    quick.main(["--repetitions", "1"])
    last = capfd.readouterr().out.splitlines()[-1]
    found = json.loads(last)
    assert found["parameters"] > 5_000_000
    cold, warm = (found["compile_seconds"][kind] for kind in ("cold", "warm"))
    assert set(cold) == set(warm) == {"sft", "generation", "ppo"}
