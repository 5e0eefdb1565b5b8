"""Tests of `realjax/cli/profile.py`: a profile of moments, and where it goes."""

import json

import pytest

from realjax.cli import profile as cli
from realjax.planner.cluster import Cluster
from realjax.planner.coefficients import (
    Checked,
    Profile,
    coefficients_of,
    read_profile,
    versions,
)
from realjax.planner.cost import Coefficients


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What is said to have been measured, and how long it should have taken."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("REALJAX_PROFILES", raising=False)
    minutes = []

    def profile(cluster, *, minutes, seed, progress, _found=minutes):
        _found.append(minutes)
        progress(0.5, 3, "infer of 2 x 64")
        checked = Checked(name="train", seconds=1.0, predicted_seconds=1.1)
        return Profile(
            coefficients=Coefficients(products=3.0),
            cluster=cluster,
            num_fitted=5,
            checked=(checked,),
            **versions(),
        )

    monkeypatch.setattr(cli, "profile", profile)
    return minutes


def test_what_was_measured_is_found_by_the_planner(measured, capsys):
    assert cli.command(["--minutes=2"]) == 0
    assert measured == [2.0]
    *lines, last = capsys.readouterr().out.splitlines()
    found = Profile.from_dict(json.loads(last))
    assert found.coefficients.products == 3.0
    assert any("mean error of 10.0 %" in line for line in lines)
    assert any("+10 %: train" in line for line in lines)
    known = coefficients_of(Cluster.detect())
    assert known.is_measured
    assert known.coefficients == found.coefficients


def test_it_can_be_written_to_a_file(measured, tmp_path):
    path = tmp_path / "folder" / "profile.json"
    assert cli.command([f"--output={path}"]) == 0
    assert read_profile(path).num_fitted == 5
    assert not coefficients_of(Cluster.detect()).is_measured


def test_bad_flags_are_refused(capsys):
    assert cli.command(["--minutes=-1"]) == 2
    assert cli.command(["--minute=1"]) == 2
    assert "There is no flag --minute. Did you mean" in capsys.readouterr().err
