"""Tests of `realjax/planner/timeline.py`: a plan drawn, and what is in the drawing."""

import functools
import itertools
import json
import re
import xml.etree.ElementTree

import jax.numpy as jnp
import pytest

from realjax.dataflow.account import GIB
from realjax.planner.memory import memory_account
from realjax.planner.simulate import price
from realjax.planner.timeline import (
    LEFT,
    RIGHT,
    WIDTH,
    plan_timeline,
    timeline_svg,
    write_trace,
)
from tests.planner import plan_spaces

SVG = "{http://www.w3.org/2000/svg}"
ALLOCATIONS = {
    "rollout": "d4@0-3",
    "reward": "d2@0-1",
    "reference": "d2@2-3+offload",
    "value": "d2@0-1",
    "train_policy": "f2@0-1",
    "train_critic": "f2@2-3",
}


@functools.cache
def space():
    return plan_spaces.space_of("4xh100")


@functools.cache
def account():
    plan = space().execution_plan(numbers())
    return memory_account(
        *(space().graph, plan, plan_spaces.roles_of(space().graph)),
        plan_spaces.WORK,
        limit_bytes=int(space().problem.memory_bytes),
    )


@functools.cache
def numbers():
    return plan_spaces.numbers_of(space(), ALLOCATIONS)


@functools.cache
def timeline():
    return plan_timeline(space(), numbers(), account())


def test_calls_are_where_and_when_the_simulator_has_them():
    found = price(space().problem, jnp.asarray([numbers()]))
    assert timeline().seconds == pytest.approx(float(found.seconds[0]))
    events = {event.name: event for event in timeline().events}
    for index, name in enumerate(space().names):
        assert events[name].start == pytest.approx(float(found.begin[0, index]))
        assert events[name].end == pytest.approx(float(found.end[0, index]))
        assert events[name].devices == space().chosen(numbers())[name].devices
    assert events["train_policy"].devices == (0, 1)


def test_a_copy_takes_the_devices_of_both_its_ends():
    (copy,) = (e for e in timeline().events if e.name == "copy of policy for rollout")
    assert copy.kind == "realloc"
    assert copy.devices == (0, 1, 2, 3)  # From two of them to all.
    rollout = next(e for e in timeline().events if e.name == "rollout")
    assert copy.end <= rollout.start + 1e-6


def test_what_waits_in_host_memory_comes_back_before_its_call():
    names = [event.name for event in timeline().events if event.kind == "offload"]
    assert names == ["reload of reference"]


def test_memory_is_that_of_the_account():
    assert [lane.devices for lane in timeline().lanes] == [(0, 1), (2, 3)]
    for lane, peak in zip(timeline().lanes, account().peak_bytes, strict=True):
        assert lane.peak_bytes == peak
        times = [level.begin for level in lane.levels]
        assert times == sorted(times)
        # After the step a device holds what it did before.
        assert lane.levels[0].num_bytes == account().resting_bytes[lane.devices[0] // 2]
    # While the policy is trained, the most of the account's line of it.
    train = next(e for e in timeline().events if e.name == "train_policy")
    (moment,) = (m for m in account().moments if str(m.step) == "Run train_policy")
    first = timeline().lanes[0]
    during = [at for at in first.levels if at.begin <= train.start + 1e-6][-1]
    assert during.num_bytes == moment.device_bytes[0]


def test_a_group_of_devices_has_a_name():
    assert [lane.label for lane in timeline().lanes] == ["devices 0–1", "devices 2–3"]


def drawn():
    return xml.etree.ElementTree.fromstring(timeline_svg(timeline(), "A step"))


def test_the_picture_is_the_same_each_time_and_names_everything():
    picture = timeline_svg(timeline(), "A step")
    assert picture == timeline_svg(timeline(), "A step")
    for name, text in ALLOCATIONS.items():
        assert name in picture
        assert text.partition("+")[0] in picture
    assert f"limit {timeline().limit_bytes / GIB:.1f} GiB" in picture


def test_blocks_lie_within_the_picture_and_calls_of_a_lane_apart():
    rows = {}
    for group in drawn().iter(f"{SVG}g"):
        (box,) = group.iter(f"{SVG}rect")
        x, width = float(box.get("x", "")), float(box.get("width", ""))
        assert LEFT - 1 <= x
        assert x + width <= WIDTH - RIGHT + 1
        rows.setdefault(box.get("y"), []).append((x, x + width))
        for text in group.iter(f"{SVG}text"):
            # Words are no wider than their block.
            assert 6 * len(text.text or "") <= width
    assert len(rows) == 2
    for spans in rows.values():
        spans.sort()
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start >= end - 1


def test_words_beside_each_other_do_not_touch():
    rows = {}
    for text in drawn().iter(f"{SVG}text"):
        width = 6 * len(text.text or "") * float(text.get("font-size", "")) / 11
        x = float(text.get("x", ""))
        x -= width / 2 if text.get("text-anchor") == "middle" else 0
        rows.setdefault(text.get("y"), []).append((x, x + width))
    for spans in rows.values():
        spans.sort()
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start >= end


def test_a_trace_has_a_row_for_each_group(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(timeline(), path)
    events = json.loads(path.read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {rows[0], rows[2]} == {"devices 0–1", "devices 2–3"}
    calls = [e for e in events if e["ph"] == "X" and e["name"] == "rollout"]
    assert sorted(call["tid"] for call in calls) == [0, 2]
    rollout = next(e for e in timeline().events if e.name == "rollout")
    assert calls[0]["dur"] == pytest.approx(rollout.seconds * 1e6)
    counters = {e["name"] for e in events if e["ph"] == "C"}
    assert counters == {"GiB on devices 0–1", "GiB on devices 2–3"}
    assert not re.search(r"NaN|Infinity", path.read_text())
