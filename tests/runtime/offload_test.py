"""Tests of runs whose trained role waits in host memory."""

import dataclasses
import gc
import shutil

import jax
import numpy as np
import pytest

from realjax.realloc import live_bytes
from realjax.runtime.checkpoint import CheckpointConfig, Checkpointer
from realjax.runtime.memory import run_account
from realjax.runtime.run import prepare
from tests.runtime import small_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("data")
    small_runs.write_data(found)
    return found


def config(folder, **role):
    plain = small_runs.sft_config(
        folder,
        steps=3,
        checkpoint=CheckpointConfig(every_steps=1, keep=5, export=False),
    )
    policy = plain.roles["policy"]
    if role.pop("streamed", False):
        optimizer = dataclasses.replace(policy.optimizer, offload=True)
        policy = dataclasses.replace(policy, optimizer=optimizer)
    policy = dataclasses.replace(policy, **role)
    return dataclasses.replace(plain, roles={"policy": policy})


@pytest.fixture(scope="module")
def resident(folder):
    small_runs.train(config(folder), folder / "resident")
    return small_runs.saved_arrays(folder / "resident", 3)


@pytest.mark.parametrize(
    "streamed", (False, pytest.param(True, marks=pytest.mark.slow))
)
def test_masters_and_moments_that_wait_on_the_host_train_and_resume_alike(
    folder, resident, streamed
):
    away = config(folder, offload=True, streamed=streamed)
    workdir = folder / f"away-{streamed}"
    result, _ = small_runs.train(away, workdir)
    found = small_runs.saved_arrays(workdir, 3)
    assert found.keys() == resident.keys()
    for name, wanted in resident.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-6)
    # What comes back from the host for a result is on the devices.
    for leaf in jax.tree.leaves(result.roles["policy"].parameters):
        assert leaf.sharding.memory_kind == "device"
    # From the checkpoint of step 2 it goes on bit for bit.
    again = folder / f"again-{streamed}"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "3")
    _, text = small_runs.train(away, again)
    assert "resumed from the checkpoint of step 2" in text
    small_runs.check_same_arrays(small_runs.saved_arrays(again, 3), found)


def test_what_is_restored_finds_the_devices_empty(folder, resident, monkeypatch):
    again = folder / "empty"
    shutil.copytree(folder / "resident", again)
    shutil.rmtree(again / "checkpoints" / "3")
    restore, found = Checkpointer.restore_latest, []

    def measured(checkpointer, *arguments, **options):
        gc.collect()
        found.append(live_bytes() - before)
        return restore(checkpointer, *arguments, **options)

    monkeypatch.setattr(Checkpointer, "restore_latest", measured)
    gc.collect()
    before = live_bytes()
    _, text = small_runs.train(config(folder), again)
    assert "resumed from the checkpoint of step 2" in text
    # Not a second set of masters and moments, which might not fit beside the first.
    size = sum(array.nbytes for array in resident.values())
    assert len(found) == 1 and found[0] < size / 10
    small_runs.check_same_arrays(small_runs.saved_arrays(again, 3), resident)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(folder):
    tight = dataclasses.replace(config(folder), memory_gib=1e-4)
    with pytest.raises(ValueError, match=r"The plan needs \S+ GiB on device 0"):
        small_runs.train(tight, folder / "tight")
    assert run_account(prepare(config(folder))).fits
