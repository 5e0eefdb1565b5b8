import json
import threading

import pytest

from realjax.core.timing import (
    Event,
    Rate,
    Stopwatch,
    Timeline,
    peak_host_bytes,
    trace,
)


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def test_record_notes_start_end_devices_kind_and_step():
    clock = Clock()
    timeline = Timeline(clock)
    with timeline.record("rollout", devices=[0, 1], kind="call", step=3):
        clock.seconds += 2
    with timeline.record("decode"):
        clock.seconds += 0.5
    assert timeline.events == (
        Event(name="rollout", start=100.0, end=102.0, devices=(0, 1), step=3),
        Event(name="decode", start=102.0, end=102.5, kind="host"),
    )
    assert timeline.events[0].seconds == 2.0


def test_a_body_that_raises_leaves_no_event():
    timeline = Timeline()
    with pytest.raises(RuntimeError), timeline.record("rollout"):
        raise RuntimeError
    assert timeline.events == ()


def test_take_gives_each_event_once_and_events_keeps_them():
    timeline = Timeline()
    timeline.add("a", 0.0, 1.0)
    assert [event.name for event in timeline.take()] == ["a"]
    timeline.add("b", 1.0, 2.0)
    assert [event.name for event in timeline.take()] == ["b"]
    assert timeline.take() == ()
    assert [event.name for event in timeline.events] == ["a", "b"]


def test_threads_may_add_events():
    timeline = Timeline()

    def add():
        for _ in range(200):
            timeline.add("a", 0.0, 1.0)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timeline.events) == 800


def test_a_misspelt_kind_is_named():
    with pytest.raises(ValueError, match=r"kind='reallok'.*Did you mean 'realloc'"):
        Timeline().add("a", 0.0, 1.0, kind="reallok")


def test_medians_skip_the_steps_that_compile():
    timeline = Timeline()
    for step, seconds in enumerate([10.0, 1.0, 3.0, 2.0], start=1):
        start = 100.0 * step
        timeline.add("a", start, start + seconds, step=step)
        timeline.add("b", start + 50, start + 51, kind="realloc", step=step)
    # 10, 1, 3, 2: the median of all is 2.5, without the first step 2.
    assert timeline.medians() == {"a": 2.5, "b": 1.0}
    assert timeline.medians(skip_steps=1) == {"a": 2.0, "b": 1.0}
    assert timeline.medians(kind="realloc") == {"b": 1.0}


def test_trace_has_one_row_per_device_and_one_for_the_host(tmp_path):
    timeline = Timeline()
    timeline.add("call", 7.5, 8.0, (0, 3), step=2)
    timeline.add("decode", 8.0, 8.25, kind="host")
    timeline.write_trace(tmp_path / "traces" / "timeline.json")
    written = json.loads((tmp_path / "traces" / "timeline.json").read_text())
    assert written == trace(timeline.events)
    rows = {
        event["args"]["name"]: event["tid"]
        for event in written["traceEvents"]
        if event["ph"] == "M"
    }
    assert set(rows) == {"host", "device 0", "device 3"}
    spans = [event for event in written["traceEvents"] if event["ph"] == "X"]
    # Microseconds since the first event; the call once on each of its devices.
    assert [(s["name"], s["tid"], s["ts"], s["dur"]) for s in spans] == [
        ("call", rows["device 0"], 0.0, 5e5),
        ("call", rows["device 3"], 0.0, 5e5),
        ("decode", rows["host"], 5e5, 2.5e5),
    ]
    assert spans[0]["args"] == {"step": 2}


def test_an_empty_timeline_writes_a_trace(tmp_path):
    Timeline().write_trace(tmp_path / "timeline.json")
    assert "traceEvents" in json.loads((tmp_path / "timeline.json").read_text())


def test_stopwatch_measures_since_the_start_and_since_the_last_lap():
    clock = Clock()
    watch = Stopwatch(clock)
    clock.seconds += 2
    assert watch.lap() == 2
    clock.seconds += 3
    assert (watch.lap(), watch.seconds) == (3, 5)


def test_rate_leaves_out_the_step_that_compiles():
    clock = Clock()
    rate = Rate(clock)
    assert (rate.per_second, rate.seconds_left(5)) == (0.0, 0.0)
    clock.seconds += 60  # Compilation.
    rate.update(tokens=100)
    assert rate.seconds_left(9) == 9 * 60
    clock.seconds += 2
    rate.update(tokens=100)
    # 2 s a step, 8 steps to go, 100 tokens in 2 s.
    assert rate.per_second == pytest.approx(0.5)
    assert rate.seconds_left(8) == pytest.approx(16)
    assert rate.tokens_per_second == pytest.approx(50)
    clock.seconds += 4
    rate.update(tokens=100)
    # A tenth of the way from 2 to 4 seconds.
    assert rate.seconds_per_step == pytest.approx(2.2)
    assert rate.seconds_left(-1) == 0.0


def test_rate_divides_by_the_steps_of_an_update():
    clock = Clock()
    rate = Rate(clock)
    clock.seconds += 10
    rate.update(steps=10, tokens=40)
    assert rate.seconds_per_step == pytest.approx(1.0)
    assert rate.tokens_per_second == pytest.approx(4.0)


def test_peak_host_bytes_is_at_least_what_the_process_holds():
    # jax and numpy alone need more than 50 MB.
    assert 50e6 < peak_host_bytes() < 1e12
