"""Profiles of a few steps: a device trace, memory after each call, a timeline."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

from realjax.runtime.executor import Executor


class Profiler:
    """Traces the steps that a run asked for into `workdir/profile`."""

    def __init__(self, steps: str, workdir: pathlib.Path):
        """Reads "first:end", end not included; "" profiles nothing.

        Raises:
            ValueError: anything else.
        """
        self.first, self.end = profiled_steps(steps)
        self.folder = workdir / "profile"
        self._traced: Executor | None = None

    @contextlib.contextmanager
    def step(self, number: int, executor: Executor) -> Iterator[None]:
        """Wraps one step."""
        inside = self.first <= number < self.end
        if inside and self._traced is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.folder))
            self._traced = executor
        executor.after_call = (
            (lambda name: self._save_memory(number, name)) if inside else None
        )
        try:
            yield
        finally:
            if number + 1 >= self.end:
                self.close()

    def close(self) -> None:
        """Writes what was traced; here where the run ends within the traced steps."""
        if self._traced is None:
            return
        watch, self._traced = self._traced.watch, None
        jax.profiler.stop_trace()
        watch.wait()
        watch.timeline.write_trace(self.folder / "timeline.json")

    def _save_memory(self, step: int, call: str) -> None:
        path = self.folder / f"memory_step{step}_{call}.pprof"
        jax.profiler.save_device_memory_profile(str(path))


def profiled_steps(steps: str) -> tuple[int, int]:
    """First and end of "first:end"; 0 and 0 of "".

    Raises:
        ValueError: it is neither.
    """
    if not steps:
        return 0, 0
    try:
        first, end = map(int, steps.split(":"))
    except ValueError:
        first = end = 0
    if not 0 < first < end:
        raise ValueError(
            f"profile_steps is {steps!r}; write it as in '3:5', which traces steps "
            "3 and 4."
        )
    return first, end
