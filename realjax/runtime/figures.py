"""Figures of a run: curves of its metrics, its calls over time and devices.

What is drawn follows from the names of the metrics alone:

    objective/kl                      a panel "kl" in the figure "objective"
    eval/objective/kl                 points in the same panel
    lengths/{min,mean,max}            one panel, a line with a band around it
    timing_s/rollout                  a bar in the figure "timing"
    loss                              a panel in the figure "training"
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patches
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from realjax.core.timing import Event

BLUE, ORANGE, GREY = "#2f6db5", "#e4772e", "#8a8f98"
# Dark enough for white words on them; neighbours differ in lightness, too.
CALL_COLORS = (
    "#2f6db5",
    "#d9622b",
    "#2b8a5b",
    "#8d4fb0",
    "#b8860b",
    "#c23b5a",
    "#1f8a9e",
    "#6b5b4b",
    "#5465d6",
    "#7a8f1e",
)
MACHINE = ("perf", "realloc", "batch")
"""Prefixes of the machinery's numbers; their figures come after the others."""

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c4c8ce",
    "axes.labelcolor": "#5b616b",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef1",
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.formatter.useoffset": False,
}
_UNDRAWN = frozenset({"step", "epoch"})
_NUM_COLUMNS = 3
_PANEL_WIDTH, _PANEL_HEIGHT = 3.9, 2.35  # Inches.
_SMOOTHED_FROM = 30
_STATISTIC = re.compile(r"(?<![a-z])(mean|min|max)(?![a-z])")
_TIMELINE_STEPS = 3
_DOTS_PER_INCH = 150


@dataclasses.dataclass
class Panel:
    """What one panel shows: arrays aligned by step, NaN where there is no value."""

    name: str
    line: np.ndarray | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    evaluation: np.ndarray | None = None


def make_panels(metrics: Mapping[str, np.ndarray]) -> dict[str, list[Panel]]:
    """Sorts metrics into figures and panels; see the module's docstring."""
    panels: dict[str, dict[str, Panel]] = {}
    for name, values in metrics.items():
        if name in _UNDRAWN or name.startswith(("timing_s/", "predicted_s/")):
            continue
        known = values[np.isfinite(values)]
        if not len(known) or (len(known) > 1 and np.ptp(known) == 0):
            continue  # A constant is told by a number.
        is_evaluation = name.startswith("eval/")
        group, _, rest = name.removeprefix("eval/").rpartition("/")
        group = group.partition("/")[0] if group else "training"
        if is_evaluation and name.removeprefix("eval/") not in metrics:
            group, rest = "evaluation", name.removeprefix("eval/")
        elif group != "training":
            rest = name.removeprefix("eval/").removeprefix(f"{group}/")
        statistic = _STATISTIC.search(rest)
        slot = {"min": "low", "max": "high"}.get(statistic[1] if statistic else "", "")
        key = _STATISTIC.sub("", rest) if statistic else rest
        slot = "evaluation" if is_evaluation else slot or "line"
        panel = panels.setdefault(group, {}).setdefault(key, Panel(rest))
        if slot in ("line", "evaluation") and panel.line is None:
            panel.name = rest
        setattr(panel, slot, values)
    return {group: list(found.values()) for group, found in panels.items()}


def curves(metrics: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """A figure for each group of metrics, those about training first.

    Args:
        metrics: "step" and columns aligned with it.
    """
    groups = make_panels(metrics)
    order = sorted(groups, key=lambda group: (group in MACHINE, group == "evaluation"))
    return {group: _curves(group, groups[group], metrics["step"]) for group in order}


def timing(
    metrics: Mapping[str, np.ndarray],
    colors: Mapping[str, str],
    *,
    skip_steps: int = 2,
) -> Figure | None:
    """Median seconds of each call, after the first steps, which compile."""
    medians = {}
    for name, values in metrics.items():
        if name.startswith("timing_s/"):
            values = values[np.isfinite(values)]
            values = values[skip_steps:] if len(values) > skip_steps else values
            if len(values):
                medians[name.removeprefix("timing_s/")] = float(np.median(values))
    if not medians:
        return None
    order = sorted(medians, key=lambda name: medians[name])
    with matplotlib.rc_context(_STYLE):
        figure = _figure(3 * _PANEL_WIDTH, 0.75 + 0.34 * len(order))
        axes = figure.subplots()
        seconds = [medians[name] for name in order]
        axes.barh(order, seconds, color=[colors[name] for name in order], height=0.66)
        for y, value in enumerate(seconds):
            axes.annotate(
                _seconds(value),
                (value, y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color="#3a3f47",
            )
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, 1.12 * max(seconds))
        axes.set_xlabel("seconds")
        _set_title(axes, "median time of each call")
    return figure


def timeline(events: Iterable[Event], colors: Mapping[str, str]) -> Figure | None:
    """What each device did during the last steps.

    Devices that did the same share a row. Reallocations and offloads are hatched.
    """
    chosen = _last_steps(list(events))
    if not chosen:
        return None
    rows = _rows(chosen)
    origin = min(event.start for event in chosen)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(3 * _PANEL_WIDTH, 1.35 + 0.36 * len(rows))
        axes = figure.subplots()
        span = max(event.end for event in chosen) - origin
        for y, found in enumerate(rows.values()):
            for event in found:
                _draw_event(axes, event, y, origin, span, colors[event.name])
        for start in _step_starts(chosen):
            axes.axvline(start - origin, color="#c4c8ce", linewidth=0.9, zorder=0)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-0.003 * span, span * 1.003)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("seconds")
        steps = sorted({event.step for event in chosen if event.step is not None})
        title = f"steps {steps[0]} to {steps[-1]}" if steps else "the run"
        _set_title(axes, f"calls on each device, {title}")
        _draw_legend(figure, chosen, colors)
    return figure


