"""Drawings of a reallocation: a table of its leaf classes, or an SVG of its flows."""

import dataclasses
import html
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from realjax.realloc.grouping import sum_by
from realjax.realloc.hops import ACROSS, ON_DEVICE, WITHIN
from realjax.realloc.hosts import Hosts
from realjax.realloc.layouts import LeafClass
from realjax.realloc.routes import Route, route

MAX_HOPS = 1 << 21
"""Hops are listed for a drawing up to this many a class."""

MAX_NODES = 64
"""Devices, or hosts where there are more devices, that a picture shows on a side."""

BOX_WIDTH, BOX_HEIGHT, ROW, GAP, MARGIN = 84, 22, 30, 22, 24
BETWEEN, ARC = 420, 130
TOP = 78
MIN_LINE = 0.7
COLORS = {ON_DEVICE: "#bab0ac", ACROSS: "#f58518", WITHIN: "#4c78a8"}
RELAY_COLOR = "#54a24b"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Flow:
    """The route of some equal leaves.

    Attributes:
        names: The leaves.
        route: The route of each.
    """

    names: tuple[str, ...]
    route: Route


def flows(
    classes: Iterable[LeafClass], dtype: Any, hosts: Hosts | None = None
) -> list[Flow]:
    """Work out the route of every class.

    Args:
        classes: As `leaf_classes` groups a tree.
        dtype: The type on the way.
        hosts: Which devices share a host; None takes all for neighbours.
    """
    return [
        Flow(
            names=found.names,
            route=route(found.source, found.destination, found.shape, dtype, hosts),
        )
        for found in classes
    ]


def busiest_link(found: Route) -> tuple[int, int, int] | None:
    """Return source, destination and bytes of the link that carries most.

    Returns:
        None where nothing is sent, where the compiler chooses the links, and for more
        than `MAX_HOPS`.
    """
    num_hops = len(found.boxes) * found.destination_holders.shape[1]
    if found.kind in ("none", "jit") or num_hops > MAX_HOPS:
        return None
    sources, destinations, sizes = found.link_bytes()
    if not len(sizes):
        return None
    most = int(sizes.argmax())
    return int(sources[most]), int(destinations[most]), int(sizes[most])


