"""PPO killed, stopped and moved: it goes on as if nothing had happened."""

import io
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from realjax.core.metrics import read_metrics
from realjax.models import hf
from realjax.parallel.allocation import Allocation
from realjax.runtime import named_arrays, resuming
from realjax.runtime.checkpoint import Checkpointer
from realjax.runtime.console import Console
from realjax.runtime.run import prepare
from realjax.runtime.trainer import Trainer
from tests.e2e.small_ppo import (
    BATCH,
    NUM_PROMPTS,
    RATE,
    SAVE_EVERY,
    SOURCES,
    UPDATES,
    Process,
    complete_steps,
    fields,
    last_row,
    run_config,
    train,
    write_world,
)
from tests.runtime.small_runs import (
    check_same_arrays,
    check_same_metrics,
    exported_files,
    saved_arrays,
)

STEPS = 7  # Two epochs of 26 prompts by 8: the fourth batch is of both, the last short.
OTHER = {"train_policy": "f2t2@0-3", "train_critic": "d2@6-7", "reference": "t2@0-1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run that nothing interrupts, in this process."""
    workdir = tmp_path_factory.mktemp("whole")
    result, _ = train(fields(world, epochs=2), workdir)
    assert result.is_finished
    return result


def check_same_run(workdir, other, step):
    """Metrics but durations, every array that is saved, every file that is exported."""
    check_same_metrics(workdir, other)
    check_same_arrays(saved_arrays(workdir, step), saved_arrays(other, step))
    assert exported_files(workdir) == exported_files(other)


# -- killed and stopped ------------------------------------------------------------


def kill(process, *, after_step, delay_seconds=None):
    """Kills a process after a step, inside a save unless there is a delay.

    Returns:
        The step it must go on from; whether files of a save were left half written.
    """
    process.wait_until(lambda: process.step >= after_step)
    if delay_seconds is None:
        process.wait_until(process.is_saving)
    else:
        time.sleep(delay_seconds)
    assert process.end(signal.SIGKILL) == -signal.SIGKILL, process.text
    saved = complete_steps(process.workdir)[-1]
    # Nothing that was done and told costs more than the steps between two saves.
    assert 0 < saved <= last_row(process.workdir) <= saved + SAVE_EVERY
    return saved, process.is_saving()


def test_killed_in_a_save_and_stopped_it_ends_as_one_that_was_not(
    world, whole, tmp_path
):
    values, workdir = fields(world, epochs=2), tmp_path / "run"
    for after_step in (SAVE_EVERY + 1, SAVE_EVERY + 3):
        with Process(values, workdir, cwd=tmp_path) as process:
            saved, is_inside = kill(process, after_step=after_step)
            assert process.resumed <= saved
        if is_inside:
            break
    assert is_inside, "No kill fell inside a save."

    with Process(values, workdir, cwd=tmp_path) as process:
        process.wait_until(lambda: process.step > saved)
        assert process.end(signal.SIGTERM) == 130
        assert process.resumed == saved
        stopped = complete_steps(workdir)[-1]
        assert saved < stopped == last_row(workdir) < STEPS
        message = f"stopped by SIGTERM after step {stopped}; the same command goes on"
        assert message in process.text

    with Process(values, workdir, cwd=tmp_path) as process:
        assert process.end() == 0, process.text
        assert process.resumed == stopped
    check_same_run(workdir, whole.workdir, STEPS)


@pytest.mark.slow
def test_killed_ten_times_it_ends_as_one_that_was_not(world, tmp_path):
    values = fields(world, epochs=10)  # 33 steps.
    result, _ = train(values, tmp_path / "whole")
    steps = int(result.metrics["step"][-1])
    assert steps == 33
    workdir, generator = tmp_path / "run", random.Random(0)
    saved, kills = 0, []
    while len(kills) < 10:
        with Process(values, workdir, cwd=tmp_path) as process:
            # The first comes after the first save, each other one after a few steps
            # more: in turns at a random moment, and as soon as a save is seen.
            in_save = len(kills) % 2 == 1
            later = generator.randint(SAVE_EVERY if in_save else 1, SAVE_EVERY + 1)
            last, is_inside = kill(
                process,
                after_step=max(saved, SAVE_EVERY) + later,
                delay_seconds=None if in_save else generator.uniform(0, 0.5),
            )
            assert process.resumed == saved
        saved = last
        kills.append((saved, is_inside))
    with Process(values, workdir, cwd=tmp_path) as process:
        process.wait_until(lambda: process.step > saved)
        assert process.end(signal.SIGINT) == 130
        assert process.resumed == saved
        stopped = complete_steps(workdir)[-1]
        assert f"stopped by SIGINT after step {stopped}" in process.text
    with Process(values, workdir, cwd=tmp_path) as process:
        assert process.end() == 0, process.text
        assert process.resumed == stopped
    print("resumed from (step, whether a save was under way):", kills)
    assert sum(is_inside for _, is_inside in kills) >= 3
    check_same_run(workdir, result.workdir, steps)


@pytest.mark.slow
def test_killed_with_a_rollout_that_waits_it_goes_on_with_it(world, tmp_path):
    values = fields(world, epochs=2, **{"hp.staleness": 1})
    result, _ = train(values, tmp_path / "whole")
    staleness = result.metrics["completions/staleness"][1:]
    assert staleness.tolist() == [0, *[1] * (STEPS - 1)]
    workdir = tmp_path / "run"
    with Process(values, workdir, cwd=tmp_path) as process:
        saved, _ = kill(process, after_step=SAVE_EVERY + 1, delay_seconds=0.0)
    with Process(values, workdir, cwd=tmp_path) as process:
        assert process.end() == 0, process.text
        assert process.resumed == saved
    check_same_run(workdir, result.workdir, STEPS)


# -- what a checkpoint brings back -------------------------------------------------


@pytest.fixture
def halfway(world, whole, tmp_path):
    """Opens a copy of the run as it stood at step 4; `changes` as in `fields`."""
    shutil.copytree(whole.workdir, tmp_path / "run")
    for step in complete_steps(tmp_path / "run"):
        if step > 4:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    opened = []

    def open_trainer(**changes):
        run = prepare(run_config(fields(world, epochs=2, **changes)))
        console = Console(file=io.StringIO(), width=200)
        opened.append(Trainer(run, tmp_path / "run", console))
        return opened[-1]

    yield open_trainer
    for trainer in opened:
        trainer.close()


def arrays_of(trainer):
    """Everything that the trainer would save now, by its path."""
    leaves = named_arrays.flatten(resuming.saved_arrays(trainer.executor))
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def test_a_checkpoint_brings_back_all_that_changes_in_a_run(world, whole, halfway):
    trainer = halfway()
    saved = saved_arrays(whole.workdir, 4)
    check_same_arrays(arrays_of(trainer), saved)
    # The coefficient has adapted, and the normaliser has seen value targets.
    state = trainer.executor.calls.transform_states["advantages"]
    assert abs(float(state["kl_coef"]) - 0.1) > 1e-4
    # Four batches, each weighing 0.99995 of the next: 1 + 0.99995 + … = 3.9997.
    assert float(state["values"].weight) == pytest.approx(3.9997, abs=1e-5)
    assert float(state["values"].mean) != 0
    assert trainer.loader.state()["position"] == 4 * BATCH
    assert trainer.step == 4
    with Checkpointer(whole.workdir / "checkpoints", read_only=True) as checkpointer:
        metadata = checkpointer.read_metadata(4)
    assert trainer.samples == metadata["samples"]
    assert trainer.samples["before"] and trainer.samples["after"]
    # Roles that nothing trains come from where they came from before.
    for role in ("reference", "reward"):
        source = hf.load(world / SOURCES[role])
        found = trainer.executor.store.at_home(role)
        jax.tree.map(np.testing.assert_array_equal, found, source)


def test_a_run_that_is_restored_says_so_and_forgets_later_metrics(halfway):
    trainer = halfway()
    assert "resumed from the checkpoint of step 4" in (
        trainer.console._console.file.getvalue()
    )
    assert last_row(trainer.workdir) == 4


def test_on_another_allocation_the_same_arrays_go_on(whole, halfway):
    changes = {f"allocations.{call}": text for call, text in OTHER.items()}
    trainer = halfway(benchmark_steps=1, **changes)
    check_same_arrays(arrays_of(trainer), saved_arrays(whole.workdir, 4))
    for role, call in (("policy", "train_policy"), ("critic", "train_critic")):
        devices = set(Allocation.parse(OTHER[call]).devices)
        for leaf in jax.tree.leaves(trainer.executor.store.train_state(role)):
            assert {device.id for device in leaf.sharding.device_set} == devices
    trainer.train()
    found, wanted = read_metrics(trainer.workdir / "metrics.jsonl"), whole.metrics
    assert found["step"][-1] == 5
    # Step 5 draws the same tokens and takes the same updates, but for rounding.
    for name in ("completions/mean_length", "num_tokens", "prompts/mean_length"):
        assert found[name][5] == wanted[name][5]
    for name in ("loss/value_avg", "objective/kl", "grad_norm/critic"):
        np.testing.assert_allclose(found[name][5], wanted[name][5], rtol=1e-3)


# -- what PPO's numbers count ------------------------------------------------------


def test_ppo_is_evaluated_before_every_third_step_and_after(whole):
    metrics = whole.metrics
    for name in ("eval/objective/scores", "eval/scores_mean", "eval/val/values"):
        measured = metrics["step"][np.isfinite(metrics[name])]
        assert measured.tolist() == [0, 3, 6, STEPS]
    # The first evaluation's policy is the reference.
    assert abs(metrics["eval/objective/kl"][0]) < 1e-5
    assert metrics["eval/objective/kl"][-1] > 1e-3


def test_every_minibatch_of_every_epoch_is_an_update_of_the_schedule(whole):
    counts = {
        int(value)
        for name, value in saved_arrays(whole.workdir, STEPS).items()
        if name.endswith("/count")
    }
    assert counts == {STEPS * UPDATES}
    # Linear decay over 28 updates: those of step s are numbers 4s-4 to 4s-1.
    done = UPDATES * (whole.metrics["step"][1:] - 1) + (UPDATES - 1) / 2
    rates = RATE * (1 - done / (STEPS * UPDATES))
    for role in ("policy", "critic"):
        found = whole.metrics[f"learning_rate/{role}"][1:]
        np.testing.assert_allclose(found, rates, rtol=1e-5)


def test_the_last_batch_counts_only_prompts_that_are_there(whole):
    metrics = whole.metrics
    numbers = [BATCH] * (STEPS - 1) + [2 * NUM_PROMPTS - (STEPS - 1) * BATCH]
    means = metrics["prompts/mean_length"] + metrics["completions/mean_length"]
    np.testing.assert_allclose(
        metrics["num_tokens"][1:], np.array(numbers) * means[1:], rtol=1e-6
    )
