"""Tests of `realjax/runtime/kept_plan.py`: a run goes on with the plan it had."""

import dataclasses
import json

import pytest

from realjax.runtime.checkpoint import CheckpointConfig
from tests.runtime.small_runs import (
    check_same_arrays,
    check_same_metrics,
    saved_arrays,
    sft_config,
    train,
    write_data,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def config(folder, **changes):
    """Of four steps whose plan is looked for, saved after each."""
    found = {"allocation": "", "steps": 4} | changes
    checkpoint = CheckpointConfig(keep=20, every_steps=1, export=False)
    return sft_config(folder, checkpoint=checkpoint, **found)


def test_a_run_goes_on_with_the_plan_it_had(folder, tmp_path):
    whole, text = train(config(folder), tmp_path / "whole")
    assert "plan: search, " in text
    written = json.loads((tmp_path / "whole" / "plan.json").read_text())
    assert written["origin"] == "search"
    # Stopped after two steps; meanwhile another plan would be found.
    stopped = dataclasses.replace(config(folder), benchmark_steps=2)
    train(stopped, tmp_path / "run")
    file = tmp_path / "run" / "plan.json"
    kept = json.loads(file.read_text())
    assert kept["calls"] == written["calls"]
    result, text = train(config(folder), tmp_path / "run")
    assert "plan: search, as before" in text
    assert "resumed from the checkpoint of step 2" in text
    check_same_metrics(result.workdir, whole.workdir)
    check_same_arrays(saved_arrays(result.workdir, 4), saved_arrays(whole.workdir, 4))
    # Nothing that a search would find: it is really the file that is read.
    kept["calls"]["train_policy"]["allocation"] = "d1@5"
    file.write_text(json.dumps(kept))
    _, text = train(config(folder), tmp_path / "run")
    assert "d1@5" in text
    # What the config gives comes first.
    _, text = train(config(folder, plan="d2"), tmp_path / "run")
    assert "plan: d2\n" in text
    assert "d2@0-1" in text
