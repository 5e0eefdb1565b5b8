"""What a run says in the terminal: a line a step, progress bars, tables.

    step  12/200  epoch 1  loss 0.4132  scores 1.2  2.1 step/s  4k tok/s  0:01:29 left

On a terminal there are colours, and bars that go away when they are done. Elsewhere, in
a file or a notebook, everything is plain lines, and long work says about every ten
seconds how far it is.
"""

import contextlib
import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.progress
import rich.rule
import rich.table
import rich.text

from realjax.core.timing import Rate

_PLAIN_SECONDS = 10.0
_NUM_SHOWN = 6
_NUM_SHOWN_EVALUATION = 10
_COMPLETION_WIDTH = 400

# Words that a person looks for first, in the names of metrics; then order decides.
_WORDS = (
    *("loss", "score", "accuracy", "win_rate", "pass@", "reward", "kl", "ratio"),
    *("grad_norm", "length"),
)
# Where the machinery's own numbers are; they belong to tables and files.
_HIDDEN = (
    "timing_s/",
    "predicted_s/",
    "perf/",
    "realloc/",
    "batch/",
    "nonfinite",
    "skipped",
)


class Console:
    """Prints what a run does.

    Args:
        file: text stream; by default the standard output.
        width: characters of a line; by default the terminal's.
        is_quiet: prints nothing; for all processes of a run but the first.
        clock: returns seconds.
    """

    def __init__(
        self,
        file: Any = None,
        *,
        width: int | None = None,
        is_quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = rich.console.Console(
            file=file, width=width, quiet=is_quiet, force_jupyter=False, highlight=False
        )
        self._clock = clock
        self._has_bar = False

    def print(self, text: str = "", *, style: str = "") -> None:
        """Prints text as it is; on a terminal in a style of rich, "bold red" say."""
        self._console.print(rich.text.Text(text, style=style), soft_wrap=True)

    def rule(self, title: str) -> None:
        """Begins a part: its title on a line across."""
        if self._console.is_terminal:
            self._console.print(rich.rule.Rule(rich.text.Text(title, "bold")))
        else:
            self.print(f"-- {title} --")

    def step(
        self,
        step: int,
        total: int,
        epoch: int,
        metrics: Mapping[str, Any],
        rate: Rate | None = None,
    ) -> None:
        """One line for a training step.

        Args:
            step: steps done.
            total: steps of the run.
            epoch: shown as it is.
            metrics: numbers; those that say most about training are shown.
            rate: adds steps and tokens per second and the time left.
        """
        line = rich.text.Text()
        line.append(f"step {step:>{len(str(total))}}/{total}", "bold")
        line.append(f"  epoch {epoch}", "dim")
        self._append_metrics(line, metrics, _NUM_SHOWN)
        if rate is not None and rate.per_second:
            line.append(f"  {_rate_text(rate.per_second, 'step')}", "dim")
            if rate.tokens_per_second:
                tokens = f"{_short_number(rate.tokens_per_second)} tok/s"
                line.append(f"  {tokens}", "dim")
            left = _duration(rate.seconds_left(total - step))
            line.append(f"  {left} left", "green")
        self._console.print(line, soft_wrap=True)

    def evaluation(self, when: str, metrics: Mapping[str, Any]) -> None:
        """One line for an evaluation."""
        line = rich.text.Text(f"eval {when}", "bold magenta")
        plain = {name.removeprefix("eval/"): value for name, value in metrics.items()}
        self._append_metrics(line, plain, _NUM_SHOWN_EVALUATION)
        self._console.print(line, soft_wrap=True)

    @contextlib.contextmanager
    def progress(
        self, description: str, total: int, *, unit: str = ""
    ) -> Iterator[Callable[..., None]]:
        """Shows how far long work is.

        Args:
            description: of the work.
            total: parts of it.
            unit: of the parts, for the plain lines.

        Yields:
            `advance(parts=1)`, to be called as parts are done.
        """
        with self._any_progress(description, unit) as show:
            done = 0
            show(done, total)

            def advance(parts: int = 1) -> None:
                nonlocal done
                done += parts
                show(done, total)

            yield advance

    @contextlib.contextmanager
    def rollout_progress(
        self, description: str = "generating"
    ) -> Iterator[Callable[[int, int, int], None]]:
        """Shows how far a rollout is, in completions and tokens per second.

        Yields:
            `on_progress(completions_done, completions_in_all, tokens)`.
        """
        begin = self._clock()
        with self._any_progress(description, "completions") as show:

            def on_progress(done: int, total: int, num_tokens: int) -> None:
                seconds = max(self._clock() - begin, 1e-9)
                tokens = _short_number(num_tokens)
                speed = _short_number(num_tokens / seconds)
                show(done, total, f"{tokens} tokens, {speed} tok/s")

            yield on_progress

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """A table; the first column is text, the others are numbers or text."""
        table = rich.table.Table(title=title, title_justify="left", box=None)
        for i, column in enumerate(columns):
            table.add_column(
                rich.text.Text(column),
                justify="left" if i == 0 else "right",
                no_wrap=True,
            )
        for row in rows:
            table.add_row(*(rich.text.Text(_cell(value)) for value in row))
        self._console.print(table)

    def medians(
        self, values: Mapping[str, Sequence[float]], title: str = "medians"
    ) -> None:
        """A table of benchmark numbers: for each name the values of its steps.

        Values that are not finite are left out.
        """
        rows = []
        for name, each in values.items():
            found = [float(value) for value in each if math.isfinite(value)]
            if found:
                median = statistics.median(found)
                rows.append((name, median, min(found), max(found), len(found)))
        self.table(title, ("", "median", "smallest", "largest", "steps"), rows)

    def completions(
        self,
        before: Sequence[Mapping[str, Any]],
        after: Sequence[Mapping[str, Any]],
        *,
        limit: int = 4,
    ) -> None:
        """Completions of the same prompts before and after training.

        Args:
            before: samples with "prompt", "completion" and, if known, "score".
            after: the same, of the same prompts.
            limit: prompts shown.
        """
        for old, new in list(zip(before, after, strict=False))[:limit]:
            self.print(_one_line(old["prompt"]), style="bold")
            for word, sample, style in (("before", old, "dim"), ("after ", new, "")):
                score = sample.get("score")
                shown = "" if score is None else f" {_number(score):>7}"
                text = _one_line(sample["completion"])
                self.print(f"  {word}{shown}  {text}", style=style)

    @contextlib.contextmanager
    def _any_progress(
        self, description: str, unit: str
    ) -> Iterator[Callable[..., None]]:
        """Yields `show(done, total, note="")`: a bar, or lines, or nothing in a bar."""
        if self._console.quiet or self._has_bar:
            yield lambda done, total, note="": None
        elif self._console.is_terminal:
            self._has_bar = True
            try:
                with _bar(self._console) as bar:
                    task = bar.add_task(description, total=None, note="")
                    yield lambda done, total, note="": bar.update(
                        task, completed=done, total=total, note=note
                    )
            finally:
                self._has_bar = False
        else:
            yield _PlainProgress(self.print, description, unit, self._clock)

    def _append_metrics(
        self, line: rich.text.Text, metrics: Mapping[str, Any], limit: int
    ) -> None:
        for name, value in _most_telling(metrics, limit).items():
            line.append(f"  {name} ", "cyan")
            line.append(_number(value), "" if math.isfinite(value) else "bold red")


class _PlainProgress:
    """Lines instead of a bar: none for work that is done within ten seconds."""

    def __init__(self, print_line, description: str, unit: str, clock):
        self._print, self._description, self._unit = print_line, description, unit
        self._clock = clock
        self._begin = self._last = clock()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = self._clock()
        if now - self._last < _PLAIN_SECONDS:
            return
        self._last = now
        unit = f" {self._unit}" if self._unit else ""
        spent = now - self._begin
        left = f", {_duration(spent / done * (total - done))} left" if done else ""
        parts = f"{done} of {total}{unit}" + (f", {note}" if note else "")
        self._print(f"{self._description}: {parts}, {_duration(spent)}{left}")


def _bar(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("[bold blue]{task.description}", markup=True),
        rich.progress.BarColumn(bar_width=32),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[note]}", markup=False),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _most_telling(metrics: Mapping[str, Any], limit: int) -> dict[str, float]:
    """The numbers to show, by the last part of their name where that is unique."""
    shown = {
        name: float(value)
        for name, value in metrics.items()
        if any(word in name for word in _WORDS)
        and not name.startswith(_HIDDEN)
        and not name.endswith("_standard_error")
        and (value or not name.endswith("/failures"))
    }

    def rank(name: str) -> int:
        last = name.rpartition("/")[2]
        # "loss/policy_avg" is about a loss, too, though its last part does not say so.
        return next(i for i, word in enumerate(_WORDS) if word in last or word in name)

    chosen = sorted(shown, key=rank)[:limit]
    last = [name.rpartition("/")[2] for name in chosen]
    return {
        (short if last.count(short) == 1 else name): shown[name]
        for name, short in zip(chosen, last, strict=True)
    }


def _number(value: float) -> str:
    """Four significant digits: 0.4132, 12.34, 1.2e-05, nan."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value)):
        if abs(value) < 1e6:
            return str(int(value))
    return f"{value:.4g}"


def _short_number(value: float) -> str:
    """Three significant digits with a letter: 950, 4.12k, 1.3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else _number(value)


def _rate_text(per_second: float, unit: str) -> str:
    if per_second >= 1:
        return f"{per_second:.3g} {unit}/s"
    return f"{1 / per_second:.3g} s/{unit}"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _one_line(text: str) -> str:
    line = text.replace("\n", "⏎")
    return (
        line if len(line) <= _COMPLETION_WIDTH else line[: _COMPLETION_WIDTH - 1] + "…"
    )
