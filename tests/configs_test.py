"""Every shipped config runs in its `:debug` form, from any folder, on nothing."""

import io
import json
import os
import pathlib

import numpy as np
import pytest

import realjax
from realjax.core.metrics import read_metrics
from realjax.runtime.console import Console

FOLDER = pathlib.Path(realjax.__file__).parents[1] / "configs"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.py"))
NUM_STEPS = 3


def roles_of(config):
    """Trained roles of each run, by the run's folder below the work folder."""
    stages = config.get("stages", ())
    runs = {name: config[name] for name in stages} or {".": config}
    return {
        name: {role for role in run.roles if has_updates(run.algorithm, role)}
        for name, run in runs.items()
    }


def has_updates(algorithm, role):
    graph = realjax.graph({"algorithm": algorithm})
    return role in graph.trained_roles


@pytest.mark.parametrize("name", CONFIGS)
def test_the_debug_form_of_a_config_needs_nothing_and_leaves_a_run(
    name, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config, text = realjax.load_config(f"{name}:debug"), io.StringIO()
    result = realjax.train(
        config, tmp_path / "run", console=Console(file=text, width=200)
    )
    assert result.is_finished
    assert not any((tmp_path / "elsewhere").iterdir())
    for folder, roles in roles_of(config).items():
        workdir = tmp_path / "run" / folder
        check_metrics(read_metrics(workdir / "metrics.jsonl"))
        assert (workdir / "report.html").stat().st_size > 0
        assert {path.name for path in (workdir / "export").iterdir()} == roles
        for role in roles:
            check_export(workdir / "export" / role)


def check_metrics(metrics):
    """At most three steps; the held-out data is measured before and after them."""
    assert metrics["step"].tolist() == list(range(metrics["step"][-1] + 1))
    assert 1 <= metrics["step"][-1] <= NUM_STEPS
    losses = [name for name in metrics if name == "loss" or name.startswith("loss/")]
    assert losses
    for name in losses:
        assert np.isfinite(metrics[name][1:]).all()
    measured = [name for name in metrics if name.startswith("eval/")]
    assert measured
    for name in measured:
        assert np.isfinite(metrics[name][[0, -1]]).all()


def check_export(folder):
    """Complete: a config, weights and a tokenizer that belongs to them."""
    model = realjax.load(folder, "d1@0")
    assert model.tokenizer is not None
    assert model.tokenizer.vocab_size <= model.config.vocab_size
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert os.listdir(folder)


def test_every_config_says_how_to_run_it_and_what_came_of_it():
    for name in CONFIGS:
        text = (FOLDER / name).read_text()
        assert f"--config=configs/{name}" in text, name
        assert f"--config=configs/{name}:debug" in text, name
