r"""Whether every algorithm learns what it is for.

    python -m realjax.bench.algorithms --picture=learning.svg
    python -m realjax.bench.algorithms --algorithm=grpo --seeds=1

Each line of `learning_lines` is trained from three seeds with the project's executor,
one after the other in one process and with the same compiled programs. All but a few
begin with a policy that imitates good and bad answers alike. Held-out data is measured
on the way; a line is reached when all seeds end at its bar or beyond.

Prints a line for each; the last line of the output is one JSON object. Nothing here is
about speed: the seconds are there to plan with.
"""

import argparse
import contextlib
import functools
import gc
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from realjax.bench.environment import describe
from realjax.bench.learning_lines import (
    BY_NAME,
    LINES,
    MODEL,
    RULE,
    SCORE,
    Line,
    Task,
)
from realjax.cli import flags as cli_flags
from realjax.core.arrays import PyTree
from realjax.core.config import suggest, to_dataclass
from realjax.data.datasets import DataConfig
from realjax.data.loader import Loader
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.models import transformer
from realjax.runtime.console import Console
from realjax.runtime.evaluation import evaluate
from realjax.runtime.executor import Executor
from realjax.runtime.run import Run, load_algorithm, load_parameters, prepare
from realjax.runtime.run_config import EvaluationConfig, RunConfig

NUM_SEEDS = 3
NUM_MEASURED = 8
"""Held-out measurements of a run, beside the one before it."""

NUM_HELD_OUT = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the module says."""
    options = _parse(arguments)
    cli_flags.use_compilation_cache()
    lines = chosen_lines(options.algorithm)
    report: dict[str, Any] = {"environment": describe(), "seeds": options.seeds}
    known = _known(options.known)
    console = rich.console.Console(stderr=True)
    found = []
    with contextlib.ExitStack() as opened:
        folder = options.folder
        if folder is None:
            folder = pathlib.Path(opened.enter_context(tempfile.TemporaryDirectory()))
        columns = (*rich.progress.Progress.get_default_columns(),)
        bar = opened.enter_context(
            rich.progress.Progress(*columns, console=console, transient=True)
        )
        for line in bar.track(lines, description="lines"):
            one = known.get(line.name)
            if one is None:
                one = learn(line, folder, range(options.seeds), steps=options.steps)
                one["commit"] = report["environment"]["commit"]
            found.append(one)
            console.print(
                describe_line(line, found[-1]), highlight=False, soft_wrap=True
            )
            if options.output:
                options.output.write_text(json.dumps(report | {"lines": found}))
    report |= {"lines": found, "all_reached": all(one["is_reached"] for one in found)}
    if options.picture:
        picture(found, options.picture)
    print(json.dumps(report))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--algorithm", default="", help="A line's name, or an algorithm's: all of it.")
    add("--seeds", type=int, default=NUM_SEEDS)
    add("--steps", type=int, default=0, help="Of every line; 0 is as it says.")
    add("--folder", type=pathlib.Path, help="Of the tasks' files; kept.")
    add("--picture", type=pathlib.Path, help="Of all curves.")
    add("--output", type=pathlib.Path, help="Of the report, written after each line.")
    add("--known", type=pathlib.Path, help="A report; its lines are not run again.")
    return parser.parse_args(arguments)


def _known(path: pathlib.Path | None) -> dict[str, dict[str, Any]]:
    """Return the lines of an earlier report by name, each with its commit."""
    if path is None:
        return {}
    report = json.loads(path.read_text())
    commit = {"commit": report["environment"]["commit"]}
    return {line["name"]: commit | line for line in report["lines"]}


def chosen_lines(name: str) -> list[Line]:
    """Return the lines of that name or of that algorithm; all for no name.

    Raises:
        ValueError: there is none.
    """
    found = [one for one in LINES if not name or name in (one.name, one.algorithm)]
    if not found:
        known = {one.algorithm for one in LINES} | set(BY_NAME)
        raise ValueError(f"There is no line {name!r}. {suggest(name, known)}")
    return found


def learn(
    line: Line, folder: pathlib.Path, seeds: Sequence[int], *, steps: int = 0
) -> dict[str, Any]:
    """Train a line from several seeds.

    Args:
        line: what is learned.
        folder: of the tasks' files, made if they are not there.
        seeds: of parameters, data order and sampling.
        steps: other than the line's own; 0 is those.

    Returns:
        Curves of the held-out measure by seed, and whether all end at the bar.
    """
    begin = time.perf_counter()
    curves = {}
    with learner_of(line, folder, steps) as learner:
        for seed in seeds:
            starts = {
                name: imitation(line.task, folder, seed, name)
                for name in line.imitated(learner.checked.graph.roles).values()
            }
            curves[seed] = learner.run(seed, starts)
    _forget()
    ends = [curve[-1][1] for curve in curves.values()]
    return {
        "name": line.name,
        "algorithm": line.algorithm,
        "hp": line.hp,
        "task": line.task.name,
        "measure": line.measure,
        "bar": line.bar,
        "steps": curves[seeds[0]][-1][0],
        "curves": [curves[seed] for seed in seeds],
        "is_reached": all(map(line.is_reached, ends)),
        "seconds": round(time.perf_counter() - begin, 1),
    }


@functools.cache
def imitation(task: Task, folder: pathlib.Path, seed: int, data: str) -> PyTree:
    """Return a policy that imitates the answers of a task's file, on the host."""
    line = Line(
        name="imitation",
        algorithm="sft",
        task=task,
        data=data,
        samples=False,
        batch_size=64,
        steps=task.imitation_steps * (2 if data == "right" else 1),
        learning_rate=3e-3,
        begins_new=("policy",),
        measure="eval/ppl",
    )
    with learner_of(line, folder) as learner:
        learner.run(seed, {})
        return jax.device_get(learner.executor.store.at_home("policy"))


