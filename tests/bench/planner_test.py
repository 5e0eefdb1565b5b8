"""Tests of `realjax/bench/planner.py`, on few devices."""

import json

import pytest

from realjax.bench import planner, planner_growth
from realjax.bench.planner_problems import NAMES, graph_of, problem


def report_of(capsys, *arguments):
    assert planner.main(arguments) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_searches_end_at_the_best_of_all_plans(capsys):
    arguments = ("--enumerate", "--node=4xh200", "--seeds=2", "--seconds=0.5")
    report = report_of(capsys, *arguments)
    best = report["real"]["enumeration"]["best_seconds"]
    for seconds in report["real"]["seconds_of_a_step"]:
        # Half a second is a few moves on a busy machine.
        assert best <= seconds <= 1.05 * best
    assert report["all"]["num_plans"] > report["real"]["num_plans"] > 100
    # More options, and a bound that holds.
    assert min(report["all"]["seconds_of_a_step"]) <= best
    assert min(report["all"]["gaps"]) >= 0


@pytest.mark.slow
def test_short_searches_are_compared_with_long_ones(capsys, tmp_path):
    common = ("--problems", "ppo_7_7", "--clusters", "2x8xh100", "--seconds=0.5")
    path = f"--references={tmp_path / 'kept.json'}"
    kept = report_of(capsys, "--reference", "--seeds=2", *common, path)["references"]
    (entry,) = kept.values()
    assert entry["lower_bound"] <= entry["seconds_of_a_step"] <= entry["symmetric"]
    known = report_of(capsys, "--known", *common, path)["known"]
    assert known["ppo_7_7 2x8xh100"]["above_the_best"] > -0.5
    # A worse search does not replace what is kept.
    again = report_of(capsys, "--reference", "--seeds=1", *common, path)["references"]
    (after,) = again.values()
    assert after["seconds_of_a_step"] <= entry["seconds_of_a_step"]


@pytest.mark.slow
def test_growth_is_measured_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(planner_growth, "CALLS", (6, 7))
    monkeypatch.setattr(planner_growth, "DEVICES_OF_CALLS", 8)
    growth = planner_growth.measured([8, 16], num_plans=2**14)
    assert [row["num_devices"] for row in growth["devices"]] == [8, 16]
    assert [row["num_calls"] for row in growth["calls"]] == [6, 7]
    assert all(0 < row["memory_gib"] < 2 for row in growth["devices"])
    planner_growth.draw(growth, tmp_path / "growth.svg")
    assert "<svg" in (tmp_path / "growth.svg").read_text()


def test_problems_are_of_many_kinds():
    for name in (*NAMES, "rewards_20"):
        graph, _ = graph_of(name)
        assert graph.trained_roles
    assert len(problem("rewards_8", "8xh100").names) == 8
    with pytest.raises(ValueError, match=r"no problem 'ppo_8_7'.*rewards_N"):
        graph_of("ppo_8_7")
