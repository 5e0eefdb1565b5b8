"""Every shipped config runs in its `:debug` form, from any folder, on nothing."""

import io
import pathlib

import numpy as np
import pytest

import realjax
from realjax.core.metrics import read_metrics
from realjax.runtime.console import Console
from realjax.runtime.run import make_graph
from realjax.runtime.run_config import RunConfig

FOLDER = pathlib.Path(realjax.__file__).parents[1] / "configs"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.py"))
NUM_STEPS = 3


def trained_roles(config):
    """Of each run, by its folder below the work folder."""
    stages = config.get("stages", ())
    runs = {name: config[name] for name in stages} or {".": config}
    return {
        folder: make_graph(RunConfig(algorithm=run.algorithm)).trained_roles
        for folder, run in runs.items()
    }


# As `:debug` these run about what others do.
COPIES = (
    *(
        "compile_",
        "distillation",
        "gsm8k_dpo",
        "gsm8k_grpo",
        "gsm8k_raft",
        "gsm8k_rloo",
    ),
    *("llama7b_", "online_dpo", "orpo", "raft", "reinforce_pp", "remax", "rloo"),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n.startswith(COPIES) else ())
        for n in CONFIGS
    ],
)
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
    for folder, roles in trained_roles(config).items():
        workdir = tmp_path / "run" / folder
        check_metrics(read_metrics(workdir / "metrics.jsonl"))
        assert (workdir / "report.html").stat().st_size > 0
        assert {path.name for path in (workdir / "export").iterdir()} == set(roles)
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


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_how_to_run_it(name):
    assert f"--config=configs/{name}" in (FOLDER / name).read_text()