def call_colors(
    metrics: Mapping[str, np.ndarray], events: Iterable[Event]
) -> dict[str, str]:
    """A colour for each call, in order of first appearance; the same in all figures."""
    timed = [name for name in metrics if name.startswith("timing_s/")]
    names = [name.removeprefix("timing_s/") for name in timed]
    names = list(dict.fromkeys([*names, *(event.name for event in events)]))
    return {name: CALL_COLORS[i % len(CALL_COLORS)] for i, name in enumerate(names)}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window that is cut at the ends; NaN is left out."""
    known = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.06)
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _set_title(axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9.5, fontweight="bold", color="#23272e")


def _curves(group: str, panels: Sequence[Panel], steps: np.ndarray) -> Figure:
    num_columns = min(len(panels), _NUM_COLUMNS)
    num_rows = -(-len(panels) // num_columns)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(num_columns * _PANEL_WIDTH, num_rows * _PANEL_HEIGHT + 0.15)
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel, steps)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes in grid.flat[max(0, len(panels) - num_columns) : len(panels)]:
            axes.set_xlabel("step")
    figure.set_label(group)
    return figure


def _draw_panel(axes, panel: Panel, steps: np.ndarray) -> None:
    line = panel.line
    if line is None and panel.low is not None and panel.high is not None:
        line = (panel.low + panel.high) / 2
    for values in (panel.low, panel.high):
        if values is not None and line is not None:
            both = np.isfinite(values) & np.isfinite(line)
            axes.fill_between(
                steps[both], line[both], values[both], color=BLUE, alpha=0.13, lw=0
            )
    for values in (line,) if line is not None else (panel.low, panel.high):
        if values is not None:
            _draw_line(axes, steps, values)
    if panel.evaluation is not None:
        known = np.isfinite(panel.evaluation)
        axes.plot(
            steps[known],
            panel.evaluation[known],
            color=ORANGE,
            marker="o",
            markersize=4,
            linewidth=1.2,
            linestyle=(0, (3, 2)),
            label="held-out data",
        )
        if line is not None:
            axes.legend(frameon=False, fontsize=7.5, labelcolor="#5b616b")
    _set_title(axes, panel.name)
    shown = line if line is not None else panel.evaluation
    if shown is not None and np.isfinite(shown).any():
        last = shown[np.isfinite(shown)][-1]
        axes.set_title(f"{last:.4g}", loc="right", fontsize=8.5, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02)


def _draw_line(axes, steps: np.ndarray, values: np.ndarray) -> None:
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if len(values) >= _SMOOTHED_FROM and _is_rough(values):
        axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.3)
        values = smooth(values, max(3, len(values) // 20))
    axes.plot(
        steps,
        values,
        color=BLUE,
        linewidth=1.7,
        marker="o" if len(values) < 6 else None,
        markersize=3.5,
    )


def _is_rough(values: np.ndarray) -> bool:
    """Whether steps differ by more than a fiftieth of what the whole curve covers."""
    return bool(np.std(np.diff(values)) > 0.02 * np.ptp(values))


def _last_steps(events: Sequence[Event]) -> list[Event]:
    """Events of the last few steps; all of them where none has a step."""
    steps = sorted({event.step for event in events if event.step is not None})
    if not steps:
        return list(events)
    last = set(steps[-_TIMELINE_STEPS:])
    return [event for event in events if event.step in last]


def _rows(events: Sequence[Event]) -> dict[str, list[Event]]:
    """Events by row: "device 0", "devices 4-7" (which did the same), "host"."""
    devices = sorted({device for event in events for device in event.devices})
    rows: dict[str, list[Event]] = {}
    group: list[int] = []
    found: list[Event] = []
    for device in [*devices, None]:
        its = [event for event in events if device in event.devices]
        if group and (device is None or its != found):
            whole = f"devices {group[0]}-{group[-1]}"
            rows[whole if len(group) > 1 else f"device {group[0]}"] = found
            group = []
        if device is not None:
            group.append(device)
            found = its
    host = [event for event in events if not event.devices]
    return rows | {"host": host} if host else rows


def _step_starts(events: Sequence[Event]) -> list[float]:
    starts: dict[int, float] = {}
    for event in events:
        if event.step is not None:
            starts[event.step] = min(event.start, starts.get(event.step, event.start))
    return sorted(starts.values())[1:]


def _draw_event(
    axes: Any, event: Event, y: int, origin: float, span: float, color: str
) -> None:
    moves = event.kind in ("realloc", "offload")
    axes.barh(
        y,
        event.seconds,
        left=event.start - origin,
        height=0.72,
        color=color,
        alpha=0.55 if moves else 0.95,
        hatch="//////" if moves else None,
        edgecolor="white",
        linewidth=0.5,
    )
    # About 7 points a letter, on a figure of known width.
    letters = event.seconds / span * 3 * _PANEL_WIDTH * 72 / 5.6
    if len(event.name) + 2 <= letters and not moves:
        axes.text(
            event.start - origin + event.seconds / 2,
            y,
            event.name,
            ha="center",
            va="center",
            color="white",
            fontsize=7.5,
        )


def _draw_legend(figure: Figure, events: Sequence[Event], colors) -> None:
    kinds = {event.name: event.kind for event in events}
    handles = [
        patches.Patch(
            facecolor=colors[name],
            alpha=0.55 if kind in ("realloc", "offload") else 0.95,
            hatch="//////" if kind in ("realloc", "offload") else None,
            edgecolor="white",
            label=name,
        )
        for name, kind in kinds.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 6),
        frameon=False,
        fontsize=8,
        labelcolor="#3a3f47",
    )


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"
