import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from realjax.core.metrics import (
    Fanout,
    JsonLines,
    TensorBoard,
    WeightsAndBiases,
    read_metrics,
    to_numbers,
)


def test_columns_are_aligned_by_step(tmp_path):
    writer = JsonLines(tmp_path / "run" / "metrics.jsonl")
    writer.write(1, {"loss": 1.5})
    writer.write(2, {"loss": 1.0, "eval/loss": 2.0})
    writer.write(4, {"loss": 0.5})
    writer.close()
    columns = read_metrics(writer.path)
    np.testing.assert_array_equal(columns["step"], [1, 2, 4])
    np.testing.assert_array_equal(columns["loss"], [1.5, 1.0, 0.5])
    np.testing.assert_array_equal(columns["eval/loss"], [np.nan, 2.0, np.nan])


def test_each_step_is_one_flushed_line(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl")
    writer.write(3, {"loss": 0.5, "is_last": True, "count": 7})
    # Read while the writer is open.
    lines = writer.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 3, "loss": 0.5, "is_last": True, "count": 7}
    ]


def test_a_second_write_to_a_step_joins_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 0.123456789})
    writer.write(2, {"eval/loss": 3.0, "loss": 0.5})
    writer.write(3, {"loss": 0.25})
    writer.close()
    writer = JsonLines(path)  # The last line is known after a restart, too.
    writer.write(3, {"eval/loss": 4.0})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5, "eval/loss": 3.0},
        {"step": 3, "loss": 0.25, "eval/loss": 4.0},
    ]


def test_device_arrays_of_any_dtype_become_numbers():
    numbers = to_numbers(
        {
            "float32": jnp.float32(0.25),
            "bfloat16": jnp.bfloat16(0.5),
            "int32": jnp.int32(3),
            "bool": jnp.array(True),
            "numpy": np.float64(1.5),
            "python": 2,
        }
    )
    assert numbers == {
        "float32": 0.25,
        "bfloat16": 0.5,
        "int32": 3,
        "bool": True,
        "numpy": 1.5,
        "python": 2,
    }
    assert {type(number) for number in numbers.values()} == {float, int, bool}


def test_sharded_scalars_are_read():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    assert to_numbers({"loss": jax.device_put(2.5, replicated)}) == {"loss": 2.5}


@pytest.mark.parametrize("value", [np.zeros(3), "text", None, 1j])
def test_a_metric_that_is_not_a_number_is_named(value):
    with pytest.raises(TypeError, match="Metric 'objective/kl' is"):
        to_numbers({"loss": 1.0, "objective/kl": value})


def test_non_finite_numbers_are_null_and_read_as_nan(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl")
    writer.write(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    assert writer.path.read_text() == '{"step": 1, "a": null, "b": null, "c": 1.0}\n'
    columns = read_metrics(writer.path)
    assert np.isnan(columns["a"][0]) and np.isnan(columns["b"][0])


def test_truncate_after_drops_later_steps_and_goes_on(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.truncate_after(3)
    writer.write(4, {"loss": 40.0})
    writer.close()
    columns = read_metrics(writer.path)
    np.testing.assert_array_equal(columns["step"], [1, 2, 3, 4])
    np.testing.assert_array_equal(columns["loss"], [1, 2, 3, 40])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_half_written_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    np.testing.assert_array_equal(read_metrics(path)["step"], [1])
    writer = JsonLines(path)  # A process that starts after the kill.
    writer.write(2, {"loss": 2.0})
    writer.truncate_after(2)
    np.testing.assert_array_equal(read_metrics(path)["loss"], [1.0, 2.0])


def test_of_two_lines_of_a_step_the_later_wins_name_by_name(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "a": 1, "b": 2}\n{"step": 1, "a": 0}\n{"step": 2, "b": 3}\n'
    )
    columns = read_metrics(path)
    np.testing.assert_array_equal(columns["step"], [1, 2])
    np.testing.assert_array_equal(columns["a"], [0, 1])
    np.testing.assert_array_equal(columns["b"], [np.nan, 3])


@pytest.mark.parametrize("line", ["{oops", "[1]", '{"loss": 1}', ""])
def test_a_malformed_line_is_named_by_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no metrics file"):
        read_metrics(tmp_path / "none.jsonl")


def _tensorboard_values(folder):
    """(step, name, value) in the event files; a record is length, crc, data, crc."""
    values = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            values += [
                (event.step, value.tag, round(value.simple_value, 6))
                for value in event.summary.value
            ]
    return values


def test_tensorboard_holds_every_scalar(tmp_path):
    writer = TensorBoard(tmp_path)
    writer.write(1, {"loss": jnp.float32(0.5), "objective/kl": 2})
    writer.flush()
    writer.truncate_after(1)
    writer.write(2, {"loss": 0.25})
    writer.close()
    assert set(_tensorboard_values(tmp_path)) == {
        (1, "loss", 0.5),
        (1, "objective/kl", 2.0),
        (2, "loss", 0.25),
    }


def test_weights_and_biases_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # As if not installed.
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        WeightsAndBiases("project", name="run")


def test_weights_and_biases_logs_numbers_and_resumes_by_name(monkeypatch, tmp_path):
    calls = []
    run = types.SimpleNamespace(
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
    )
    wandb = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "run"
    writer = WeightsAndBiases("project", folder=folder, config={"a": 1})
    writer.write(1, {"loss": jnp.float32(0.5)})
    writer.truncate_after(0)
    writer.flush()
    writer.close()
    options, *logged = calls
    assert options["id"] == "run" and options["resume"] == "allow"
    assert options["config"] == {"a": 1} and options["dir"] == str(folder)
    assert logged == [(1, {"loss": 0.5}), "finish"]


def test_fanout_does_to_each_what_it_is_asked(tmp_path):
    first, second = JsonLines(tmp_path / "a.jsonl"), JsonLines(tmp_path / "b.jsonl")
    both = Fanout([first, second])
    for step in (1, 2, 3):
        both.write(step, {"loss": jnp.float32(step)})
    both.flush()
    both.truncate_after(2)
    both.close()
    assert first.path.read_text() == second.path.read_text()
    np.testing.assert_array_equal(read_metrics(first.path)["step"], [1, 2])
