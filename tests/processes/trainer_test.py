"""Tests of the trainer in runs of several processes."""

import numpy as np

import realjax
from tests.processes import runs
from tests.processes.launch import launch
from tests.runtime import small_runs

SAME = ("loss", "num_tokens", "grad_norm", "learning_rate", "eval/loss")


def test_two_processes_train_as_one_and_stop_and_go_on_together(tmp_path):
    small_runs.write_data(tmp_path)
    alone = runs.small_run(tmp_path, tmp_path / "alone", "f2@0-1")
    found = launch(
        runs.stop_and_go_on,
        str(tmp_path),
        str(tmp_path / "two"),
        "f2@0-1",
        num_processes=2,
        num_devices=1,
    )
    for stopped, finished in found:
        # The signal reached one process; both end after the same step.
        assert (stopped["step"], stopped["is_finished"]) == (2, False)
        assert (finished["step"], finished["is_finished"]) == (4, True)
        # Of four rows a step each process reads the two of its device; and one record,
        # at the start, to see which keys there are.
        assert stopped["num_rows_read"] == finished["num_rows_read"] == 2 * 2 + 1
        assert finished["metrics"].keys() == alone["metrics"].keys()
        for name in SAME:
            np.testing.assert_allclose(
                finished["metrics"][name], alone["metrics"][name], rtol=1e-4
            )
    models = [
        realjax.load(tmp_path / name / "export/policy", "d1").parameters
        for name in ("alone", "two")
    ]
    runs.jax.tree.map(
        lambda mine, theirs: np.testing.assert_allclose(mine, theirs, atol=1e-4),
        *models,
    )


def test_one_process_finds_the_plan_and_all_take_it(tmp_path):
    small_runs.write_data(tmp_path)
    first, second = launch(
        runs.found_plan, str(tmp_path), num_processes=2, num_devices=2
    )
    assert first["origin"] == "search"
    assert first == second
