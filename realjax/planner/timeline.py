"""A plan as a timeline: calls, copies and memory of every group of devices.

    devices 0–3   ▐ rollout 8.2 s  ▌▐ train_policy 4.1 s ▌     calls
                  ▒                 ▒                          copies of parameters
                  ▂▂▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅▂▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇      memory, and its limit
    devices 4–7   …

Times are those of `simulate.price`: of a step among others like it, so that what begins
before 0 runs beside the end of the step before. Bytes are those of the memory account,
which counts what every device holds at each step of the schedule; between them a
device holds what the last one left.
"""

import dataclasses
import html
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from realjax.core.timing import Event, trace
from realjax.dataflow.account import GIB, Account, Moment
from realjax.dataflow.draw import COLORS, OTHER_COLOR
from realjax.dataflow.schedule import Move, Run
from realjax.functions.function import Train
from realjax.planner.simulate import price
from realjax.planner.space import Space

WIDTH, LEFT, RIGHT, TOP = 1000, 116, 128, 64
CALL_HEIGHT, COPY_HEIGHT, MEMORY_HEIGHT, GAP = 24, 8, 36, 22
LANE_HEIGHT = CALL_HEIGHT + COPY_HEIGHT + MEMORY_HEIGHT + 8
LEGEND_ROW, LEGEND_WIDTH = 19, 440
_INK, _GREY, _LINE = "#222", "#666", "#ddd"
_LETTER = 6.2
"""Pixels of a letter of 11, at most in the mean of a word."""


class Level(NamedTuple):
    """What a device holds from some time on."""

    begin: float
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """Devices that all calls treat alike.

    Attributes:
        devices: their indices.
        levels: of memory, in order of time.
    """

    devices: tuple[int, ...]
    levels: tuple[Level, ...]

    @property
    def peak_bytes(self) -> int:
        """The most that one of them holds."""
        return max((level.num_bytes for level in self.levels), default=0)

    @property
    def label(self) -> str:
        """As in "devices 0–3"."""
        first, last = self.devices[0], self.devices[-1]
        if first == last:
            return f"device {first}"
        if len(self.devices) == last - first + 1:
            return f"devices {first}–{last}"
        return f"devices {first} … {last}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanTimeline:
    """A step of a plan over time.

    Attributes:
        seconds: of the step.
        events: calls ("call"), copies of parameters ("realloc") and traffic with the
            host ("offload"), each on its devices.
        lanes: groups of devices.
        limit_bytes: of a device; 0 is not known.
        details: of each call, for people: its allocation.
        colors: of each call.
        strong: calls that train.
    """

    seconds: float
    events: tuple[Event, ...]
    lanes: tuple[Lane, ...]
    limit_bytes: int
    details: Mapping[str, str]
    colors: Mapping[str, str]
    strong: frozenset[str]

    @property
    def first(self) -> float:
        """When the first event begins, or 0."""
        return min([0.0, *(event.start for event in self.events)])

    @property
    def last(self) -> float:
        """When the last event ends, or the step."""
        return max([self.seconds, *(event.end for event in self.events)])


