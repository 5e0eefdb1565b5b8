"""Tests of `realjax/planner/coefficients.py`."""

import dataclasses

import numpy as np
import pytest

from realjax.planner import coefficients as lib
from realjax.planner.cluster import Cluster
from realjax.planner.coefficients import DATA_SHEET, Checked, Profile, fit
from realjax.planner.cost import Coefficients, Quantities


def test_a_fit_finds_the_coefficients_that_made_the_seconds():
    generator = np.random.default_rng(0)
    truth = Coefficients(products=2.5, layer_seconds=1e-4)
    units = 1 / np.asarray(dataclasses.astuple(truth))
    needs = [Quantities(*(units * generator.random(8))) for _ in range(40)]
    found = fit([(q, truth.seconds(q)) for q in needs], trust=1e-6)
    for name, value in dataclasses.asdict(truth).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4)


def test_half_and_twice_are_as_wrong_as_each_other():
    # Of 1 and 4 seconds for the same work, 2: twice the one and half of the other.
    needs = Quantities(products=1.0)
    found = fit([(needs, 1.0), (needs, 4.0)], trust=1e-6)
    assert found.products == pytest.approx(2.0, rel=1e-3)


def test_a_fit_keeps_to_the_prior_where_nothing_was_measured():
    prior = Coefficients()
    found = fit([(Quantities(products=1.0), 3.0)], trust=0.01)
    assert found.products == pytest.approx(3.0, rel=1e-3)
    assert found.network == pytest.approx(prior.network)
    # No device does better than its data sheet.
    quick = [(Quantities(products=1.0), 0.5)]
    assert fit(quick, trust=1e-3).products == pytest.approx(0.5, rel=1e-3)
    assert fit(quick, trust=1e-3, least=DATA_SHEET).products == 1.0
    with pytest.raises(ValueError, match="no measurements"):
        fit([])


def profile(**changes):
    values = {
        "coefficients": Coefficients(products=2.5),
        "cluster": Cluster.load("8xh100"),
        "num_fitted": 40,
        "checked": (
            Checked(name="infer", seconds=2.0, predicted_seconds=1.0),
            Checked(name="train", seconds=4.0, predicted_seconds=5.0),
        ),
        **lib.versions(),
    }
    return Profile(**values | changes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("REALJAX_PROFILES", raising=False)
    return tmp_path / "realjax" / "profiles"


def test_profiles_may_be_kept_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("REALJAX_PROFILES", str(tmp_path / "elsewhere"))
    assert lib.store_profile(profile()).parent == tmp_path / "elsewhere"


def test_what_was_measured_is_found_by_kind_and_version(cache):
    assert lib.find_profile(Cluster.load("8xh100")) is None
    path = lib.store_profile(profile())
    assert path.parent == cache
    # However many there are.
    assert lib.find_profile(Cluster.load("4x8xh100")) == profile()
    assert lib.find_profile(Cluster.load("8xh200")) is None
    lib.store_profile(profile(cluster=Cluster.load("8xh200"), jax="0.1"))
    assert lib.find_profile(Cluster.load("8xh200")) is None


def test_devices_that_share_cores_are_of_a_kind_of_their_own():
    shared = dataclasses.replace(Cluster.load("8xcpu"), concurrent_devices=2)
    lib.store_profile(profile(cluster=shared))
    assert lib.find_profile(shared) is not None
    assert lib.find_profile(Cluster.load("8xcpu")) is None


def test_it_is_said_whether_coefficients_were_measured():
    cluster = Cluster.load("8xh100")
    known = lib.coefficients_of(cluster)
    assert (known.coefficients, known.is_measured) == (Coefficients(), False)
    assert "realjax.cli.profile" in known.source
    lib.store_profile(profile())
    known = lib.coefficients_of(cluster)
    assert (known.coefficients.products, known.is_measured) == (2.5, True)
    # Half too short, and a quarter too long.
    assert "mean error of 38 %" in known.source


def test_a_profile_says_how_well_it_predicts():
    worst = profile().worst
    assert worst is not None
    assert (worst.name, worst.error) == ("infer", -0.5)
    assert profile().mean_error == pytest.approx((0.5 + 0.25) / 2)
    assert np.isnan(profile(checked=()).mean_error)


def test_files_that_hold_no_profile_are_refused(tmp_path):
    path = tmp_path / "profile.json"
    lib.store_profile(profile(), path)
    assert lib.read_profile(path) == profile()
    path.write_text('{"coeficients": {}}')
    with pytest.raises(
        ValueError, match=r"profile\.json: A profile has no 'coeficients'"
    ):
        lib.read_profile(path)
    path.write_text('{"jax": "0.11.2"}')
    with pytest.raises(ValueError, match=r"no profile.*Measure one anew"):
        lib.read_profile(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        lib.read_profile(path)
