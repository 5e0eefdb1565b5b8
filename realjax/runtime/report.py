"""The page that ends a run: one HTML file that needs nothing beside it.

<workdir>/report.html      curves, completions before and after, calls over time
<workdir>/figures/*.png    the same pictures, for slides and READMEs
"""

import base64
import html
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from realjax.core.timing import Timeline
from realjax.runtime.predictions import compared

_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #23272e;
  max-width: 1120px; margin: 0 auto; padding: 28px 20px 80px; background: #fff; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 44px 0 10px; padding-bottom: 6px;
  border-bottom: 1px solid #e3e6ea; }
h3 { font-size: 14px; margin: 22px 0 4px; color: #5b616b; font-weight: 600; }
img, svg { max-width: 100%; height: auto; }
pre { background: #f6f7f9; border-radius: 6px; padding: 14px; overflow-x: auto;
  font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; color: #5b616b; font-weight: 600; }
th, td { padding: 7px 10px; border-bottom: 1px solid #eceef1; vertical-align: top; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; width: 34%; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.facts { color: #5b616b; margin: 0 0 18px; }
.facts b { color: #23272e; font-weight: 600; }
.score { display: inline-block; border-radius: 10px; padding: 0 8px; margin-bottom: 3px;
  font-size: 12px; background: #eceef1; font-variant-numeric: tabular-nums; }
.better { background: #d9f2e3; color: #17613a; }
.worse { background: #fbe1de; color: #8c2a1c; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 18px; }
.card { border: 1px solid #e3e6ea; border-radius: 8px; padding: 10px 14px;
  min-width: 150px; flex: 1; max-width: 240px; }
.card .name { color: #5b616b; font-size: 12.5px; overflow-wrap: anywhere; }
.card .value { font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card .from { color: #8a8f98; font-size: 12.5px; }
summary { cursor: pointer; color: #2f6db5; margin: 12px 0; }
"""

_SPARK_WIDTH, _SPARK_HEIGHT = 120, 22
_NUM_CARDS = 4
_PIXELS_PER_INCH = 92


def write_report(
    workdir: str | os.PathLike[str],
    *,
    title: str,
    metrics: Mapping[str, np.ndarray],
    timeline: Timeline | None = None,
    samples_before: Sequence[Mapping[str, Any]] = (),
    samples_after: Sequence[Mapping[str, Any]] = (),
    graph_svg: str = "",
    plan_text: str = "",
    extra: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes the page and the figures of a run; what is empty is left out.

    Args:
        workdir: gets `report.html` and `figures/`.
        title: of the page.
        metrics: columns as `read_metrics` gives them.
        timeline: of the calls.
        samples_before: completions before training, each with "prompt", "completion"
            and, if known, "score".
        samples_after: the same, of the same prompts, after it.
        graph_svg: a drawing of the dataflow graph.
        plan_text: the execution plan, in a fixed-width font.
        extra: facts for the head of the page: device, commit, model.

    Returns:
        The path of the page.
    """
    from realjax.runtime import figures  # matplotlib takes a second to import.

    workdir = pathlib.Path(workdir)
    folder = workdir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    has_steps = "step" in metrics and len(metrics["step"]) > 0
    curves = figures.curves(metrics) if has_steps else {}
    machine = {
        name: figure for name, figure in curves.items() if name in figures.MACHINE
    }
    events = timeline.events if timeline is not None else ()
    colors = figures.call_colors(metrics, events)
    drawn = {
        "timeline": figures.timeline(events, colors),
        "timing": figures.timing(metrics, colors),
    }
    if graph_svg:
        (folder / "graph.svg").write_text(graph_svg, encoding="utf-8")
    parts = [
        _head(title, metrics, extra or {}),
        _cards(metrics) if has_steps else "",
        _curves({n: f for n, f in curves.items() if n not in machine}, folder),
        _samples(samples_before, samples_after),
        _section(
            "Calls",
            *(_image(f, folder, n) for n, f in drawn.items()),
            _predictions(metrics) if has_steps else "",
        ),
        _section(
            "Dataflow graph and execution plan",
            graph_svg,
            f"<pre>{html.escape(plan_text)}</pre>" if plan_text else "",
        ),
        _summary(metrics, machine, folder) if has_steps else "",
    ]
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )
    path = workdir / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _head(title: str, metrics: Mapping[str, np.ndarray], extra: Mapping) -> str:
    facts = {"steps": int(max(metrics["step"]))} if len(metrics.get("step", ())) else {}
    shown = "&ensp;·&ensp;".join(
        f"{html.escape(str(name))} <b>{html.escape(str(value))}</b>"
        for name, value in {**facts, **extra}.items()
    )
    return f"<h1>{html.escape(title)}</h1><p class='facts'>{shown}</p>"


def _cards(metrics: Mapping[str, np.ndarray]) -> str:
    """Held-out numbers at the first and the last evaluation; else of training."""
    held_out = [name for name in metrics if name.startswith("eval/")]
    chosen = []
    for name in held_out or [name for name in metrics if "/" not in name]:
        values = metrics[name][np.isfinite(metrics[name])]
        if name not in ("step", "epoch") and len(values) > 1:
            chosen.append((name, values[0], values[-1]))
    # What changed most, in units of itself, says most.
    chosen.sort(key=lambda item: -abs(item[2] - item[1]) / (abs(item[1]) + 1e-9))
    cards = (
        f"<div class='card'><div class='name'>{html.escape(name)}</div>"
        f"<div class='value'>{last:.4g}</div>"
        f"<div class='from'>from {first:.4g}</div></div>"
        for name, first, last in chosen[:_NUM_CARDS]
    )
    return f"<div class='cards'>{''.join(cards)}</div>" if chosen else ""


def _curves(curves: Mapping[str, Any], folder: pathlib.Path) -> str:
    shown = (
        f"<h3>{html.escape(name)}</h3>{_image(figure, folder, f'metrics_{name}')}"
        for name, figure in curves.items()
    )
    return _section("Metrics", *shown)


def _samples(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> str:
    """A row for each prompt: the prompt, its completion before, and after."""
    prompts = dict.fromkeys(sample["prompt"] for sample in (*before, *after))
    if not prompts:
        return ""
    columns = {
        name: {sample["prompt"]: sample for sample in reversed(samples)}
        for name, samples in (("before", before), ("after", after))
        if samples
    }
    rows = []
    for prompt in prompts:
        found = {name: column.get(prompt) for name, column in columns.items()}
        first = (found.get("before") or {}).get("score")
        cells = [f"<td class='text'>{html.escape(prompt)}</td>"]
        for name, sample in found.items():
            score = (sample or {}).get("score")
            verdict = ""
            if name == "after" and score is not None and first is not None:
                verdict = " better" if score > first else " worse" * (score < first)
            chip = (
                f"<span class='score{verdict}'>{score:.3g}</span><br>"
                if score is not None
                else ""
            )
            text = html.escape((sample or {}).get("completion", ""))
            cells.append(f"<td class='text'>{chip}{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("prompt", *columns))
    return _section("Completions", f"<table><tr>{head}</tr>{''.join(rows)}</table>")


def _predictions(metrics: Mapping[str, np.ndarray]) -> str:
    """Seconds that the plan expected of each call, and the median of the measured."""
    rows = "".join(
        f"<tr><td>{html.escape(call)}</td><td class='number'>{predicted:.4g}</td>"
        f"<td class='number'>{measured:.4g}</td></tr>"
        for call, predicted, measured in compared(metrics, warm_up_steps=2)
    )
    names = ("predicted", "measured")
    heads = "".join(f"<th class='number'>{name}, s</th>" for name in names)
    return f"<table><tr><th>call</th>{heads}</tr>{rows}</table>" if rows else ""


def _summary(
    metrics: Mapping[str, np.ndarray],
    machine: Mapping[str, Any],
    folder: pathlib.Path,
) -> str:
    """Every metric on a line, and curves of the machinery's numbers."""
    rows = []
    for name, values in metrics.items():
        known = values[np.isfinite(values)]
        if name == "step" or not len(known):
            continue
        numbers = (known[0], known[-1], known.min(), known.max())
        cells = "".join(f"<td class='number'>{number:.5g}</td>" for number in numbers)
        rows.append(
            f"<tr><td>{html.escape(name)}</td><td>{_sparkline(known)}</td>{cells}</tr>"
        )
    heads = "".join(
        f"<th class='number'>{name}</th>" for name in ("first", "last", "min", "max")
    )
    table = f"<table><tr><th>metric</th><th></th>{heads}</tr>{''.join(rows)}</table>"
    figures = "".join(
        f"<h3>{html.escape(name)}</h3>{_image(figure, folder, f'metrics_{name}')}"
        for name, figure in machine.items()
    )
    return _section(
        "All numbers",
        f"<details><summary>{len(rows)} metrics</summary>{table}</details>",
        f"<details><summary>the machine</summary>{figures}</details>"
        if figures
        else "",
    )


def _section(title: str, *parts: str) -> str:
    body = "".join(part for part in parts if part)
    return f"<h2>{html.escape(title)}</h2>{body}" if body else ""


def _image(figure: Any, folder: pathlib.Path, name: str) -> str:
    """Saves a figure as PNG and returns it as an element with the bytes inside."""
    if figure is None:
        return ""
    path = folder / (re.sub(r"[^\w.-]", "_", name) + ".png")
    figure.savefig(path)
    data = base64.b64encode(path.read_bytes()).decode()
    # Panels of all figures are of one size, and sharp on dense screens.
    width = round(figure.get_figwidth() * _PIXELS_PER_INCH)
    return (
        f"<img alt='{html.escape(name)}' width='{width}' "
        f"src='data:image/png;base64,{data}'>"
    )


def _sparkline(values: np.ndarray) -> str:
    """A curve the size of a word."""
    if len(values) < 2:
        return ""
    # A point for each two pixels is all that can be seen.
    picked = values[np.linspace(0, len(values) - 1, min(len(values), 60)).astype(int)]
    low, high = picked.min(), picked.max()
    x = np.linspace(1, _SPARK_WIDTH - 1, len(picked))
    y = _SPARK_HEIGHT - 3 - (picked - low) / ((high - low) or 1.0) * (_SPARK_HEIGHT - 6)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f"<svg width='{_SPARK_WIDTH}' height='{_SPARK_HEIGHT}'><polyline "
        f"points='{points}' fill='none' stroke='#2f6db5' stroke-width='1.4'/></svg>"
    )