def flows_text(moving: Sequence[Flow]) -> str:
    """One line a class of leaves, and their sum.

    Bytes are those of all leaves of a class, by what they pass; the busiest link is
    that of one leaf. Links of a jitted identity are the compiler's choice: none shown.
    """
    rows: list[tuple[str, ...]] = [
        ("leaves", "shape", "kind", "pieces", *_PHASE_TITLES, "busiest link")
    ]
    totals = dict.fromkeys(_PHASE_TITLES, 0)
    for flow in moving:
        found, number = flow.route, len(flow.names)
        sizes = {k: number * v for k, v in found.phase_bytes.items()}
        for title, size in zip(_PHASE_TITLES, sizes.values(), strict=True):
            totals[title] += size
        link = busiest_link(found)
        rows.append(
            (
                flow.names[0] + (f" +{number - 1}" if number > 1 else ""),
                "×".join(map(str, found.shape)) or "scalar",
                found.kind,
                str(len(found.boxes)),
                *map(bytes_text, sizes.values()),
                f"{link[0]}→{link[1]} {bytes_text(link[2])}" if link else "-",
            )
        )
    rows.append(("sum", "", "", "", *map(bytes_text, totals.values()), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if place < _NUM_WORDS else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


_PHASE_TITLES = ("on device", "across hosts", "within host")
_NUM_WORDS = 3


def bytes_text(size: int) -> str:
    """Write bytes in the largest unit that leaves a whole part, as in `1.5 GiB`."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, 6)
    return f"{size / (1 << 10 * power):.1f} {' KMGTPE'[power]}iB"


def flows_svg(moving: Sequence[Flow], title: str = "") -> str:
    """The devices before (left) and after (right), and what flows between them.

    Lines are as wide as their bytes; a box as high as its lines is the busiest. A relay
    starts on the right: it passes on what came across. With more than `MAX_NODES`
    devices a node is a host.

    Args:
        moving: Classes of one tree, so between the same devices.
        title: Stands above the picture.

    Returns:
        A whole `<svg>` element.

    Raises:
        ValueError: nothing to draw, or too much.
    """
    links, before, after, hosts = _links(moving)
    places = [_places(side, hosts) for side in (before, after)]
    height = TOP + MARGIN + max(max(side.values()) for side in places) + BOX_HEIGHT
    width = 2 * MARGIN + 2 * BOX_WIDTH + BETWEEN + ARC
    xs = (MARGIN, MARGIN + BOX_WIDTH + BETWEEN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(MARGIN, 26, title, 13, "#222", "start", "bold"),
        _legend(moving),
    ]
    for x, side in zip(xs, places, strict=True):
        parts += _host_frames(x, side, hosts)
    parts += _lines(links, places, xs)
    label = "device" if hosts else "host"
    for x, side in zip(xs, places, strict=True):
        parts += [_box(x, TOP + y, f"{label} {node}") for node, y in side.items()]
    return "\n".join(parts) + "\n</svg>"


# Source, destination, phase, whether it is a relay, bytes.
_Link = tuple[int, int, int, bool, int]


def _links(
    moving: Sequence[Flow],
) -> tuple[list[_Link], list[int], list[int], dict[int, int]]:
    """Add the classes up by link.

    Returns:
        The links, the nodes before, the nodes after, and the host of every node (none
        where nodes are hosts).
    """
    if not moving:
        raise ValueError("There is no leaf to draw; give at least one class.")
    first = moving[0].route
    before, after = (
        np.unique(h) for h in (first.source_holders, first.destination_holders)
    )
    is_by_host = max(len(before), len(after)) > MAX_NODES
    if is_by_host:
        before, after = (np.unique(first.hosts_of(side)) for side in (before, after))
    found: dict[tuple[int, int, int, bool], int] = {}
    for flow in moving:
        num_hops = len(flow.route.boxes) * flow.route.destination_holders.shape[1]
        if num_hops > MAX_HOPS or max(len(before), len(after)) > MAX_NODES:
            raise ValueError(
                f"{flow.names[0]} takes {num_hops} hops between {len(before)} and"
                f" {len(after)} {'hosts' if is_by_host else 'devices'}; a picture shows"
                f" {MAX_HOPS} hops and {MAX_NODES} hosts. Draw a smaller allocation of"
                " the same strategies, or print `flows_text`."
            )
        for link, size in _sums(flow.route, is_by_host):
            found[link] = found.get(link, 0) + len(flow.names) * size
    nodes = np.union1d(before, after)
    hosts = (
        {}
        if is_by_host
        else dict(zip(nodes.tolist(), first.hosts_of(nodes).tolist(), strict=True))
    )
    links = [(*link, size) for link, size in found.items()]
    return links, before.tolist(), after.tolist(), hosts


def _sums(
    found: Route, is_by_host: bool
) -> Iterable[tuple[tuple[int, int, int, bool], int]]:
    hops = found.hops
    ends = [hops.sources, hops.destinations]
    if is_by_host:
        ends = [found.hosts_of(side) for side in ends]
    columns = np.stack([*ends, hops.phases, hops.is_relay])
    links, groups = np.unique(columns, axis=1, return_inverse=True)
    sizes = sum_by(groups.reshape(-1), found.piece_bytes[hops.pieces], links.shape[1])
    for (source, destination, phase, is_relay), size in zip(
        links.T.tolist(), sizes.tolist(), strict=True
    ):
        yield (source, destination, phase, bool(is_relay)), size


def _places(nodes: list[int], hosts: dict[int, int]) -> dict[int, int]:
    """The height of every node: one under the other, hosts apart."""
    places: dict[int, int] = {}
    y = 0
    ordered = sorted(nodes, key=lambda node: (hosts.get(node, 0), node))
    for node, after in itertools.zip_longest(ordered, ordered[1:]):
        places[node] = y
        y += ROW if hosts.get(node) == hosts.get(after) else ROW + GAP
    return places


def _host_frames(x: int, side: dict[int, int], hosts: dict[int, int]) -> list[str]:
    frames = []
    for host in sorted({hosts[node] for node in side if node in hosts}):
        heights = [y for node, y in side.items() if hosts[node] == host]
        top, bottom = TOP + min(heights) - 6, TOP + max(heights) + BOX_HEIGHT + 6
        frames.append(
            f'<rect x="{x - 8}" y="{top}" width="{BOX_WIDTH + 16}" '
            f'height="{bottom - top}" rx="8" fill="#f7f7f7" stroke="#ddd"/>'
        )
        frames.append(_text(x - 4, top - 3, f"host {host}", 9, "#888", "start"))
    return frames


def _lines(
    links: Sequence[_Link], places: Sequence[dict[int, int]], xs: tuple[int, int]
) -> list[str]:
    """Lines leave and reach a box one under the other, in the order of their ends."""
    before, after = places
    moves = sorted(
        (link for link in links if not link[3]),
        key=lambda link: (before[link[0]], after[link[1]], link[2]),
    )
    totals: dict[tuple[int, int], int] = {}
    for source, destination, _, _, size in moves:
        for end in ((0, source), (1, destination)):
            totals[end] = totals.get(end, 0) + size
    scale = (BOX_HEIGHT - 2) / max(totals.values(), default=1)
    heights = {
        (side, node): TOP + places[side][node] + (BOX_HEIGHT - total * scale) / 2
        for (side, node), total in totals.items()
    }
    x0, x1 = xs[0] + BOX_WIDTH, xs[1]
    middle = (x0 + x1) // 2
    lines = []
    for link in moves:
        source, destination, phase, _, size = link
        y0, y1 = heights[0, source], heights[1, destination]
        heights[0, source] += size * scale
        heights[1, destination] += size * scale
        y0, y1 = y0 + size * scale / 2, y1 + size * scale / 2
        path = f"M{x0} {y0:.1f} C{middle} {y0:.1f} {middle} {y1:.1f} {x1} {y1:.1f}"
        lines.append(_line(link, path, COLORS[phase], scale))
    x = xs[1] + BOX_WIDTH
    for link in links:
        if link[3]:
            y0, y1 = (TOP + after[node] + BOX_HEIGHT // 2 for node in link[:2])
            # Far ones bend further out.
            out = x + min(ARC, 24 + abs(y1 - y0) // 3)
            path = f"M{x} {y0} C{out} {y0} {out} {y1} {x} {y1}"
            lines.append(_line(link, path, RELAY_COLOR, scale))
    return lines


def _line(link: _Link, path: str, color: str, scale: float) -> str:
    source, destination, _, _, size = link
    words = f"{source} → {destination}: {bytes_text(size)}"
    return (
        f'<path d="{path}" fill="none" stroke="{color}" stroke-opacity="0.6" '
        f'stroke-width="{max(MIN_LINE, size * scale):.1f}">'
        f"<title>{html.escape(words)}</title></path>"
    )


def _legend(moving: Sequence[Flow]) -> str:
    totals = [0, 0, 0]
    relayed = 0
    for flow in moving:
        number, hops = len(flow.names), flow.route.hops
        for phase, size in enumerate(flow.route.phase_bytes.values()):
            totals[phase] += number * size
        relays = flow.route.piece_bytes[hops.pieces[hops.is_relay]]
        relayed += number * int(relays.sum())
    entries = [
        (COLORS[ON_DEVICE], "on device", totals[ON_DEVICE]),
        (COLORS[ACROSS], "across hosts", totals[ACROSS]),
        (COLORS[WITHIN], "within host", totals[WITHIN] - relayed),
        (RELAY_COLOR, "relayed within host", relayed),
    ]
    parts, x = [], MARGIN
    for color, name, size in entries:
        if size:
            words = f"{name} {bytes_text(size)}"
            parts.append(
                f'<rect x="{x}" y="37" width="14" height="8" rx="2" fill="{color}"/>'
            )
            parts.append(_text(x + 19, 45, words, 11, "#444", "start"))
            x += 40 + 6 * len(words)
    return "\n".join(parts)


def _box(x: int, y: int, words: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" '
        'fill="white" stroke="#888"/>\n'
        + _text(x + BOX_WIDTH // 2, y + 15, words, 11, "#222", "middle")
    )


def _text(
    x: int, y: int, words: str, size: int, fill: str, anchor: str, weight="normal"
) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{html.escape(words)}</text>'
    )
