"""The Python API: the names that others rely on, and what they give."""

import subprocess
import sys

import numpy as np
import pytest

import realjax
from tests.runtime.small_world import (
    PROMPTS,
    make_world,
    nothing_compiles,
    sft_config,
    train,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_importing_realjax_imports_no_jax():
    program = "import sys, realjax; print('jax' in sys.modules, realjax.__all__)"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"False {realjax.__all__}\n"


def test_every_name_is_there():
    assert {"load", "sample", "train", "plan", "load_config"} <= set(realjax.__all__)
    for name in realjax.__all__:
        assert getattr(realjax, name).__name__ == name
    with pytest.raises(AttributeError, match="'realjax' has no attribute 'lod'"):
        _ = realjax.lod


# -- configs and plans ---------------------------------------------------------------


def test_a_shipped_config_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ppo.py", "configs/ppo.py"):
        assert realjax.load_config(name).algorithm == "ppo"
        assert realjax.load_config(f"{name}:debug").steps == 3
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'ppo\.py'\?"):
        realjax.load_config("pppo.py")
    with pytest.raises(ValueError, match="Did you mean 'debug'"):
        realjax.load_config("ppo.py:debg")


def test_a_config_beside_the_caller_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppo.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(variant):\n    return ConfigDict({'own': variant})\n"
    )
    assert realjax.load_config("ppo.py:mine").own == "mine"


def test_a_plan_says_where_every_call_would_run():
    config = realjax.load_config("ppo.py:debug")
    with nothing_compiles():
        plan = realjax.plan(config)
    assert list(plan.calls) == list(plan.as_dict()["calls"])
    assert {name: str(one.allocation) for name, one in plan.calls.items()} == {
        "rollout": "d2t2@0-3",
        "reward": "d2@6-7+offload",
        "reference": "d2@4-5+offload",
        "value": "f2t2@4-7",
        "advantages": "d2f4@0-7",
        "train_policy": "d2f4@0-7",
        "train_critic": "f2t2@4-7",
    }
    assert "train_policy  d2f4@0-7" in str(plan)


def test_a_plan_may_be_for_another_cluster():
    # Sixteen devices, which this machine does not have; and fewer than it is for.
    config = realjax.load_config("ppo.py:debug")
    config.allocation, config.allocations.rollout = "d16", ""
    assert str(realjax.plan(config, 16).calls["rollout"].allocation) == "d16@0-15"
    config.allocation = "d4"
    assert str(realjax.plan(config, 4).calls["train_policy"].allocation) == "d4@0-3"
    with pytest.raises(ValueError, match="there are 8 devices"):
        config.allocation = "d16"
        realjax.plan(config)


def test_a_plan_of_stages_is_that_of_the_last():
    plan = realjax.plan(realjax.load_config("quickstart.py"))
    assert str(plan.calls["rollout"].allocation) == "d4t2@0-7"


# -- a run -----------------------------------------------------------------------------


def three_steps(world):
    config = sft_config(world)
    config.steps = 3
    config.allocation = "f2t2@4-7"
    config.data.valid_path = config.data.path
    config.checkpoint.export = True
    return config


@pytest.fixture(scope="module")
def result(world, tmp_path_factory):
    return train(three_steps(world), tmp_path_factory.mktemp("run") / "run")


def test_a_run_gives_metrics_as_arrays_aligned_by_step(result):
    metrics = result.metrics
    assert metrics["step"].tolist() == [0, 1, 2, 3]
    assert all(len(values) == 4 for values in metrics.values())
    # Step 0 is the evaluation before training: it has no loss, and step 1 no other.
    assert np.isfinite(metrics["loss"]).tolist() == [False, True, True, True]
    evaluated = np.isfinite(metrics["eval/loss"])
    assert evaluated.tolist() == [True, False, False, True]
    assert result.is_finished


def test_a_run_gives_its_models(result):
    assert list(result.roles) == ["policy"]
    model = result.roles["policy"]
    assert str(model.allocation) == "f2t2@4-7"
    tokens = np.array([[5, 6, 7]], np.int32)
    assert model.logits(tokens).shape == (1, 3, 300)
    completions = realjax.sample(model, PROMPTS, max_new_tokens=4)
    assert [one.prompt for one in completions] == list(range(len(PROMPTS)))
    # The export is the same model.
    exported = realjax.load(result.workdir / "export" / "policy", "d1")
    np.testing.assert_allclose(exported.logits(tokens), model.logits(tokens), atol=1e-5)
    assert exported.tokenizer.fingerprint() == model.tokenizer.fingerprint()


def test_a_finished_run_is_given_again_also_by_a_dict(result, world):
    again = train(three_steps(world).to_dict(), result.workdir)
    assert again.is_finished
    for name, values in result.metrics.items():
        np.testing.assert_array_equal(again.metrics[name], values)
