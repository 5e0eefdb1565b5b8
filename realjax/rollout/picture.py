"""Pictures of a rollout: whose row stood in which slot, and how many pages were held.

    slot 0  ▐ row 0 ▌▐ row 4  ▌▐ row 7 ▌
    slot 1  ▐ row 1     ▌▐ row 5 ▌      ·      · nobody is there
            └────────────────────────────▶ steps of decoding

Both are drawn from what `Engine.work` keeps of a rollout with `is_traced`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from realjax.core.arrays import Int

_COLORS = (
    *("#2f6db5", "#e4772e", "#2b8a5b", "#8d4fb0", "#b8860b"),
    *("#c23b5a", "#1f8a9e", "#6b5b4b", "#5465d6", "#7a8f1e"),
)
_IDLE = "#eceef1"


class Stay(NamedTuple):
    """A row in a slot, from one launch up to another."""

    row: int
    slot: int
    first: int
    end: int


def stays(slots: Sequence[Int[np.ndarray, " B"]]) -> list[Stay]:
    """Find who stood where, in order of slots.

    Args:
        slots: the row in every slot at every launch, -1 for none; `Work.slots`.
    """
    found = []
    for slot, rows in enumerate(np.transpose(slots)):
        borders = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)]
        for first, end in itertools.pairwise(borders):
            if first < end and rows[first] >= 0:
                found.append(Stay(int(rows[first]), slot, first, end))
    return found


def draw_slots(
    axis: Axes,
    slots: Sequence[Int[np.ndarray, " B"]],
    *,
    steps: int,
    groups: Sequence[int] = (),
) -> None:
    """Draw a bar for every row in its slot; grey is where nobody is.

    Args:
        axis: to draw on.
        slots: the row in every slot at every launch, -1 for none; `Work.slots`.
        steps: of a launch.
        groups: of each row, which decides its color; by default itself.
    """
    num_slots = len(slots[0])
    axis.barh(range(num_slots), len(slots) * steps, height=0.86, color=_IDLE)
    for row, slot, first, end in stays(slots):
        group = groups[row] if len(groups) else row
        axis.barh(
            slot,
            (end - first) * steps,
            left=first * steps,
            height=0.86,
            color=_COLORS[group % len(_COLORS)],
            edgecolor="white",
            linewidth=0.8,
        )
    axis.set_ylim(num_slots - 0.4, -0.6)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("slot")
    axis.set_xlabel("steps of decoding")


def draw_pages(axis: Axes, held: Sequence[int], *, steps: int, label: str = "") -> None:
    """Draw how many pages were held at every launch.

    Args:
        axis: to draw on; further calls add to it.
        held: pages at every launch; `Work.held`.
        steps: of a launch.
        label: for a legend.
    """
    edges = np.arange(len(held) + 1) * steps
    axis.stairs(np.asarray(held), edges, label=label, linewidth=1.8)
    axis.set_ylim(bottom=0, auto=None)  # Further curves may be higher.
    axis.set_ylabel("pages held")
    axis.set_xlabel("steps of decoding")
