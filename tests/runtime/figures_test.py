import numpy as np
import pytest

from realjax.core.timing import Event
from realjax.runtime import figures

STEPS = np.arange(1, 41)
RISING = np.linspace(0.0, 1.0, 40)


def at_steps(**values):
    """A column with values at a few steps and NaN elsewhere; s10=0.5 is step 10."""
    column = np.full(len(STEPS), np.nan)
    for name, value in values.items():
        column[int(name[1:]) - 1] = value
    return column


def panels(**columns):
    named = {name.replace("__", "/"): values for name, values in columns.items()}
    return figures.make_panels({"step": STEPS, **named})


def test_a_metric_goes_to_the_figure_of_its_prefix():
    found = panels(
        loss=RISING, objective__kl=RISING, objective__scores=RISING, a__b__c=RISING
    )
    names = {group: [panel.name for panel in each] for group, each in found.items()}
    assert names == {"training": ["loss"], "objective": ["kl", "scores"], "a": ["b/c"]}


def test_held_out_points_join_the_panel_of_the_same_metric():
    held_out = at_steps(s1=0.0, s40=1.0)
    found = panels(objective__kl=RISING, eval__objective__kl=held_out)
    (panel,) = found["objective"]
    assert panel.line is RISING and panel.evaluation is held_out
    # Without such a metric they have a figure of their own.
    assert list(panels(loss=RISING, eval__accuracy=held_out)) == [
        "training",
        "evaluation",
    ]


@pytest.mark.parametrize("pattern", ["{}_length", "length_{}", "length/{}"])
def test_mean_min_and_max_share_a_panel(pattern):
    columns = {
        f"completions/{pattern.format(word)}": RISING + i
        for i, word in enumerate(("min", "mean", "max"))
    }
    found = figures.make_panels({"step": STEPS, **columns})
    (panel,) = found["completions"]
    assert panel.name == pattern.format("mean")
    for values, offset in ((panel.low, 0), (panel.line, 1), (panel.high, 2)):
        np.testing.assert_array_equal(values, RISING + offset)


def test_words_that_contain_min_are_no_minimum():
    (panel,) = panels(minibatches=RISING)["training"]
    assert panel.name == "minibatches" and panel.line is RISING


def test_constants_and_columns_without_numbers_are_not_drawn():
    assert panels(a=np.ones(40), b=np.full(40, np.nan), epoch=RISING) == {}
    assert "training" in panels(only_once=at_steps(s3=1.0))


def test_the_machines_figures_come_last():
    names = ("perf/x", "eval/x", "timing_s/x", "loss", "realloc/x")
    metrics = {"step": STEPS} | dict.fromkeys(names, RISING)
    assert list(figures.curves(metrics)) == [
        "training",
        "evaluation",
        "perf",
        "realloc",
    ]


def test_smoothing_keeps_a_line_and_leaves_nan_out():
    values = np.arange(20.0)
    np.testing.assert_allclose(figures.smooth(values, 5)[2:-2], values[2:-2])
    with_hole = np.where(np.arange(20) == 10, np.nan, 3.0)
    np.testing.assert_allclose(figures.smooth(with_hole, 5), 3.0)


def make_events(step, start):
    return [
        Event(name="a", start=start, end=start + 1, devices=(0, 1, 2), step=step),
        Event(name="b", start=start + 1, end=start + 2, devices=(2,), step=step),
        Event(
            name="move",
            start=start + 2,
            end=start + 2.5,
            devices=(0, 1, 5),
            kind="realloc",
            step=step,
        ),
        Event(name="text", start=start, end=start + 3, kind="host", step=step),
    ]


def words(figure):
    return [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_devices_that_did_the_same_share_a_row():
    events = make_events(1, 0.0)
    figure = figures.timeline(events, figures.call_colors({}, events))
    assert figure is not None
    assert words(figure) == ["devices 0-1", "device 2", "device 5", "host"]


def test_a_timeline_shows_the_last_steps():
    events = [event for step in range(10) for event in make_events(step, 3.0 * step)]
    figure = figures.timeline(events, figures.call_colors({}, events))
    assert figure is not None
    assert figure.axes[0].get_title(loc="left").endswith("steps 7 to 9")
    # Three steps of 3 seconds each, from 0 on.
    np.testing.assert_allclose(figure.axes[0].get_xlim(), (0, 9), atol=0.1)


def test_a_call_has_one_colour_in_all_figures():
    colors = figures.call_colors({"timing_s/b": RISING}, make_events(1, 0.0))
    assert list(colors) == ["b", "a", "move", "text"]
    assert len(set(colors.values())) == 4


def test_timing_leaves_out_the_steps_that_compile():
    seconds = np.array([60.0, 30.0, 2.0, 4.0, 3.0])
    metrics = {"timing_s/rollout": seconds, "timing_s/never": np.full(5, np.nan)}
    figure = figures.timing(metrics, figures.call_colors(metrics, []))
    assert figure is not None and words(figure) == ["rollout"]
    # The median of 2, 4, 3.
    assert figure.axes[0].patches[0].get_width() == 3.0
    assert figure.axes[0].texts[0].get_text() == "3 s"


def test_nothing_to_draw_is_no_figure():
    assert figures.curves({"step": STEPS}) == {}
    assert figures.timing({"step": STEPS}, {}) is None
    assert figures.timeline([], {}) is None
