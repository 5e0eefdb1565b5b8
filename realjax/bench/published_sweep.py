"""Searched plans beside ReaL's template, for all sizes of models and numbers of GPUs.

`python -m realjax.bench.published_steps --sweep=docs` writes

    published_sweep.json    seconds of each plan of each step, and what they come to
    published_sweep.svg     how much shorter steps of searched plans are, as a table
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import rich.console

from realjax.bench.environment import describe
from realjax.bench.published_steps import PLANS, SIZES, Predictor, PublishedStep
from realjax.planner.cost import Coefficients

GPUS = (8, 16, 32, 64, 128)
NEW_TOKENS = 384

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 52, 30, 64, 76
GAP = 30


def sweep(
    coefficients: Coefficients,
    folder: pathlib.Path,
    *,
    moves: int,
    seed: int,
    gpus: Sequence[int] = GPUS,
    sizes: Sequence[int] = tuple(SIZES),
) -> dict[str, Any]:
    """Predict all steps, write them and draw them.

    Args:
        coefficients: of the machine.
        folder: gets the two files.
        moves: of each chain of a search.
        seed: of each search.
        gpus: to go over.
        sizes: of models, for the policy and for the critic.

    Returns:
        What the steps come to.
    """
    steps = [
        PublishedStep(policy=policy, critic=critic, new_tokens=NEW_TOKENS, gpus=count)
        for count in gpus
        for policy in sizes
        for critic in sizes
    ]
    rows, console = [], rich.console.Console(stderr=True)
    for step in steps:
        row = row_of(Predictor(step, coefficients, moves=moves, seed=seed))
        rows.append(row)
        found = (str(row[plan].get("seconds", "–")) for plan in PLANS)
        console.print(f"{step.policy}B {step.critic}B {step.gpus} GPUs:", *found)
    report = {
        "command": "python -m realjax.bench.published_steps --sweep",
        "environment": describe(),
        "moves": moves,
        "seed": seed,
        "coefficients": dataclasses.asdict(coefficients),
        "summary": summary(rows),
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "published_sweep.json").write_text(_by_line(report))
    (folder / "published_sweep.svg").write_text(picture(rows) + "\n")
    return report["summary"]


def _by_line(report: dict[str, Any]) -> str:
    """Write JSON with a line for each field, and for each row."""
    rows = ",\n".join(json.dumps(row) for row in report["rows"])
    fields = (f'"{k}": {json.dumps(v)}' for k, v in report.items() if k != "rows")
    return "{\n" + ",\n".join(fields) + f',\n"rows": [\n{rows}\n]\n}}\n'


def row_of(predictor: Predictor) -> dict[str, Any]:
    """Predict one step with each plan; what does not fit says so."""
    row = dataclasses.asdict(predictor.step)
    for plan in PLANS:
        try:
            row[plan] = getattr(predictor, plan)()
        except ValueError as error:
            row[plan] = {"does_not_fit": str(error).partition("\n")[0]}
    return row


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count where a searched plan is slower, and what it gains in the mean.

    Args:
        rows: of the sweep.
    """
    fitting = [row for row in rows if "seconds" in row["searched"]]
    gains = [gain(row) for row in fitting]
    ours = [
        1 - row["searched"]["of_ours"]["seconds"] / row["template"]["seconds"]
        for row in fitting
        if "of_ours" in row["searched"]
    ]
    slower = {
        plan: [
            {key: row[key] for key in ("policy", "critic", "gpus")}
            for row in fitting
            if row["searched"]["seconds"] > row[plan].get("seconds", np.inf)
        ]
        for plan in ("template", "symmetric")
    }
    return {
        "num_steps": len(rows),
        "num_fitting": len(fitting),
        "mean_gain_over_template": float(np.mean(gains)) if gains else None,
        "least_gain_over_template": min(gains, default=None),
        "mean_gain_of_our_options": float(np.mean(ours)) if ours else None,
        "num_best_of_our_options": sum(
            row["searched"]["options"] == "ours" for row in fitting
        ),
        "num_our_options_slower_than_template": sum(gain < 0 for gain in ours),
        "slower_than": slower,
    }


def gain(row: dict[str, Any]) -> float:
    """Return how much of the template's step a searched plan saves, as a share.

    Args:
        row: of the sweep.
    """
    return 1 - row["searched"]["seconds"] / row["template"]["seconds"]


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Draw a table for each number of GPUs: what a searched plan saves.

    Args:
        rows: of the sweep.

    Returns:
        A whole `<svg>` element.
    """
    counts = sorted({row["gpus"] for row in rows})
    sizes = sorted({row["policy"] for row in rows})
    table = len(sizes) * CELL_WIDTH + GAP
    width = LEFT + len(counts) * table
    height = TOP + len(sizes) * CELL_HEIGHT + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(
            LEFT,
            24,
            "How much of a step with ReaL's template a searched plan saves",
            14,
        ),
        _text(LEFT, 42, "predicted; – where no plan fits the memory", 11, "#666"),
        _text(12, TOP - 8, "policy", 11, "#666"),
    ]
    for row, size in enumerate(sizes):
        y = TOP + row * CELL_HEIGHT + CELL_HEIGHT // 2 + 4
        parts.append(_text(12, y, f"{size}B", 11, "#444"))
    for index, count in enumerate(counts):
        x = LEFT + index * table
        parts.append(_text(x, TOP - 8, f"{count} GPUs", 12, "#222"))
        bottom = TOP + len(sizes) * CELL_HEIGHT
        for column, size in enumerate(sizes):
            middle = x + column * CELL_WIDTH + CELL_WIDTH // 2
            parts.append(_text(middle, bottom + 16, f"{size}B", 11, "#444", "middle"))
        parts.append(_text(x, bottom + 34, "critic", 11, "#666"))
        parts += [
            _cell(
                row,
                x + sizes.index(row["critic"]) * CELL_WIDTH,
                TOP + sizes.index(row["policy"]) * CELL_HEIGHT,
            )
            for row in rows
            if row["gpus"] == count
        ]
    return "\n".join((*parts, "</svg>"))


def _cell(row: dict[str, Any], x: int, y: int) -> str:
    words, fill = "–", "#f3f3f3"
    if "seconds" in row["searched"]:
        saved = gain(row)
        words = f"{100 * saved:.0f} %"
        # White to blue; what is slower than the template is red.
        share = min(max(saved, 0.0), 0.7) / 0.7
        shade = [round(255 + share * (c - 255)) for c in (0x4C, 0x92, 0xD0)]
        fill = "#e45756" if saved < 0 else "#" + "".join(f"{c:02x}" for c in shade)
    middle = x + CELL_WIDTH // 2
    return (
        f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
        f'rx="3" fill="{fill}"/>'
        + _text(middle - 1, y + CELL_HEIGHT // 2 + 3, words, 11, "#222", "middle")
    )


def _text(
    x: int, y: int, words: str, size: int, fill: str = "#222", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" '
        f'text-anchor="{anchor}">{words}</text>'
    )
