"""Whole runs in one process, on models of a moment."""

import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import struct
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import realjax
from realjax.dataflow import DataflowGraph, call
from realjax.functions import Train
from realjax.functions.optimizer import OptimizerConfig
from realjax.rl.masking import Mean
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.console import Console
from realjax.runtime.executor import Executor
from realjax.runtime.profile import Profiler
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.runtime.trainer import NonFiniteError
from realjax.runtime.watch import Watch
from realjax.runtime.workdir import WorkdirError
from tests.runtime.small_runs import (
    check_same_arrays,
    check_same_metrics,
    data_config,
    exported_files,
    new_role,
    saved_arrays,
    sft_config,
    train,
    write_data,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def epochs_config(folder, **changes):
    """Two epochs of 9 records, 4 at a time: 5 steps, the last with 2 records."""
    return sft_config(
        folder,
        **{
            "epochs": 2,
            "tensorboard": True,
            "evaluation": EvaluationConfig(every_steps=2),
            "checkpoint": CheckpointConfig(every_steps=2, keep=2),
        }
        | changes,
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupts: its result, and what it printed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result, text = train(epochs_config(data), workdir)
    assert result.is_finished
    return result, text


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def measured_steps(metrics, name):
    return metrics["step"][np.isfinite(metrics[name])].tolist()


# -- steps and epochs --------------------------------------------------------------


def test_two_epochs_of_nine_records_by_four_are_five_steps(whole):
    metrics = whole[0].metrics
    assert metrics["step"].tolist() == [0, 1, 2, 3, 4, 5]
    # Records 0-3, 4-7, 8 and the next epoch's 0-2, 3-6, 7-8.
    assert metrics["epoch"][1:].tolist() == [0, 0, 0, 1, 1]


def test_a_run_by_steps_goes_on_over_the_ends_of_epochs(data, tmp_path):
    result, _ = train(sft_config(data, steps=4), tmp_path)
    # Records 0-3, 4-7, 8 and three more, 3-6.
    assert result.metrics["epoch"].tolist() == [0, 0, 0, 1]


def test_tokens_are_counted_by_real_lengths(data, whole):
    tokenizer = realjax.load(whole[0].workdir / "export" / "policy").tokenizer
    records = map(json.loads, (data / "answers_train.jsonl").open())
    lengths = [len(tokenizer.encode(r["prompt"] + r["answer"])) + 1 for r in records]
    # Neither padding nor the empty places of the last batch count.
    assert np.nansum(whole[0].metrics["num_tokens"]) == 2 * sum(lengths)


def test_the_schedule_covers_every_update_of_the_run(whole):
    # Two of five updates warm up, to 1/2 and 1; the decay would be at 0 with the sixth.
    expected = [0.5, 1.0, 1.0, 2 / 3, 1 / 3]
    rates = whole[0].metrics["learning_rate"][1:]
    np.testing.assert_allclose(rates, 1e-2 * np.array(expected), rtol=1e-6)
    counts = [
        int(value)
        for name, value in saved_arrays(whole[0].workdir, 5).items()
        if name.endswith("count")
    ]
    assert counts and set(counts) == {5}


def test_every_second_epoch_saves_when_two_and_four_are_done(data, tmp_path):
    # An epoch is 9 records: it ends within steps 3, 5, 7, 9 and 12.
    checkpoint = CheckpointConfig(every_epochs=2, keep=20, export=False)
    train(sft_config(data, epochs=5, checkpoint=checkpoint), tmp_path)
    assert saved_steps(tmp_path) == [5, 9, 12]


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


# -- what a run leaves behind ------------------------------------------------------


def test_evaluation_is_before_the_first_step_and_every_second_and_after_the_last(whole):
    metrics = whole[0].metrics
    assert measured_steps(metrics, "eval/loss") == [0, 2, 4, 5]
    assert measured_steps(metrics, "loss") == [1, 2, 3, 4, 5]
    assert metrics["eval/loss"][-1] < metrics["eval/loss"][0] - 0.1
    assert not {"eval/grad_norm", "eval/learning_rate"} & metrics.keys()


def test_metrics_are_one_object_a_step(whole):
    found = rows(whole[0].workdir)
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4, 5]
    needed = {"loss", "entropy", "ppl", "epoch", "learning_rate", "num_tokens"}
    needed |= {"timing_s/train_policy", "perf/step_seconds", "perf/tokens_per_second"}
    for row in found[1:]:
        assert needed <= row.keys()
        assert 0 < row["timing_s/train_policy"] <= row["perf/step_seconds"]


def test_training_returns_the_metrics_of_the_file_and_the_trained_roles(whole):
    result = whole[0]
    for index, row in enumerate(rows(result.workdir)):
        for name, value in row.items():
            assert result.metrics[name][index] == value
    tokens = np.array([[5, 6, 7, 8]], np.int32)
    exported = realjax.load(result.workdir / "export" / "policy", "d2@0-1")
    np.testing.assert_array_equal(
        result.roles["policy"].logits(tokens), exported.logits(tokens)
    )
    assert exported.tokenizer.decode(exported.tokenizer.encode("a cat")) == "a cat"


def test_the_last_two_checkpoints_stay_and_the_report_is_written(whole):
    result, text = whole
    assert saved_steps(result.workdir) == [4, 5]
    assert str(result.workdir / "report.html") in text
    assert "train_policy" in (result.workdir / "report.html").read_text()


def test_the_export_of_each_save_stands_beside_its_checkpoint(data, tmp_path):
    checkpoint = CheckpointConfig(every_steps=2)
    config = sft_config(data, steps=4, checkpoint=checkpoint)
    console = Interrupting(at_step=3, number=signal.SIGTERM)
    train(config, tmp_path, console=console)
    # Stopped in step 3, there is time for a checkpoint; the export is of step 2.
    assert saved_steps(tmp_path) == [2, 3]
    exported = realjax.load(tmp_path / "export" / "policy").parameters
    for step, is_same in ((2, True), (3, False)):
        saved = saved_arrays(tmp_path, step)["policy/parameters/embedding"]
        assert np.array_equal(exported["embedding"], saved) == is_same


def tensorboard_events(workdir):
    """Events of each file, files in the order in which they were made."""
    files = sorted(
        (workdir / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:])
    )
    found = []
    for path in files:
        data, events = path.read_bytes(), []
        while data:  # Length, its checksum, the event, its checksum.
            (size,) = struct.unpack("<Q", data[:8])
            events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
        found.append(events)
    return found


