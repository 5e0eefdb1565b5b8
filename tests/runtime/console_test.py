import io

import pytest

from realjax.core.timing import Rate
from realjax.runtime.console import Console


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_step_is_one_line_however_narrow_the_output(output):
    clock = Clock()
    rate = Rate(clock)
    clock.seconds += 0.5
    rate.update(tokens=2000)
    Console(output, width=20).step(12, 200, 1, {"loss": 0.41321}, rate)
    assert output.getvalue() == (
        "step  12/200  epoch 1  loss 0.4132  2 step/s  4k tok/s  0:01:34 left\n"
    )


def test_slow_steps_are_given_in_seconds_per_step(output):
    clock = Clock()
    rate = Rate(clock)
    clock.seconds += 8
    rate.update()
    Console(output).step(1, 3, 0, {}, rate)
    assert output.getvalue() == "step 1/3  epoch 0  8 s/step  0:00:16 left\n"


def test_a_step_shows_what_says_most_about_training(output):
    metrics = {
        "num_tokens": 100,
        "timing_s/loss": 9.0,
        "perf/kl": 9.0,
        "grad_norm": 2.0,
        "objective/kl": 0.25,
        "objective/scores": 1.5,
        "policy/loss": 0.125,
        "value/loss": 0.5,
    }
    Console(output).step(1, 1, 0, metrics)
    # Losses, then scores, then KL; whole names only where the last parts are equal.
    assert output.getvalue() == (
        "step 1/1  epoch 0  policy/loss 0.125  value/loss 0.5  scores 1.5  kl 0.25  "
        "grad_norm 2\n"
    )


def test_a_number_that_is_not_finite_stands_out(terminal):
    Console(terminal).step(1, 1, 0, {"loss": float("nan")})
    assert "\x1b[1;31mnan" in terminal.getvalue()  # Bold red.


def test_an_evaluation_shows_win_rates_and_passes_and_failures_that_were(output):
    found = {
        "win_rate": 0.75,
        "win_rate_standard_error": 0.1,
        "pass@4": 0.5,
        "rewards/mine/failures": 0.0,
        "rewards/other/failures": 3.0,
    }
    metrics = {f"eval/{name}": value for name, value in found.items()}
    Console(output).evaluation("before", metrics)
    assert output.getvalue() == "eval before  win_rate 0.75  pass@4 0.5  failures 3\n"


def test_an_evaluation_is_one_line(output):
    Console(output).evaluation("before", {"eval/scores": 0.5, "eval/loss": 2.0})
    assert output.getvalue() == "eval before  loss 2  scores 0.5\n"


def test_text_is_printed_as_it_is(output):
    Console(output, width=10).print("[bold]not markup[/bold] :smile: 1.5 " + "x" * 30)
    assert output.getvalue() == "[bold]not markup[/bold] :smile: 1.5 " + "x" * 30 + "\n"


def test_without_a_terminal_progress_is_a_line_about_every_ten_seconds(output):
    clock = Clock()
    console = Console(output, clock=clock)
    with console.progress("evaluation", 40, unit="batches") as advance:
        for _ in range(40):
            clock.seconds += 1
            advance()
    assert output.getvalue().splitlines() == [
        "evaluation: 10 of 40 batches, 0:00:10, 0:00:30 left",
        "evaluation: 20 of 40 batches, 0:00:20, 0:00:20 left",
        "evaluation: 30 of 40 batches, 0:00:30, 0:00:10 left",
        "evaluation: 40 of 40 batches, 0:00:40, 0:00:00 left",
    ]


def test_without_a_terminal_short_work_says_nothing(output):
    clock = Clock()
    console = Console(output, clock=clock)
    with console.progress("evaluation", 3) as advance:
        clock.seconds += 9
        advance(3)
    assert output.getvalue() == ""


