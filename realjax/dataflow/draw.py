"""Drawings of a dataflow graph: a few lines of text, or an SVG picture."""

import html

from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan

BOX_WIDTH, BOX_HEIGHT = 190, 58
COLUMN, ROW, MARGIN = 300, 92, 24
COLORS = {
    "policy": "#4c78a8",
    "critic": "#f58518",
    "reward": "#54a24b",
    "reference": "#79706e",
    None: "#b279a2",
}
OTHER_COLOR = "#e45756"


def graph_text(graph: DataflowGraph, plan: ExecutionPlan | None = None) -> str:
    """One line a call: role, function, allocation, what it reads and writes.

    What a call with staleness writes is for the next step.

    Example:
        >>> from realjax.algorithms import sft
        >>> print(graph_text(sft.graph(sft.SFT())))
        1  train_policy  policy  Train  (tokens, completion_mask)
    """
    width = max(map(len, graph.calls))
    lines = []
    for depth, names in enumerate(graph.levels(), start=1):
        for name in names:
            node = graph.calls[name]
            place = plan.calls.get(name) if plan else None
            parts = [
                f"{depth}  {name:<{width}}",
                node.role or "-",
                type(node.function).__name__,
                f"({', '.join(node.reads)})"
                + (f" -> {', '.join(node.writes)}" if node.writes else "")
                + ("  one step later" if node.staleness else ""),
            ]
            if place:
                parts.insert(3, str(place.allocation))
            lines.append("  ".join(parts))
    return "\n".join(lines)


def graph_svg(graph: DataflowGraph, plan: ExecutionPlan | None = None) -> str:
    """The graph from left to right: boxes are calls, arrows the keys that join them.

    Dashed arrows carry keys to the next step.

    Args:
        graph: to draw.
        plan: adds the allocation of each call.

    Returns:
        A whole `<svg>` element.
    """
    columns = _columns(graph)
    tallest = max(map(len, columns))
    places: dict[str, tuple[int, int]] = {}
    for x, names in enumerate(columns):
        offset = (tallest - len(names)) * ROW // 2
        for y, name in enumerate(names):
            places[name] = (MARGIN + x * COLUMN, MARGIN + offset + y * ROW)
    width = 2 * MARGIN + (len(columns) - 1) * COLUMN + BOX_WIDTH
    height = 2 * MARGIN + (tallest - 1) * ROW + BOX_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#888"/></marker>'
        "</defs>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    parts += [_data_box(places["data"])]
    parts += [_edge(graph, places, name) for name in graph.calls]
    parts += [_box(graph, plan, places, name) for name in graph.calls]
    return "\n".join(parts) + "\n</svg>"


def _columns(graph: DataflowGraph) -> list[list[str]]:
    """The data set's place, then calls by depth."""
    return [["data"], *graph.levels()]


def _edge(graph: DataflowGraph, places: dict, name: str) -> str:
    """Arrows into one call, each with the keys it carries."""
    node = graph.calls[name]
    parents = {parent: [] for parent in sorted(graph.parents(name))}
    for parent in parents:
        written = graph.calls[parent].writes
        parents[parent] = [key for key in node.reads if key in written]
    inputs = [key for key in node.reads if key in graph.inputs]
    if inputs:
        parents["data"] = inputs
    lines = []
    x1, y1 = places[name][0], places[name][1] + BOX_HEIGHT // 2
    for parent, keys in parents.items():
        x0, y0 = places[parent]
        x0, y0 = x0 + BOX_WIDTH, y0 + BOX_HEIGHT // 2
        bend, is_near = (x1 - x0) // 2, x1 - x0 < COLUMN
        color = "#999" if is_near else "#ddd"
        later = ["one step later"] * (parent in graph.stale_calls)
        lines.append(
            f'<path d="M{x0} {y0} C{x0 + bend} {y0} {x1 - bend} {y1} {x1} {y1}" '
            f'fill="none" stroke="{color}" stroke-width="1.4" '
            + ('stroke-dasharray="5 4" ' if later else "")
            + 'marker-end="url(#tip)">'
            f"<title>{html.escape(', '.join([*keys, *later]))}</title></path>"
        )
        if is_near:  # Room for words between neighbours only.
            x, y = (x0 + x1) // 2, (y0 + y1) // 2
            lines += [
                f'<text x="{x}" y="{y + below}" font-size="10" fill="#666" '
                f'text-anchor="middle">{html.escape(words)}</text>'
                for below, words in zip((-6, 13), [_short(keys), *later], strict=False)
            ]
    return "\n".join(lines)


def _short(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} +{len(keys) - 1}"


def _box(
    graph: DataflowGraph, plan: ExecutionPlan | None, places: dict, name: str
) -> str:
    node, (x, y) = graph.calls[name], places[name]
    color = COLORS.get(node.role, OTHER_COLOR)
    detail = f"{node.role or 'batch'} · {type(node.function).__name__}"
    place = plan.calls.get(name) if plan else None
    lines = [
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7" '
        'fill="white"/>',  # Arrows pass behind.
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7" '
        f'fill="{color}" fill-opacity="0.14" stroke="{color}" stroke-width="1.6"/>',
        _text(x, y + 19, name, 13, "#222", "bold"),
        _text(x, y + 35, detail, 11, "#444"),
    ]
    if place is not None:
        lines.append(_text(x, y + 50, str(place.allocation), 11, color, "bold"))
    return "\n".join(lines)


def _data_box(place: tuple[int, int]) -> str:
    x, y = place
    return (
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="28" '
        'fill="#f3f3f3" stroke="#999"/>\n' + _text(x, y + 34, "data set", 13, "#444")
    )


def _text(x: int, y: int, words: str, size: int, fill: str, weight="normal") -> str:
    return (
        f'<text x="{x + BOX_WIDTH // 2}" y="{y}" font-size="{size}" fill="{fill}" '
        f'font-weight="{weight}" text-anchor="middle">{html.escape(words)}</text>'
    )
