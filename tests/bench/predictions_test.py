"""Tests of `realjax/bench/predictions.py`: a plan and a setting, in moments."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.bench import predictions
from realjax.bench.plan_steps import Setting, roles_of, space_of
from realjax.planner.cluster import Cluster
from realjax.planner.coefficients import Profile, store_profile
from realjax.planner.cost import Coefficients
from realjax.planner.simulate import price

SMALL = Setting(width=32, num_layers=1, num_prompts=8, prompt_tokens=4, new_tokens=4)
CPU = Cluster.load("8xcpu")


@pytest.fixture
def stored(tmp_path):
    """The flags for a profile that nobody measured, and small steps."""
    found = Profile(coefficients=Coefficients(), cluster=CPU, jax="0", realjax="0")
    path = store_profile(found, tmp_path / "profile.json")
    flags = "--steps=1 --width=32 --num_layers=1 --num_prompts=8 --new_tokens=4"
    return [f"--profile={path}", *flags.split()]


def run(arguments, capsys):
    """What the command prints last."""
    assert predictions.main(arguments) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_random_plan_is_predicted_and_run(stored, tmp_path, capsys):
    flags = ["--plans=1", "--settings=0", f"--picture={tmp_path}/found.svg"]
    report = run([*stored, *flags], capsys)
    (row,) = report["plans"]
    assert row["predicted_seconds"] > 0
    assert row["measured_seconds"] > 0
    assert len(row["calls"]) == 6
    for call in row["calls"].values():
        assert call["measured_seconds"] > 0
    assert report["of_plans"].keys() == {
        "mean_error",
        "worst_error",
        "bias",
        "rank_correlation",
    }
    assert (tmp_path / "found.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_a_searched_plan_runs_beside_the_symmetric_one(stored, monkeypatch, capsys):
    monkeypatch.setattr(predictions, "SETTINGS", (SMALL,))
    flags = ["--plans=0", "--compared_steps=1", "--seconds=0.1"]
    report = run([*stored, *flags], capsys)
    (setting,) = report["settings"]
    assert set(setting["plans"]) == {"searched", "symmetric"}
    assert len(set(setting["plans"]["symmetric"].values())) == 1
    assert report["of_settings"]["worst_ratio"] == setting["ratio"]


def test_a_setting_needs_a_symmetric_plan(stored, monkeypatch):
    few = dataclasses.replace(SMALL, num_prompts=4)
    monkeypatch.setattr(predictions, "SETTINGS", (few,))
    with pytest.raises(ValueError, match="as many prompts as there are devices"):
        predictions.main([*stored, "--plans=0"])


def test_agreement_is_of_errors_and_ranks():
    rows = [
        {"predicted_seconds": p, "measured_seconds": m}
        for p, m in ((1.0, 1.0), (3.0, 2.0), (3.6, 4.0))
    ]
    found = predictions.agreement(rows)
    assert found["mean_error"] == pytest.approx((0 + 0.5 + 0.1) / 3)
    assert found["worst_error"] == pytest.approx(0.5)
    assert found["bias"] == pytest.approx((0.5 - 0.1) / 3)
    assert found["rank_correlation"] == pytest.approx(1.0)


def test_random_plans_are_different_and_fit():
    space = space_of(SMALL, CPU, Coefficients())
    plans = predictions.random_plans(space, 20, seed=0)
    assert len(set(plans)) == 20
    assert plans == predictions.random_plans(space, 20, seed=0)
    priced = price(space.problem, jnp.asarray(plans))
    assert float(priced.memory_bytes.max()) <= CPU.device.memory_bytes
    # Ranges of all sizes.
    sizes = {a.size for plan in plans for a in space.chosen(plan).values()}
    assert sizes == {1, 2, 4, 8}


def test_the_default_model_has_about_five_million_parameters():
    role = roles_of(Setting())["policy"]
    assert role.model.num_parameters == pytest.approx(5.4e6, rel=0.05)
    scalar = roles_of(Setting())["critic"].model
    assert scalar == dataclasses.replace(role.model, head="scalar")
    assert np.unique([str(s) for s in predictions.SETTINGS]).size == 5
