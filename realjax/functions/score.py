"""Rewards from Python functions of the text, in worker processes with limits.

A function that raises, hangs, takes too much memory or returns nonsense harms its
worker only: the run stops with a clear error, or counts a fallback score and goes on.
Workers are fresh processes (`score_worker.py`): they never fork one that has started
JAX.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import multiprocessing.connection as connections
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from realjax.core.arrays import Float
from realjax.core.config import check_choice, check_least
from realjax.functions import score_worker

logger = logging.getLogger(__name__)

_START_SECONDS = 120.0
_CLOSE_SECONDS = 2.0
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class RewardError(RuntimeError):
    """A reward function failed; the text says what it did and how to go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A function `fn(prompts, completions, **columns) -> list[float]`.

    It gets lists of strings and, of the batch's text columns, those that its signature
    names (all of them, if it has `**columns`), and returns one number per completion.
    A coroutine function is awaited. A batch is cut into contiguous parts for the
    workers, so a score must not depend on other completions.

    Attributes:
        fn: "package.module:function", "path/to/file.py:function", or a callable that
            pickles: it stands at the top of a module or a script.
        options: arguments of the function by name, the same for all completions.
        weight: of this function in the sum.
        timeout_seconds: for one call on one worker's part of the batch.
        memory_gib: that one call may take beside what its worker has, in each process
            that it starts; 0 is no limit. An allocation beyond it fails, which Python
            raises as a MemoryError.
        on_error: "stop" the run, or "fallback": score the completions concerned with
            `fallback_score`, and count them.
        fallback_score: before weighting.
        name: in metrics and errors; by default the function's own.
    """

    fn: str | Callable[..., Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    weight: float = 1.0
    timeout_seconds: float = 30.0
    memory_gib: float = 8.0
    on_error: str = "stop"
    fallback_score: float = 0.0
    name: str = ""

    def __post_init__(self):
        """Checks the fields and fills `name`."""
        check_choice("on_error", self.on_error, ("stop", "fallback"))
        check_least(self, 0, "memory_gib")
        if not self.timeout_seconds > 0:
            raise ValueError(
                f"timeout_seconds is {self.timeout_seconds}; it must be above 0."
            )
        for field in ("weight", "fallback_score"):
            value = getattr(self, field)
            if not math.isfinite(value):
                raise ValueError(f"{field} is {value}; it must be finite.")
        if isinstance(self.fn, str) and ":" not in self.fn:
            raise ValueError(
                f"fn={self.fn!r} has no colon; write 'package.module:function' or "
                "'file.py:function'."
            )
        if not self.name:
            if isinstance(self.fn, str):
                name = self.fn.rpartition(":")[2]
            else:
                name = getattr(self.fn, "__name__", type(self.fn).__name__)
            object.__setattr__(self, "name", name)

    @classmethod
    def parse(cls, text: str) -> "RewardFunction":
        """From a config: "package.module:function", with the other fields' defaults."""
        return cls(fn=text)