def test_tensorboard_has_a_point_a_step(whole):
    (events,) = tensorboard_events(whole[0].workdir)
    points = [
        (event.step, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.tag == "loss"
    ]
    assert [step for step, _ in points] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(
        [value for _, value in points], whole[0].metrics["loss"][1:], rtol=1e-6
    )


# -- stopping and going on ---------------------------------------------------------


class Interrupting(Console):
    """Sends this process a signal when a step is shown."""

    def __init__(self, at_step, number=signal.SIGINT):
        self.text = io.StringIO()
        super().__init__(file=self.text, width=200)
        self._at_step, self._number = at_step, number

    def step(self, step, *arguments):
        super().step(step, *arguments)
        if step == self._at_step:
            os.kill(os.getpid(), self._number)


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The same run with Ctrl-C in step 3, and then to its end."""
    workdir = tmp_path_factory.mktemp("stopped")
    console = Interrupting(at_step=3)
    first, _ = train(epochs_config(data), workdir, console=console)
    steps = saved_steps(workdir)
    second, text = train(epochs_config(data), workdir)
    return first, console.text.getvalue(), steps, second, text


def test_ctrl_c_ends_the_step_and_saves(stopped):
    first, text, steps, _, _ = stopped
    assert not first.is_finished
    assert "stopped by SIGINT after step 3; the same command goes on" in text
    assert steps == [2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stopped_run_goes_on_to_the_numbers_of_one_that_was_not(stopped, whole):
    _, _, _, second, text = stopped
    assert second.is_finished
    assert "resumed from the checkpoint of step 3" in text
    check_same_metrics(second.workdir, whole[0].workdir)
    check_same_arrays(
        saved_arrays(second.workdir, 5), saved_arrays(whole[0].workdir, 5)
    )
    assert exported_files(second.workdir) == exported_files(whole[0].workdir)


def test_a_run_killed_before_its_first_save_begins_anew(data, whole, tmp_path):
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(whole[0].workdir / name, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    _, text = train(epochs_config(data, tensorboard=False), tmp_path)
    assert "resumed" not in text
    check_same_metrics(tmp_path, whole[0].workdir)
    assert exported_files(tmp_path) == exported_files(whole[0].workdir)


def test_tensorboard_hides_points_of_steps_that_are_done_again(stopped):
    restarts = [
        event.step
        for events in tensorboard_events(stopped[3].workdir)
        for event in events
        if event.WhichOneof("what") == "session_log"
    ]
    assert restarts == [4]  # From here on, the earlier file does not count.


def test_a_finished_run_has_nothing_left_to_do(data, whole):
    workdir = whole[0].workdir
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for folder in ("checkpoints", "export", "figures")
        for path in (workdir / folder).rglob("*")
        if path.is_file()
    }
    metrics = (workdir / "metrics.jsonl").read_bytes()
    result, text = train(epochs_config(data), workdir)
    assert result.is_finished
    assert "report" in text and "step 5/5" not in text
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    for path, (time, content) in before.items():
        assert (path.stat().st_mtime_ns, path.read_bytes()) == (time, content)


def test_another_run_is_refused_and_the_folder_stays_usable(data, whole):
    workdir = whole[0].workdir
    with pytest.raises(WorkdirError, match="seed was 0 and is 1 now"):
        train(epochs_config(data, seed=1), workdir)
    # Found later, when the checkpoint is read: the folder is given back then, too.
    other = dataclasses.replace(epochs_config(data).data, shuffle=False)
    with pytest.raises(ValueError, match="saved data order has shuffle"):
        train(epochs_config(data, data=other), workdir)
    assert train(epochs_config(data), workdir)[0].is_finished


# -- benchmarks and profiles -------------------------------------------------------


def test_a_benchmark_stops_and_prints_medians(data, tmp_path):
    config = sft_config(data, steps=50, benchmark_steps=4)
    result, text = train(config, tmp_path)
    assert result.is_finished and len(result.metrics["step"]) == 4
    (line,) = (line for line in text.splitlines() if "timing_s/train_policy" in line)
    median, least, most, count = map(float, line.split()[1:])
    seconds = result.metrics["timing_s/train_policy"][2:]  # Two steps compile.
    assert count == 2
    np.testing.assert_allclose(
        [median, least, most],
        [np.median(seconds), seconds.min(), seconds.max()],
        rtol=1e-3,
    )


def test_a_trace_that_the_end_of_the_run_cuts_short_is_written(tmp_path):
    executor = object.__new__(Executor)  # Of a graph without calls, so to speak.
    executor.watch = Watch()
    profiler = Profiler("2:9", tmp_path)
    for step in (1, 2, 3):
        with profiler.step(step, executor):
            pass
    assert not (tmp_path / "profile" / "timeline.json").exists()
    profiler.close()
    assert (tmp_path / "profile" / "timeline.json").exists()
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    executor.watch.close()


@pytest.fixture(scope="module")
def reward_model(data, tmp_path_factory):
    """Nine pairs, four at a time: three steps, the last with one; step 2 is traced."""
    workdir = tmp_path_factory.mktemp("reward_model")
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    config = RunConfig(
        algorithm="reward_model",
        roles={"reward": new_role(data, optimizer)},
        data=data_config(data, "pairs", batch_size=4, max_pairs=1),
        allocation="d2@0-1",
        profile_steps="2:3",
        tensorboard=False,
    )
    return train(config, workdir)[0]


def test_a_reward_model_is_evaluated_before_and_after(reward_model):
    metrics = reward_model.metrics
    assert metrics["step"].tolist() == [0, 1, 2, 3]
    assert measured_steps(metrics, "eval/loss") == [0, 3]
    assert measured_steps(metrics, "eval/accuracy") == [0, 3]
    assert metrics["eval/loss"][-1] < metrics["eval/loss"][0]
    assert np.isfinite(metrics["loss"][1:]).all()  # Also where one pair is left.


def test_an_exported_reward_model_scores(reward_model):
    exported = realjax.load(reward_model.workdir / "export" / "reward", "d1@0")
    tokens, lengths = np.array([[5, 6, 7]], np.int32), np.array([3], np.int32)
    np.testing.assert_allclose(
        exported.scores(tokens, lengths),
        reward_model.roles["reward"].scores(tokens, lengths),
        rtol=1e-5,
    )


def test_a_profile_has_a_trace_memory_and_a_timeline(reward_model):
    folder = reward_model.workdir / "profile"
    assert list(folder.glob("plugins/profile/*/*.xplane.pb"))
    names = [path.name for path in folder.glob("memory_*")]
    assert names == ["memory_step2_train_reward.pprof"]
    assert (folder / names[0]).stat().st_size > 0
    events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
    steps = {event["args"]["step"] for event in events if event["ph"] == "X"}
    assert {1, 2} <= steps
    assert {"train_reward"} <= {event["name"] for event in events}


# -- an algorithm of one's own, and one that breaks --------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brittle:
    """Likelihood that is not a number where a batch holds a certain token."""

    bad_token: int = -1


def brittle_loss(logprobs, batch, *, hp):
    is_bad = jnp.any(batch["tokens"] == hp.bad_token)
    mask = batch["completion_mask"]
    return Mean.over(jnp.where(is_bad, jnp.nan, -logprobs), mask), {}


def brittle_graph(hp):
    loss = functools.partial(brittle_loss, hp=hp)
    reads = ("tokens", "completion_mask")
    return DataflowGraph(train_policy=call("policy", Train(loss=loss, reads=reads)))


BRITTLE = types.SimpleNamespace(graph=brittle_graph, HYPERPARAMETERS=Brittle)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Records 0 to 5, two at a time; one with a "#" is in every third step."""
    folder, workdir = tmp_path_factory.mktemp("bad"), tmp_path_factory.mktemp("broken")
    tokenizer = write_data(folder, num=6)
    path = folder / "answers_train.jsonl"
    records = path.read_text().splitlines()
    records[2] = json.dumps({"prompt": "the cat", "answer": " # sat"})
    path.write_text("\n".join(records))
    (bad_token,) = set(tokenizer.encode("#")) & set(tokenizer.encode(" # sat"))
    config = sft_config(
        folder,
        algorithm="",
        hp={"bad_token": bad_token},
        data=data_config(folder, "answers", batch_size=2, shuffle=False),
        epochs=4,
        max_nonfinite=2,
        checkpoint=CheckpointConfig(every_steps=1, keep=20, export=False),
    )
    with pytest.raises(NonFiniteError) as error:
        train(config, workdir, algorithm=BRITTLE)
    return config, workdir, str(error.value)


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(broken):
    _, workdir, _ = broken
    found = rows(workdir)
    assert [row["nonfinite"] for row in found] == [0, 1, 0, 0, 1, 0, 0, 1]
    assert [row["loss"] is None for row in found[:3]] == [False, True, False]
    one, two, three = (saved_arrays(workdir, step) for step in (1, 2, 3))
    check_same_arrays(two, one)  # Parameters, moments and counters.
    name = "policy/parameters/embedding"
    assert not np.array_equal(three[name], two[name])


def test_the_third_of_two_allowed_ends_the_run_before_it_is_saved(broken):
    _, workdir, error = broken
    assert "3 updates had a loss or gradient that was not finite" in error
    assert "config.max_nonfinite=2" in error
    assert "The checkpoint of step 7 is untouched" in error
    assert saved_steps(workdir) == [1, 2, 3, 4, 5, 6, 7]


def test_skipped_updates_are_remembered_when_a_run_goes_on(broken):
    config, workdir, _ = broken
    with pytest.raises(NonFiniteError, match="3 updates"):
        train(config, workdir, algorithm=BRITTLE)
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_training_takes_an_algorithm_of_ones_own(data, tmp_path):
    config = sft_config(data, algorithm="", steps=2)
    own = realjax.train(config, tmp_path / "own", algorithm=BRITTLE)
    sft = realjax.train(sft_config(data, steps=2), tmp_path / "sft")
    # The same loss under another name.
    np.testing.assert_array_equal(own.metrics["loss"], sft.metrics["loss"])
