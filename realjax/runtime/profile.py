"""Profiles of a few steps: a device trace, memory after each call, a timeline."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

from realjax.runtime.executor import Executor


class Profiler:
    """Traces the steps that a run asked for into `workdir/profile`."""

    def __init__(self, steps: str, workdir: pathlib.Path, executor: Executor):
        """Reads "first:end", end not included; "" profiles nothing.

        Raises:
            ValueError: anything else.
        """
        self.first, self.end = _parse(steps)
        self.folder, self.executor = workdir / "profile", executor
        self._is_tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps one step."""
        inside = self.first <= number < self.end
        if inside and not self._is_tracing:
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.folder))
            self._is_tracing = True
        self.executor.after_call = (
            (lambda name: self._save_memory(number, name)) if inside else None
        )
        try:
            yield
        finally:
            if self._is_tracing and number + 1 >= self.end:
                jax.profiler.stop_trace()
                self._is_tracing = False
                self.executor.watch.wait()
                self.executor.watch.timeline.write_trace(self.folder / "timeline.json")

    def _save_memory(self, step: int, call: str) -> None:
        path = self.folder / f"memory_step{step}_{call}.pprof"
        jax.profiler.save_device_memory_profile(str(path))


def _parse(steps: str) -> tuple[int, int]:
    if not steps:
        return 0, 0
    try:
        first, end = map(int, steps.split(":"))
    except ValueError:
        first = end = 0
    if not 0 < first < end:
        raise ValueError(
            f"config.profile_steps={steps!r}; write it as in '3:5', which traces steps "
            "3 and 4."
        )
    return first, end