class RewardWorkers:
    """Worker processes that score completions.

    Args:
        functions: their weighted sum is the score.
        num_workers: processes; each takes a part of the batch.

    Attributes:
        num_failures: completions that got a fallback score so far, by function.

    Raises:
        RewardError: a function cannot be imported; said here, not at the first batch.
    """

    def __init__(self, functions: Sequence[RewardFunction], num_workers: int = 1):
        if not functions:
            raise ValueError("No reward function was given; at least 1 is needed.")
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; at least 1 is needed.")
        names = [function.name for function in functions]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Reward functions need different names; these have {names}. Give each "
                "its `name`."
            )
        self.functions = tuple(functions)
        self.num_failures = dict.fromkeys(names, 0)
        self._targets = [_target(function) for function in functions]
        self._workers: list[_Worker] = []
        try:
            # All start, then all are waited for.
            for _ in range(num_workers):
                self._workers.append(_Worker(self._targets))
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Float[np.ndarray, "B"]:
        """The weighted sum of all functions, in float32.

        Args:
            prompts: one text per sequence.
            completions: one text per sequence.
            columns: more values per sequence, for the functions that name them.

        Raises:
            RewardError: a function failed and its `on_error` is "stop".
            ValueError: lists of unequal length.
        """
        each = self.score_each(prompts, completions, columns)
        total = np.zeros(len(completions), np.float32)
        for function in self.functions:
            total += np.float32(function.weight) * each[function.name]
        return total

    def score_each(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> dict[str, Float[np.ndarray, "B"]]:
        """Every function's own scores, unweighted, in float32; see `score`."""
        columns = columns or {}
        size = len(completions)
        _check_lengths(size, prompts, columns)
        scores = {f.name: np.zeros(size, np.float32) for f in self.functions}
        tasks = [
            _Task(function, start, stop)
            for function in range(len(self.functions))
            for start, stop in _parts(size, len(self._workers))
        ]
        running: dict[int, _Task] = {}
        try:
            while tasks or running:
                for index in range(len(self._workers)):
                    if tasks and index not in running:
                        task = running[index] = tasks.pop(0)
                        self._start(index, task, prompts, completions, columns)
                for task, outcome in self._finished(running):
                    self._note(task, outcome, scores)
        except BaseException:
            # What still runs belongs to a batch that nobody waits for any more.
            for index in running:
                self._replace(index)
            raise
        return scores

    def close(self) -> None:
        """Ends the processes; none is left, whatever they were doing."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.ask_to_end()
        for worker in workers:
            worker.end(within_seconds=_CLOSE_SECONDS)

    def __enter__(self) -> "RewardWorkers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, index: int, task: "_Task", prompts, completions, columns) -> None:
        if self._workers[index].has_ended():  # Between two batches.
            self._replace(index)
        worker = self._workers[index]
        worker.wait_until_ready()
        rows = slice(task.start, task.stop)
        worker.send(
            task.function,
            list(prompts[rows]),
            list(completions[rows]),
            {name: list(values[rows]) for name, values in columns.items()},
        )
        seconds = self.functions[task.function].timeout_seconds
        task.deadline = time.monotonic() + seconds

    def _finished(self, running: dict[int, "_Task"]):
        """Waits for the first answer or deadline: [(task, outcome)]."""
        first = min(task.deadline for task in running.values())
        pipes = {self._workers[index].pipe: index for index in running}
        ready = connections.wait(list(pipes), max(0.0, first - time.monotonic()))
        indices = [pipes[pipe] for pipe in ready]  # pyright: ignore[reportArgumentType]: ours
        finished = [(running.pop(index), self._receive(index)) for index in indices]
        now = time.monotonic()
        for index in [i for i, task in running.items() if task.deadline <= now]:
            task = running.pop(index)
            seconds = self.functions[task.function].timeout_seconds
            self._replace(index)
            message = f"took more than timeout_seconds={seconds:g} and was stopped."
            finished.append((task, _Outcome(error=message)))
        return finished

    def _receive(self, index: int) -> "_Outcome":
        try:
            kind, value = self._workers[index].pipe.recv()
        except (EOFError, OSError):
            how = self._workers[index].how_it_ended()
            self._replace(index)
            return _Outcome(error=f"ended its process ({how}).")
        if kind == "memory":
            self._replace(index)  # What the function keeps there goes with it.
        return _Outcome(scores=value) if kind == "scores" else _Outcome(error=value)

    def _note(self, task: "_Task", outcome: "_Outcome", scores) -> None:
        """Enters scores; raises, or counts and replaces, what is none."""
        function, error = self.functions[task.function], outcome.error
        found = outcome.scores or [math.nan] * (task.stop - task.start)
        wrong = [i for i, x in enumerate(found) if not abs(x) <= _MAX_FLOAT32]
        if wrong and not error:
            row = task.start + wrong[0]
            error = f"returned {found[wrong[0]]} for completion {row} of the batch."
        if wrong and function.on_error == "stop":
            raise RewardError(
                f"Reward function {function.name!r} {error}\nMend it, or set its "
                "on_error='fallback', which scores such completions with "
                f"fallback_score={function.fallback_score:g} and goes on."
            )
        if wrong and not self.num_failures[function.name]:
            logger.warning(
                "Reward function %r %s\nSuch completions score %g from here on, and "
                "are counted.",
                function.name,
                error,
                function.fallback_score,
            )
        self.num_failures[function.name] += len(wrong)
        for i in wrong:
            found[i] = function.fallback_score
        scores[function.name][task.start : task.stop] = found

    def _replace(self, index: int) -> None:
        """Kills a worker; its successor starts meanwhile."""
        self._workers[index].end(within_seconds=0)
        self._workers[index] = _Worker(self._targets)


@dataclasses.dataclass
class _Task:
    """Function number `function` on rows start to stop of the batch."""

    function: int
    start: int
    stop: int
    deadline: float = math.inf


@dataclasses.dataclass(frozen=True)
class _Outcome:
    scores: list[float] | None = None
    error: str = ""


class _Worker:
    """A process, and the parent's ends of two pipes to it.

    Requests and answers go through `pipe`. Nothing goes through the other: the parent
    holds its end open, so that a worker learns of the parent's death even in a hung
    call.
    """

    def __init__(self, targets: Sequence[score_worker.Target]):
        self._is_ready = False
        self.pipe, theirs = connections.Pipe()
        watched, self._alive = os.pipe()
        file, descriptors = score_worker.__file__, (theirs.fileno(), watched)
        try:
            self._process = subprocess.Popen(
                # -P: the file's folder must not hide modules of the same names.
                [sys.executable, "-P", file, *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                # A function that uses JAX must not reserve the run's accelerators.
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                # In a group of its own: what functions start goes with it, and a Ctrl-C
                # comes to the parent alone, which decides what it means.
                start_new_session=True,
            )
        except BaseException:
            self.ask_to_end()
            raise
        finally:
            theirs.close()
            os.close(watched)
        self.send([*sys.path, os.getcwd()], [tuple(target) for target in targets])

    def wait_until_ready(self) -> None:
        """Raises `RewardError` if the functions cannot be imported."""
        if self._is_ready:
            return
        if not self.pipe.poll(_START_SECONDS):
            raise RewardError(
                f"A reward worker did not start within {_START_SECONDS:g} s; does "
                "importing the functions take that long?"
            )
        try:
            kind, text = self.pipe.recv()
        except (EOFError, OSError):
            raise RewardError(
                "A reward worker ended while it imported the functions "
                f"({self.how_it_ended()})."
            ) from None
        if kind != "ready":
            raise RewardError(text)
        self._is_ready = True

    def send(self, *request: Any) -> None:
        """Sends a request; if the worker has ended, its answer is that end."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(request)

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def how_it_ended(self) -> str:
        """Why the process is gone, after its pipe closed."""
        if self._process.returncode is None:
            # It is looked at before its number may be another's: its group has it.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        code = self._end_group()
        if code >= 0:
            return f"exit code {code}"
        return f"killed by {signal.Signals(-code).name}; out of memory?"

    def ask_to_end(self) -> None:
        """Closes the pipes: an idle worker ends."""
        self.pipe.close()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def end(self, *, within_seconds: float) -> None:
        """Waits so long for the end, then kills; leaves no zombie."""
        try:
            if within_seconds:
                self.ask_to_end()
                self._process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            pass
        self._end_group()
        self.ask_to_end()

    def _end_group(self) -> int:
        """Kills the process and what it started; returns the status it ended with."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def _target(function: RewardFunction) -> score_worker.Target:
    """How a worker finds the function."""
    fn, name = function.fn, function.name
    memory_bytes = int(function.memory_gib * 2**30)
    call: dict[str, Any] = {"options": function.options, "memory_bytes": memory_bytes}
    if isinstance(fn, str):
        place, _, attribute = fn.rpartition(":")
        if place.endswith(".py"):
            place = str(pathlib.Path(place).absolute())
        return score_worker.Target(name, text=f"{place}:{attribute}", **call)
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    place = spec.name if spec else str(pathlib.Path(file).absolute()) if file else ""
    try:
        pickled = pickle.dumps(fn)
        if b"__main__" in pickled and not place:
            raise pickle.PicklingError("It stands in a notebook or a terminal.")
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RewardError(
            f"Reward function {name!r} is {fn!r}, which no other process can import "
            f"({error}) Put it at the top of a file and give 'file.py:function'."
        ) from error
    return score_worker.Target(name, pickled=pickled, main=place, **call)


def _check_lengths(size: int, prompts, columns: Mapping[str, Sequence[Any]]) -> None:
    for name in ("prompts", "completions"):
        if name in columns:
            raise ValueError(
                f"A column is called {name!r}, as an argument is; rename it."
            )
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != size:
            raise ValueError(
                f"{name} has {len(values)} items for {size} completions; scoring needs "
                "one of each per completion."
            )


def _parts(size: int, num_parts: int) -> list[tuple[int, int]]:
    """Contiguous parts of 0..size, of sizes that differ by at most 1; none empty."""
    cuts = [size * i // num_parts for i in range(num_parts + 1)]
    return [(start, stop) for start, stop in itertools.pairwise(cuts) if start < stop]
