"""Win rates and pass@k in runs of several processes."""

import numpy as np
import pytest

from tests.processes import trying
from tests.processes.launch import launch
from tests.runtime import small_runs


@pytest.mark.slow
def test_two_processes_judge_as_one(tmp_path):
    small_runs.write_data(tmp_path)
    alone = trying.judged_run(tmp_path, tmp_path / "alone", "f2@0-1")
    found = launch(
        trying.judged_run,
        str(tmp_path),
        str(tmp_path / "two"),
        "f2@0-1",
        num_processes=2,
        num_devices=1,
    )
    names = [name for name in alone if name.startswith("eval/")]
    assert {"eval/win_rate", "eval/pass@2"} <= set(names)
    for metrics in found:
        assert metrics.keys() == alone.keys()
        for name in names:
            np.testing.assert_allclose(metrics[name], alone[name], rtol=1e-4, atol=1e-5)
