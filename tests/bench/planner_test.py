"""Tests of `realjax/bench/planner.py`, on four devices."""

import json

from realjax.bench import planner


def test_searches_end_at_the_best_of_all_plans(capsys):
    arguments = ["--enumerate", "--cluster=4xh100", "--model=3.2-1b"]
    arguments += ["--seeds=2", "--seconds=0.3"]
    assert planner.main(arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    best = report["real"]["enumeration"]["best_seconds"]
    for seconds in report["real"]["seconds_of_a_step"]:
        assert seconds == best
    assert report["all"]["num_plans"] > report["real"]["num_plans"] > 1000
    # More options, and a bound that holds.
    assert min(report["all"]["seconds_of_a_step"]) <= best
    assert report["all"]["gap"] >= 0
