"""Where the numbers of a run go: JSON Lines, TensorBoard, Weights & Biases.

Every writer has the same four methods; a `Fanout` is a writer of several:

    write(step, metrics)   metrics of one step; steps in order
    truncate_after(step)   forget later steps, when a run resumes from `step`
    flush()                everything written is on disk
    close()

Metrics are a mapping from name to number: Python, numpy or a device array. Device
arrays are read when they are written, all in one transfer, so the caller need not wait
for them before.
"""

import importlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

type Path = str | os.PathLike[str]
type Number = bool | int | float


def to_numbers(metrics: Mapping[str, Any]) -> dict[str, Number]:
    """Reads scalars from their devices, in one transfer, as Python numbers.

    Raises:
        TypeError: naming a metric that is not a single number.
    """
    return {
        name: _to_number(name, value)
        for name, value in jax.device_get(dict(metrics)).items()
    }


class JsonLines:
    """One JSON object a step, with a `step` field, in a file that is flushed each time.

    The file is strict JSON, so NaN and infinities, which JSON does not have, become
    null; `read_metrics` reads null as NaN. A second write to the last step, by an
    evaluation say, goes into the same object. A last line that a killed process left
    half written is dropped when the file is opened.

    Args:
        path: the file; it is appended to, and its folder made, if needed.
    """

    def __init__(self, path: Path):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open(_whole_lines(self.path) if self.path.exists() else [])

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line; {"step": 3, "loss": 0.5}, say."""
        row: dict[str, Number | None] = {"step": int(step)}
        if row["step"] == self._last.get("step"):
            row = self._last
        else:
            self._last_start = self._file.seek(0, os.SEEK_END)
        for name, number in to_numbers(metrics).items():
            row[name] = number if math.isfinite(number) else None
        # One call, and never shorter than the line it replaces, so that a kill leaves
        # at worst a line without an end.
        old_bytes = self._file.seek(0, os.SEEK_END) - self._last_start
        self._file.seek(self._last_start)
        line = json.dumps(row, allow_nan=False).ljust(old_bytes - 1)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._last = row

    def truncate_after(self, step: int) -> None:
        """Keeps the lines up to and including `step`, as on a resume from there."""
        self._file.close()
        lines = _whole_lines(self.path)
        self._open([line for line in lines if json.loads(line)["step"] <= step])

    def _open(self, lines: Sequence[str]) -> None:
        """Opens the file with these lines in it, at its end."""
        _replace(self.path, lines)
        self._file = self.path.open("rb+")
        self._last = json.loads(lines[-1]) if lines else {}
        last_bytes = len(lines[-1].encode()) + 1 if lines else 0
        self._last_start = self._file.seek(0, os.SEEK_END) - last_bytes

    def flush(self) -> None:
        """Hands the lines to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Scalars in a folder that `tensorboard --logdir` shows.

    Args:
        folder: where the event files go.
    """

    def __init__(self, folder: Path):
        self.folder = pathlib.Path(folder)
        self._writer = self._open()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds one point to each curve."""
        for name, number in to_numbers(metrics).items():
            self._writer.add_scalar(name, number, int(step))

    def truncate_after(self, step: int) -> None:
        """Starts an event file that hides the later points of the earlier ones."""
        self._writer.close()
        self._writer = self._open(purge_step=step + 1)

    def flush(self) -> None:
        """Hands the points to the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()

    def _open(self, **options):
        import tensorboardX  # Only those who want it pay for its import.

        # Files are named by the second: a number keeps a second writer from
        # overwriting what a first one wrote within it.
        num_files = len(list(self.folder.glob("events.*")))
        return tensorboardX.SummaryWriter(
            str(self.folder), filename_suffix=f".{num_files}", **options
        )


class WeightsAndBiases:
    """Metrics in a Weights & Biases run; the package is installed by who wants it.

    Args:
        project: the project's name.
        name: the run's name; also its id, so that a resumed run goes on. By default
            the folder's name.
        folder: where the package keeps its files.
        config: shown beside the run.

    Raises:
        ModuleNotFoundError: if the package `wandb` is not installed.
    """

    def __init__(
        self,
        project: str,
        *,
        name: str = "",
        folder: Path = ".",
        config: Mapping[str, Any] | None = None,
    ):
        try:
            wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Weights & Biases was asked for and the package `wandb` is not "
                "installed: `pip install wandb`, or turn it off."
            ) from error
        name = name or pathlib.Path(folder).resolve().name
        self._run = wandb.init(
            project=project,
            name=name,
            id=name,
            dir=str(folder),
            config=dict(config or {}),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs one step."""
        self._run.log(to_numbers(metrics), step=int(step))

    def truncate_after(self, step: int) -> None:
        """Does nothing: the service keeps its first value of a step written twice."""

    def flush(self) -> None:
        """Does nothing: the package sends in the background, and at `close`."""

    def close(self) -> None:
        """Sends what is left and ends the run."""
        self._run.finish()


class Fanout:
    """Several writers as one; device arrays are read once for all of them.

    Args:
        writers: objects with the four methods above, called in this order.
    """

    def __init__(self, writers: Sequence[Any]):
        self.writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes to each."""
        numbers = to_numbers(metrics)
        for writer in self.writers:
            writer.write(step, numbers)

    def truncate_after(self, step: int) -> None:
        """Truncates each."""
        for writer in self.writers:
            writer.truncate_after(step)

    def flush(self) -> None:
        """Flushes each."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """Closes each."""
        for writer in self.writers:
            writer.close()


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of a `JsonLines` file, aligned by step.

    Steps are in order and once each: of two lines with the same step the later one
    wins, name by name. A step that lacks a name, or holds null there, has NaN.

    Returns:
        "step" as int64 [steps], every other name as float64 [steps].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming a malformed line. A half-written last line is skipped.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no metrics file {path}.")
    rows: dict[int, dict[str, Number | None]] = {}
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = json.loads(line)
            rows.setdefault(int(row.pop("step")), {}).update(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}, is not a JSON object with a `step`: "
                f"{line[:80]!r}."
            ) from error
    steps = sorted(rows)
    names = {name: None for step in steps for name in rows[step]}  # In order of birth.
    columns: dict[str, np.ndarray] = {"step": np.array(steps, np.int64)}
    for name in names:
        values = [rows[step].get(name) for step in steps]
        columns[name] = np.array(
            [math.nan if value is None else value for value in values], np.float64
        )
    return columns


def _to_number(name: str, value: Any) -> Number:
    array = np.asarray(value)
    if array.shape != () or array.dtype == object or array.dtype.kind in "USc":
        raise TypeError(
            f"Metric {name!r} is {value!r}, of shape {array.shape} and type "
            f"{array.dtype}; it needs to be one real number."
        )
    # bfloat16 has kind "V" and no `item` of its own: by way of float.
    return array.item() if array.dtype.kind in "biuf" else float(array)


def _whole_lines(path: pathlib.Path) -> list[str]:
    """The lines of a file without a last one that has no end."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text.split("\n")[:-1]


def _replace(path: pathlib.Path, lines: Sequence[str]) -> None:
    """Rewrites a file in one step, so that a kill leaves the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(path)
