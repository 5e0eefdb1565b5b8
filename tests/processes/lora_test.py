"""Adapters in runs of several processes."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes import adapted, runs
from tests.processes.launch import launch

pytestmark = pytest.mark.slow  # Seven programs compile in every process.


def tensors(folder):
    return load_file(folder / "merged/model.safetensors") | load_file(
        folder / "adapters/adapter_model.safetensors"
    )


def test_processes_train_move_and_save_adapters_as_one_does(tmp_path):
    (alone,) = launch(
        adapted.adapted_steps, str(tmp_path / "1"), num_processes=1, num_devices=8
    )
    both = launch(
        adapted.adapted_steps, str(tmp_path / "2"), num_processes=2, num_devices=4
    )
    for one in both:
        runs.check_equal(one, alone)
        assert one["is_same"]
        first, second = (step["moved"] for step in one["steps"])
        assert second < 0.5 * first
        assert [first, second] == [step["moved"] for step in alone["steps"]]
    found, wanted = tensors(tmp_path / "2"), tensors(tmp_path / "1")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)