class Learner:
    """Runs of one line, from any seed."""

    def __init__(self, line: Line, run: Run, executor: Executor):
        """Compiles nothing yet."""
        self.line, self.checked, self.executor = line, run, executor
        self._states = dict(executor.calls.states)

    def run(self, seed: int, starts: Mapping[str, PyTree]) -> list[list[float]]:
        """Train from a seed; return steps and what was measured after them.

        Args:
            seed: of new parameters, data order and sampling.
            starts: policies that roles begin with, by the file that they imitate.
        """
        self._begin(seed, starts)
        run, config = self.checked, self.checked.config
        loader = Loader(
            run.train_data,
            batch_size=config.data.batch_size,
            seed=seed,
            shuffle=True,
            num_epochs=0,
        )
        curve = [[0, self._measured()]]
        every = max(run.steps // NUM_MEASURED, 1)
        for step in range(1, run.steps + 1):
            batch, _, _ = loader.next_batch()
            self.executor.run(batch, step=step)
            self.executor.watch.wait()
            if step % every == 0 or step == run.steps:
                curve.append([step, self._measured()])
        return curve

    def _begin(self, seed: int, starts: Mapping[str, PyTree]) -> None:
        executor, store = self.executor, self.executor.store
        executor.programs.seed = seed
        imitated = self.line.imitated(self.checked.roles)
        for index, (name, role) in enumerate(self.checked.roles.items()):
            key = jax.random.fold_in(jax.random.key(seed), index)
            new = transformer.init_parameters(role.model, key)
            if name in imitated:
                policy = starts[imitated[name]]
                # A scalar head is new in any case.
                body = {k: v for k, v in policy.items() if k in new and k != "head"}
                kept = policy if role.model.head == "language" else new | body
                new = jax.tree.map(jax.numpy.asarray, kept)
            store.set_initial(name, new)
        for name in self.checked.graph.trained_roles:
            program = executor.programs.train_program(name)
            store.set_train_state(name, program.init_optimizer(store.at_home(name)))
        executor.calls.restore(self._states, {})

    def _measured(self) -> float:
        found = evaluate(self.checked, self.executor, Console(is_quiet=True), "now")
        return found.numbers[self.line.measure]


@contextlib.contextmanager
def learner_of(line: Line, folder: pathlib.Path, steps: int = 0) -> Iterator[Learner]:
    """Prepare the runs of a line, and end them.

    Args:
        line: what is learned.
        folder: of the tasks' files.
        steps: other than the line's own; 0 is those.
    """
    data = folder / line.task.name
    if not data.exists():
        line.task.write(data)
    run = prepare(config_of(line, data, steps))
    executor = Executor(
        run.graph,
        run.plan,
        run.roles,
        load_parameters(run),
        tokenizer=run.tokenizer,
        optimizer_steps=run.optimizer_steps,
        seed=0,
        width=run.width,
    )
    with contextlib.closing(executor):
        executor.calls.generating.prepare(run.config.data.batch_size)
        yield Learner(line, run, executor)


def config_of(line: Line, data: pathlib.Path, steps: int = 0) -> RunConfig:
    """Return the run of a line.

    Args:
        line: what is learned.
        data: folder of its task's files.
        steps: other than the line's own; 0 is those.
    """
    hp: dict[str, Any] = dict(line.hp)
    if line.samples:
        hp["sampling"] = {"max_new_tokens": line.task.max_new_tokens}
    if line.measure == SCORE:
        hp["rewards"] = line.task.rewards
    module = load_algorithm(line.algorithm)
    role = RoleConfig(
        tokenizer=str(data / "tokenizer"),
        model=MODEL,
        optimizer=OptimizerConfig(
            learning_rate=line.learning_rate, schedule="linear", warmup_fraction=0.0
        ),
    )
    graph = module.graph(to_dataclass(module.HYPERPARAMETERS, hp, path="hp"))
    return RunConfig(
        algorithm=line.algorithm,
        hp=hp,
        roles=dict.fromkeys(graph.roles, role),
        data=DataConfig(
            path=str(data / f"{line.data}_train.jsonl"),
            valid_path=str(data / f"{line.held_out or line.data}_valid.jsonl"),
            valid_limit=NUM_HELD_OUT,
            valid_batch_size=NUM_HELD_OUT,
            kind=line.kind,
            max_length=96,
            max_prompt_length=32,
            max_pairs=1,
            batch_size=line.batch_size,
        ),
        steps=steps or line.steps,
        allocation="d1",
        evaluation=EvaluationConfig(
            num_samples=0, rewards=line.task.rewards if line.measure == RULE else ()
        ),
    )


def describe_line(line: Line, found: dict[str, Any]) -> str:
    """Say what a line came to, as in "grpo  0.61 → 0.95 0.96 0.94 (0.9)  reached"."""
    first = np.mean([curve[0][1] for curve in found["curves"]])
    ends = " ".join(f"{curve[-1][1]:.2f}" for curve in found["curves"])
    word = "reached" if found["is_reached"] else "NOT reached"
    measure = line.measure.removeprefix("eval/")
    return (
        f"{line.name:22} {measure:12} {first:.2f} → {ends}  (bar {line.bar:g}, "
        f"{found['steps']} steps, {found['seconds']:.0f} s)  {word}"
    )


def picture(found: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the curves of all lines, a small chart each.

    Args:
        found: what `learn` returned.
        path: of the file; its ending says the format.
    """
    columns = min(5, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(2.5 * columns, 1.9 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    charts = figure.subplots(rows, columns, squeeze=False).ravel()
    for chart in charts[len(found) :]:
        chart.set_axis_off()
    for chart, one in zip(charts, found, strict=False):
        for curve in one["curves"]:
            chart.plot(*zip(*curve, strict=True), color="#2f6db5", linewidth=1)
        chart.axhline(one["bar"], color="#8a8f98", linewidth=0.8, linestyle="--")
        chart.set_title(one["name"], fontsize=8)
        chart.set_ylabel(one["measure"].removeprefix("eval/"), fontsize=6)
        chart.tick_params(labelsize=6)
    figure.supxlabel("steps", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _forget() -> None:
    """Drop programs and arrays of a line: there are many."""
    jax.clear_caches()
    gc.collect()


if __name__ == "__main__":
    sys.exit(main())