def plan_timeline(space: Space, plan: Sequence[int], account: Account) -> PlanTimeline:
    """Lay out a plan.

    Args:
        space: of all plans.
        plan: the number of each call's option.
        account: of the plan's schedule.
    """
    priced = price(space.problem, jnp.asarray([plan]))
    begin, end, copy_begin, copy_end = (
        np.asarray(times[0], np.float64).tolist()
        for times in (priced.begin, priced.end, priced.copy_begin, priced.copy_end)
    )
    chosen, picked = space.chosen(plan), space.picked(plan)
    calls = space.graph.calls
    events: list[Event] = []

    def add(name: str, times: tuple[float, float], devices, kind: str) -> None:
        start, stop = times
        events.append(
            Event(name=name, start=start, end=stop, devices=devices, kind=kind)
        )

    for index, name in enumerate(space.names):
        devices, option = chosen[name].devices, picked[name]
        role = calls[name].role or ""
        home = chosen[space.names[int(space.problem.home[index])]].devices
        add(name, (begin[index], end[index]), devices, "call")
        if copy_end[index] > copy_begin[index]:
            both = tuple(sorted({*devices, *home}))
            span = copy_begin[index], copy_end[index]
            add(f"copy of {role} for {name}", span, both, "realloc")
        if option.reload_seconds:
            # It may come earlier: it is there when its call begins.
            span = begin[index] - option.reload_seconds, begin[index]
            add(f"reload of {role}", span, devices, "offload")
        if option.offload_seconds:
            span = end[index], end[index] + option.offload_seconds
            add(f"offload of {role}", span, devices, "offload")
    times = {name: (begin[i], end[i]) for i, name in enumerate(space.names)}
    copies = {
        (calls[name].role, chosen[name].layout_key): (copy_begin[i], copy_end[i])
        for i, name in reversed(list(enumerate(space.names)))
        if copy_end[i] > copy_begin[i]
    }
    homes = {
        calls[name].role: chosen[space.names[int(space.problem.home[i])]].devices
        for i, name in enumerate(space.names)
    }
    walk = _Walk(times, copies, homes, {n: a.devices for n, a in chosen.items()})
    return PlanTimeline(
        seconds=float(priced.seconds[0]),
        events=tuple(sorted(events, key=lambda event: event.start)),
        lanes=tuple(
            Lane(devices=group, levels=tuple(walk.levels(account, index)))
            for index, group in enumerate(account.groups)
        ),
        limit_bytes=account.limit_bytes,
        details={
            name: f"{allocation}" + ", a step ahead" * calls[name].staleness
            for name, allocation in chosen.items()
        },
        colors={n: COLORS.get(calls[n].role, OTHER_COLOR) for n in space.names},
        strong=frozenset(
            name for name in space.names if isinstance(calls[name].function, Train)
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Gives the moments of an account times.

    Attributes:
        times: begin and end of calls.
        copies: the same of copies, by role and layout of their destination.
        homes: devices that a role's parameters live on.
        devices: of calls.
    """

    times: Mapping[str, tuple[float, float]]
    copies: Mapping[tuple, tuple[float, float]]
    homes: Mapping[str | None, tuple[int, ...]]
    devices: Mapping[str, tuple[int, ...]]

    def levels(self, account: Account, group: int) -> Iterator[Level]:
        """Go over what a group of devices holds; a level holds until the next."""
        device = account.groups[group][0]
        held = int(account.resting_bytes[group])
        now = min([0.0, *(begin for begin, _ in self.times.values())])
        now = min([now, *(begin for begin, _ in self.copies.values())])
        yield Level(now, held)
        for moment in account.moments:
            during = int(moment.device_bytes[group])
            after = during - _passing(moment, group)
            span = self._span(moment, device)
            if span is None:
                if after != held:
                    yield Level(now, after)
            else:
                begin = max(span[0], now)
                now = max(span[1], begin)
                yield Level(begin, during)
                yield Level(now, after)
            held = after

    def _span(self, moment: Moment, device: int) -> tuple[float, float] | None:
        """Return when a moment is, if it takes a device any time."""
        match moment.step:
            case Run(name) if name in self.times and device in self.devices[name]:
                return self.times[name]
            case Move(role, place):
                both = (*place.allocation.devices, *self.homes[role])
                if device in both:
                    return self.copies.get((role, place.allocation.layout_key))
        return None


def _passing(moment: Moment, group: int) -> int:
    """Return what a group of devices holds during a step, and not after it."""
    match moment.step:
        case Run(name):
            kinds = [name]
        case Move():
            kinds = ["pieces"]
        case _:
            kinds = []
    return sum(int(moment.held[kind][group]) for kind in kinds if kind in moment.held)


def write_trace(timeline: PlanTimeline, path: str | os.PathLike[str]) -> None:
    """Write a timeline for Perfetto (ui.perfetto.dev): a row for each group of devices.

    Memory is a counter of each.

    Args:
        timeline: of a plan.
        path: of the JSON file.
    """
    lanes = {lane.devices[0]: lane for lane in timeline.lanes}
    # One row a group: its first device stands for it.
    events = [
        dataclasses.replace(
            event, devices=tuple(d for d in event.devices if d in lanes)
        )
        for event in timeline.events
    ]
    written = trace(events)
    for entry in written["traceEvents"]:
        if entry["name"] == "thread_name" and entry["tid"] in lanes:
            entry["args"] = {"name": lanes[entry["tid"]].label}
    origin = min((event.start for event in events), default=0.0)
    written["traceEvents"] += [
        {
            "ph": "C",
            "name": f"GiB on {lane.label}",
            "pid": 0,
            "ts": max(level.begin - origin, 0.0) * 1e6,
            "args": {"GiB": round(level.num_bytes / GIB, 3)},
        }
        for lane in timeline.lanes
        for level in lane.levels
    ]
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written), encoding="utf-8")


def timeline_svg(timeline: PlanTimeline, title: str) -> str:
    """Draw a timeline.

    Args:
        timeline: of a plan.
        title: above it.

    Returns:
        A whole `<svg>` element.
    """
    return _Drawing(timeline).svg(title)


class _Drawing:
    """Where things are in the picture."""

    def __init__(self, timeline: PlanTimeline):
        self.timeline = timeline
        self.first, self.last = timeline.first, timeline.last
        self.scale = (WIDTH - LEFT - RIGHT) / max(self.last - self.first, 1e-9)
        self.bottom = TOP + len(timeline.lanes) * (LANE_HEIGHT + GAP)

    def x(self, time: float) -> float:
        """Return where a time is."""
        return LEFT + (time - self.first) * self.scale

    def svg(self, title: str) -> str:
        """Draw everything."""
        calls = list(self.timeline.details)
        rows = -(-len(calls) // 2) + 1
        height = self.bottom + 44 + rows * LEGEND_ROW
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-family="Helvetica, sans-serif">',
            '<defs><pattern id="moved" width="5" height="5" '
            'patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            '<rect width="5" height="5" fill="white"/>'
            f'<rect width="2.5" height="5" fill="{_GREY}"/></pattern></defs>',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            _text(LEFT, 24, title, 14, weight="bold"),
            *self._axis(),
        ]
        for number, lane in enumerate(self.timeline.lanes):
            parts += self._lane(lane, TOP + number * (LANE_HEIGHT + GAP))
        parts += self._legend(calls)
        return "\n".join((*parts, "</svg>"))

    def _axis(self) -> Iterator[str]:
        step = _nice((self.last - self.first) / 8)
        digits = max(0, -math.floor(math.log10(step)))
        number = math.ceil(self.first / step)
        while number * step <= self.last:
            x = self.x(number * step)
            yield _line(x, TOP - 10, x, self.bottom - GAP + 4, _LINE, 1)
            words = f"{number * step:.{digits}f} s"
            yield _text(x, self.bottom, words, 10, fill=_GREY, anchor="middle")
            number += 1
        # Where a step begins and ends.
        for time in (0.0, self.timeline.seconds):
            x = self.x(time)
            yield _line(x, TOP - 14, x, self.bottom - GAP + 4, "#999", 1.4)
        middle = self.x(self.timeline.seconds / 2)
        words = f"one step, {_seconds(self.timeline.seconds)}"
        yield _text(middle, TOP - 16, words, 11, fill=_GREY, anchor="middle")

    def _lane(self, lane: Lane, y: int) -> Iterator[str]:
        yield _text(12, y + 16, lane.label, 12)
        events = [e for e in self.timeline.events if lane.devices[0] in e.devices]
        for event in events:
            if event.kind == "call":
                yield self._call(event, y)
            else:
                yield self._copy(event, y + CALL_HEIGHT + 2)
        yield from self._memory(lane, y + CALL_HEIGHT + COPY_HEIGHT + 8)

    def _call(self, event: Event, y: int) -> str:
        color = self.timeline.colors[event.name]
        opacity = 0.55 if event.name in self.timeline.strong else 0.25
        x, width = self.x(event.start), event.seconds * self.scale
        both = f"{event.name} {_seconds(event.seconds)}"
        fitting = [w for w in (both, event.name) if _LETTER * len(w) + 6 <= width]
        words = fitting[0] if fitting else ""
        detail = f"{both}, {self.timeline.details[event.name]}"
        middle = x + width / 2
        return (
            f'<g><rect x="{x:.1f}" y="{y}" width="{max(width, 0.8):.1f}" '
            f'height="{CALL_HEIGHT}" rx="2" fill="{color}" fill-opacity="{opacity}" '
            f'stroke="{color}"/><title>{html.escape(detail)}</title>'
            + (_text(middle, y + 16, words, 11, anchor="middle") if words else "")
            + "</g>"
        )

    def _copy(self, event: Event, y: int) -> str:
        fill = "url(#moved)" if event.kind == "realloc" else "none"
        width = max(event.seconds * self.scale, 1.0)
        detail = f"{event.name}, {_seconds(event.seconds)}"
        return (
            f'<rect x="{self.x(event.start):.1f}" y="{y}" width="{width:.1f}" '
            f'height="{COPY_HEIGHT}" fill="{fill}" stroke="{_GREY}" '
            f'stroke-width="0.8"><title>{html.escape(detail)}</title></rect>'
        )

    def _memory(self, lane: Lane, y: int) -> Iterator[str]:
        limit = self.timeline.limit_bytes
        most = max(limit, *(lane.peak_bytes for lane in self.timeline.lanes), 1)
        height = lambda size: y + MEMORY_HEIGHT * (1 - size / most)
        bottom = y + MEMORY_HEIGHT
        path = [f"M{self.x(self.first):.1f} {bottom}"]
        for level in lane.levels:
            path.append(f"H{self.x(level.begin):.1f}V{height(level.num_bytes):.1f}")
        path.append(f"H{self.x(self.last):.1f}V{bottom}Z")
        # As far as everything reaches, also where nothing is held.
        yield (
            f'<path d="{"".join(path)}" fill="#8aa4bf" fill-opacity="0.45" '
            'stroke="#5f7f9f" stroke-width="0.8"/>'
        )
        yield _line(LEFT, bottom, WIDTH - RIGHT, bottom, "#bbb", 1)
        words = f"{lane.peak_bytes / GIB:.1f} GiB at most"
        yield _text(WIDTH - RIGHT + 8, bottom - 4, words, 10, fill=_GREY)
        yield _text(12, bottom - 4, "memory", 10, fill=_GREY)
        if limit:
            top = height(limit)
            yield _line(LEFT, top, WIDTH - RIGHT, top, "#c23b3b", 1, dash="4 3")
            words = f"limit {limit / GIB:.1f} GiB"
            yield _text(WIDTH - RIGHT + 8, top + 9, words, 10, fill="#c23b3b")

    def _legend(self, calls: Sequence[str]) -> Iterator[str]:
        seconds = {e.name: e.seconds for e in self.timeline.events if e.kind == "call"}
        top = self.bottom + 34
        for number, name in enumerate(calls):
            column, row = divmod(number, -(-len(calls) // 2))
            x, y = LEFT + column * LEGEND_WIDTH, top + row * LEGEND_ROW
            color = self.timeline.colors[name]
            opacity = 0.55 if name in self.timeline.strong else 0.25
            yield (
                f'<rect x="{x}" y="{y - 10}" width="14" height="11" rx="2" '
                f'fill="{color}" fill-opacity="{opacity}" stroke="{color}"/>'
            )
            words = (name, _seconds(seconds[name]), self.timeline.details[name])
            yield _text(x + 20, y, " · ".join(words), 11)
        y = top + -(-len(calls) // 2) * LEGEND_ROW
        for x, fill, words in (
            (LEFT, "url(#moved)", "copies of parameters between devices"),
            (LEFT + LEGEND_WIDTH, "none", "from and to host memory"),
        ):
            yield (
                f'<rect x="{x}" y="{y - 9}" width="14" height="{COPY_HEIGHT}" '
                f'fill="{fill}" stroke="{_GREY}" stroke-width="0.8"/>'
            )
            yield _text(x + 20, y, words, 11)


def _nice(size: float) -> float:
    """Return 1, 2 or 5 times a power of ten, at least as large."""
    power = 10.0 ** math.floor(math.log10(max(size, 1e-9)))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= size)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


def _line(
    x1: float, y1: float, x2: float, y2: float, color: str, width: float, dash: str = ""
) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{color}" stroke-width="{width}"{dashes}/>'
    )


def _text(
    x: float,
    y: float,
    words: Any,
    size: int,
    *,
    fill: str = _INK,
    anchor: str = "start",
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{html.escape(words)}</text>'
    )
