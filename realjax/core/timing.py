"""When things happened: a timeline of calls per device, rates, peak memory.

Dispatch is asynchronous: when a jitted function returns, its devices have often only
begun. So a timeline is told when an event began and ended, by whoever knows; work of
the host, which blocks, it times itself:

    with timeline.record("decode"):
        texts = tokenizer.decode(...)
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from realjax.core.config import check_choice

type Clock = Callable[[], float]

KINDS = ("call", "realloc", "offload", "host")
"""A model function call; parameters or batches that moved; work of the host."""

_KEPT_EVENTS = 100_000
_RATE_SMOOTHING = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that some devices, or the host, did.

    Attributes:
        name: what, in the words of the dataflow graph.
        start, end: seconds on one clock, of any origin.
        devices: ids of the devices; empty for work of the host.
        kind: one of `KINDS`.
        step: of which step, if of one.
    """

    name: str
    start: float
    end: float
    devices: tuple[int, ...] = ()
    kind: str = "call"
    step: int | None = None

    def __post_init__(self):
        """Checks the kind."""
        check_choice("kind", self.kind, KINDS)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


class Stopwatch:
    """Seconds since it was made, and between laps.

    Args:
        clock: returns seconds; it never runs backwards.
    """

    def __init__(self, clock: Clock = time.perf_counter):
        self._clock = clock
        self._start = self._lap = clock()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    def lap(self) -> float:
        """Seconds since the last lap, or since the start."""
        now = self._clock()
        seconds, self._lap = now - self._lap, now
        return seconds


class Timeline:
    """Events in the order in which they were added; the latest 100 000 are kept.

    Several threads may add events.

    Args:
        clock: returns seconds, for `record`.
    """

    def __init__(self, clock: Clock = time.perf_counter):
        self._clock = clock
        self._events: collections.deque[Event] = collections.deque(maxlen=_KEPT_EVENTS)
        self._fresh: collections.deque[Event] = collections.deque(maxlen=_KEPT_EVENTS)
        self._lock = threading.Lock()

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything so far."""
        with self._lock:
            return tuple(self._events)

    def take(self) -> tuple[Event, ...]:
        """What was added since the last `take`; it stays in `events`."""
        with self._lock:
            fresh = tuple(self._fresh)
            self._fresh.clear()
        return fresh

    def add(
        self,
        name: str,
        start: float,
        end: float,
        devices: Iterable[int] = (),
        kind: str = "call",
        *,
        step: int | None = None,
    ) -> None:
        """Adds an event; see `Event`."""
        event = Event(
            name=name,
            start=start,
            end=end,
            devices=tuple(devices),
            kind=kind,
            step=step,
        )
        with self._lock:
            self._events.append(event)
            self._fresh.append(event)

    @contextlib.contextmanager
    def record(
        self,
        name: str,
        *,
        devices: Iterable[int] = (),
        kind: str = "host",
        step: int | None = None,
    ) -> Iterator[None]:
        """Times the body of a `with`, which blocks; a body that raises adds nothing."""
        start = self._clock()
        yield
        self.add(name, start, self._clock(), devices, kind, step=step)

    def medians(
        self, *, kind: str | None = None, skip_steps: int = 0
    ) -> dict[str, float]:
        """Median seconds of each name, in the order in which the names began.

        Args:
            kind: only events of this kind.
            skip_steps: leaves out so many of the first steps, which compile. Events
                without a step stay.
        """
        events = [e for e in self.events if kind is None or e.kind == kind]
        steps = sorted({e.step for e in events if e.step is not None})
        skipped = set(steps[:skip_steps])
        seconds: dict[str, list[float]] = {}
        for event in sorted(events, key=lambda e: e.start):
            if event.step not in skipped:
                seconds.setdefault(event.name, []).append(event.seconds)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the events for Perfetto (ui.perfetto.dev) or chrome://tracing."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(trace(self.events)), encoding="utf-8")


class Rate:
    """Steps and tokens per second, smoothed, and the time that is left.

    The first step compiles: its duration is forgotten as soon as there is another.

    Args:
        clock: returns seconds.

    Attributes:
        seconds_per_step: 0 before the first update.
        tokens_per_second: of the steps whose tokens were given.
    """

    def __init__(self, clock: Clock = time.perf_counter):
        self._watch = Stopwatch(clock)
        self._num_updates = 0
        self.seconds_per_step = 0.0
        self.tokens_per_second = 0.0

    def update(self, *, steps: int = 1, tokens: float = 0.0) -> None:
        """Notes that `steps` more steps are done, with so many tokens in all."""
        seconds = max(self._watch.lap(), 1e-9)
        weight = 1.0 if self._num_updates < 2 else 1.0 - _RATE_SMOOTHING
        self._num_updates += 1
        self.seconds_per_step += weight * (seconds / steps - self.seconds_per_step)
        self.tokens_per_second += weight * (tokens / seconds - self.tokens_per_second)

    @property
    def per_second(self) -> float:
        """Steps per second; 0 before the first update."""
        return 1.0 / self.seconds_per_step if self.seconds_per_step > 0 else 0.0

    def seconds_left(self, steps: int) -> float:
        """What `steps` more steps will take at this rate."""
        return max(0, steps) * self.seconds_per_step


def trace(events: Iterable[Event]) -> dict[str, Any]:
    """Events as an object of the Trace Event Format, from the first one on.

    Each event is a complete one ("ph": "X", microseconds), on one row per device or on
    the host's.
    """
    events = sorted(events, key=lambda e: e.start)
    origin = events[0].start if events else 0.0
    devices = sorted({device for event in events for device in event.devices})
    host = devices[-1] + 1 if devices else 0
    names = {host: "host"} | {device: f"device {device}" for device in devices}
    written: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": name}}
        for row, name in names.items()
    ]
    for event in events:
        written += [
            {
                "ph": "X",
                "name": event.name,
                "cat": event.kind,
                "pid": 0,
                "tid": row,
                "ts": (event.start - origin) * 1e6,
                "dur": event.seconds * 1e6,
                "args": {} if event.step is None else {"step": event.step},
            }
            for row in event.devices or (host,)
        ]
    return {"traceEvents": written, "displayTimeUnit": "ms"}


def peak_host_bytes() -> int:
    """Largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Elsewhere in KiB.
