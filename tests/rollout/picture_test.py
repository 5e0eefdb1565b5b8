"""Pictures of slots and pages."""

import numpy as np
from matplotlib.figure import Figure

from realjax.rollout.picture import Stay, draw_pages, draw_slots, stays

# Two slots, five launches: row 0 makes room for row 2, and row 1 ends early.
SLOTS = [np.array(rows, np.int32) for rows in ([0, 1], [0, 1], [2, 1], [2, -1], [2, 3])]


def test_a_stay_lasts_from_the_first_launch_to_the_last():
    assert stays(SLOTS) == [
        Stay(row=0, slot=0, first=0, end=2),
        Stay(row=2, slot=0, first=2, end=5),
        Stay(row=1, slot=1, first=0, end=3),
        Stay(row=3, slot=1, first=4, end=5),
    ]


def bars(axis):
    """Slot, begin and width of each bar but those behind all."""
    found = [(bar.get_y() + 0.43, bar.get_x(), bar.get_width()) for bar in axis.patches]
    return [tuple(map(round, bar)) for bar in found[2:]]


def test_bars_are_as_long_as_their_rows_stay():
    axis = Figure().subplots()
    draw_slots(axis, SLOTS, steps=4)
    assert bars(axis) == [(0, 0, 8), (0, 8, 12), (1, 0, 12), (1, 16, 4)]
    assert [bar.get_width() for bar in axis.patches[:2]] == [20, 20]  # Behind all.
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # Slot 0 is on top.


def test_rows_of_a_group_have_one_color():
    axis = Figure().subplots()
    draw_slots(axis, SLOTS, steps=1, groups=[0, 0, 1, 1])
    zero, two, one, three = (bar.get_facecolor() for bar in axis.patches[2:])
    assert zero == one != two == three


def test_pages_of_several_rollouts_have_room_in_one_picture():
    axis = Figure().subplots()
    draw_pages(axis, [1, 3, 2], steps=8, label="low")
    draw_pages(axis, [10, 30, 20], steps=8, label="high")
    low, high = (patch.get_data() for patch in axis.patches)
    assert low.values.tolist() == [1, 3, 2] and low.edges.tolist() == [0, 8, 16, 24]
    assert high.values.tolist() == [10, 30, 20]
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 30