def test_a_rollout_says_how_far_it_is_and_how_fast(output):
    clock = Clock()
    with Console(output, clock=clock).rollout_progress() as on_progress:
        clock.seconds += 2
        on_progress(0, 4, 30)  # Too early for a line.
        clock.seconds += 18
        on_progress(1, 4, 1900)
    line = "1 of 4 completions, 1.9k tokens, 95 tok/s, 0:00:20, 0:01:00 left"
    assert output.getvalue() == f"generating: {line}\n"


def test_the_bar_of_a_rollout_says_how_fast_it_is(terminal):
    clock = Clock()
    with Console(terminal, width=120, clock=clock).rollout_progress() as on_progress:
        clock.seconds += 2
        on_progress(3, 8, 9000)
    text = terminal.getvalue()
    assert "generating" in text and "3/8" in text and "9k tokens, 4.5k tok/s" in text


def test_on_a_terminal_a_bar_is_drawn_and_taken_away(terminal):
    console = Console(terminal, width=100)
    with console.progress("evaluation", 2) as advance:
        advance()
        console.print("a line above the bar")
        with console.rollout_progress() as on_progress:  # No second one in a bar.
            on_progress(1, 2, 3)
        advance()
    text = terminal.getvalue()
    assert "evaluation" in text and "2/2" in text and "generating" not in text
    assert "a line above the bar" in text
    assert text.endswith("\x1b[2K")  # The bar's line is erased.
    with console.progress("again", 1) as advance:
        advance()
    assert "again" in terminal.getvalue()


def test_a_bar_ends_when_the_work_raises(terminal):
    console = Console(terminal)
    with pytest.raises(RuntimeError), console.progress("evaluation", 2):
        raise RuntimeError
    with console.progress("again", 1) as advance:
        advance()
    assert "again" in terminal.getvalue()


def test_medians_leave_out_what_is_not_finite(output):
    Console(output, width=100).medians(
        {
            "timing_s/rollout": [1.0, 4.0, 2.0],
            "perf/tokens": [float("nan"), 10.0],
            "eval/none": [float("nan")],
        }
    )
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert lines == [
        ["medians"],
        ["median", "smallest", "largest", "steps"],
        ["timing_s/rollout", "2", "1", "4", "3"],
        ["perf/tokens", "10", "10", "10", "1"],
    ]


def test_completions_stand_one_below_the_other(output):
    before = [{"prompt": "The [soup]", "completion": " was\ncold.", "score": -1.0}]
    after = [{"prompt": "The [soup]", "completion": " was hot.", "score": 0.5}]
    Console(output).completions(before, after)
    assert output.getvalue().splitlines() == [
        "The [soup]",
        "  before      -1   was⏎cold.",
        "  after      0.5   was hot.",
    ]


def test_completions_without_scores_and_beyond_the_limit(output):
    samples = [{"prompt": f"p{i}", "completion": "c"} for i in range(3)]
    Console(output).completions(samples, samples, limit=1)
    assert output.getvalue().splitlines() == ["p0", "  before  c", "  after   c"]


def test_a_quiet_console_prints_nothing(output):
    console = Console(output, is_quiet=True)
    console.print("text")
    console.rule("part")
    console.step(1, 2, 0, {"loss": 1.0})
    console.table("t", ("a",), [("b",)])
    with console.progress("work", 1) as advance, console.rollout_progress() as show:
        advance()
        show(1, 1, 1)
    assert output.getvalue() == ""


def test_a_rule_is_a_plain_line_without_a_terminal(output, terminal):
    Console(output).rule("sft")
    Console(terminal, width=20).rule("sft")
    assert output.getvalue() == "-- sft --\n"
    assert "── " in terminal.getvalue()


def test_two_consoles_share_nothing(output):
    other = io.StringIO()
    first, second = Console(output), Console(other)
    with first.progress("work", 1), second.progress("work", 1):
        first.print("a")
        second.print("b")
    assert (output.getvalue(), other.getvalue()) == ("a\n", "b\n")
