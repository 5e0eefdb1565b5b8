r"""Whether the seconds that the planner predicts come true, on the devices at hand.

    python -m realjax.cli.profile --cpu_devices=8 --output=cpu.json
    python -m realjax.bench.predictions --cpu_devices=8 --profile=cpu.json \
      --picture=predictions.svg

Random plans of PPO's six calls with a model of 5.5 million parameters run for some
steps, each with the project's executor. Their medians are compared with what the
planner says of them: its coefficients are those of the profile, which has seen none of
these steps. Then, in a few settings, the plan that the search finds runs beside the
best plan with one strategy for all calls (by the planner's own account), step by step
in turn. Without `--profile` the stored one is taken, or one is measured first.

Prints a line a plan; the last line is one JSON object.
"""

import argparse
import contextlib
import gc
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from realjax.bench.environment import describe
from realjax.bench.plan_steps import WARM_UP_STEPS, Setting, running, space_of
from realjax.cli import flags as cli_flags
from realjax.planner.cluster import Cluster
from realjax.planner.coefficients import Profile, find_profile, read_profile
from realjax.planner.cost import Coefficients
from realjax.planner.profiler import profile
from realjax.planner.search import search
from realjax.planner.simulate import price
from realjax.planner.space import Space
from realjax.planner.symmetric import symmetric_plans

NUM_PLANS, NUM_STEPS = 30, 5
COMPARED_STEPS = 7
SEARCH_SECONDS = 5.0

SETTINGS = (
    Setting(),
    Setting(num_prompts=32, new_tokens=16),
    Setting(num_prompts=8, prompt_tokens=16, new_tokens=64),
    Setting(width=128, num_layers=4, num_prompts=32, minibatches=4),
    Setting(width=384, num_layers=3, prompt_tokens=64, minibatches=1),
)
"""Lengths, batches and models in which a searched plan is compared."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the module says."""
    options = _parse(arguments)
    cli_flags.use_compilation_cache()
    cli_flags.use_cpu_devices(options.cpu_devices)
    cluster = Cluster.detect()
    found = _profile(options, cluster)
    report: dict[str, Any] = {
        "environment": describe(),
        "cluster": cluster.as_dict(),
        "profile": found.as_dict(),
    }
    bar = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.MofNCompleteColumn(),
        console=rich.console.Console(stderr=True),
        transient=True,
    )
    with bar:
        plans = predicted_and_measured(options, cluster, found.coefficients, bar)
        compared = searched_and_symmetric(options, cluster, found.coefficients, bar)
    report |= {"plans": plans, "settings": compared}
    if plans:
        report |= {"of_plans": agreement(plans)}
    if compared:
        report |= {"of_settings": outcome(compared)}
    if options.picture and plans:
        picture(plans, options.picture)
    print(json.dumps(report))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--profile", type=pathlib.Path, help="A file of realjax.cli.profile.")
    add("--minutes", type=float, default=8.0, help="Of a profile, if there is none.")
    add("--plans", type=int, default=NUM_PLANS, help="Random ones.")
    add("--steps", type=int, default=NUM_STEPS, help="Of each, beside two to compile.")
    add("--settings", type=int, default=len(SETTINGS), help="Of those with a search.")
    add("--compared_steps", type=int, default=COMPARED_STEPS, help="Of both plans.")
    add("--seconds", type=float, default=SEARCH_SECONDS, help="Of a search.")
    add("--seed", type=int, default=0)
    add("--cpu_devices", type=int, default=0, help="Virtual devices.")
    add("--output", type=pathlib.Path, help="Of the plans, written after each one.")
    add("--picture", type=pathlib.Path, help="Of predicted and measured seconds.")
    for name in ("width", "num_layers", "num_prompts", "new_tokens"):
        add(f"--{name}", type=int, default=getattr(Setting(), name))
    return parser.parse_args(arguments)


def _profile(options: argparse.Namespace, cluster: Cluster) -> Profile:
    """Read what was measured before, or measure it."""
    if options.profile is not None:
        return read_profile(options.profile)
    found = find_profile(cluster)
    if found is None:
        found = profile(cluster, minutes=options.minutes, seed=options.seed)
    return found


def predicted_and_measured(
    options: argparse.Namespace,
    cluster: Cluster,
    coefficients: Coefficients,
    bar: rich.progress.Progress,
) -> list[dict[str, Any]]:
    """Run random plans, and say what was predicted of each."""
    setting = Setting(
        width=options.width,
        num_layers=options.num_layers,
        num_prompts=options.num_prompts,
        new_tokens=options.new_tokens,
    )
    if not options.plans:
        return []
    space = space_of(setting, cluster, coefficients)
    drawn = random_plans(space, options.plans, options.seed)
    priced = price(space.problem, jnp.asarray(drawn))
    found = []
    for index, plan in enumerate(bar.track(drawn, description="random plans")):
        execution = space.execution_plan(plan)
        with running(setting, execution) as steps:
            for _ in range(WARM_UP_STEPS):
                steps.run()
            seconds = [steps.run() for _ in range(options.steps)]
            by_call = steps.call_seconds()
        row = {
            "plan": execution.as_dict()["calls"],
            "predicted_seconds": float(priced.seconds[index]),
            "measured_seconds": statistics.median(seconds),
            "measured_range": [min(seconds), max(seconds)],
            "calls": {
                name: {
                    "predicted_seconds": option.seconds,
                    "measured_seconds": by_call.get(name),
                }
                for name, option in space.picked(plan).items()
            },
        }
        found.append(row)
        if options.output:
            options.output.write_text(json.dumps(found))
        bar.console.print(_line(index, row, space.chosen(plan)), highlight=False)
        _forget()
    return found


def random_plans(space: Space, count: int, seed: int) -> list[tuple[int, ...]]:
    """Draw plans that fit: for every call a number of devices, a range, an option.

    Args:
        space: of all plans.
        count: of plans, all different.
        seed: of what is drawn.
    """
    generator = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        plan = tuple(_random_option(options, generator) for options in space.options)
        priced = price(space.problem, jnp.asarray([plan]))
        if float(priced.memory_bytes[0]) <= space.cluster.device.memory_bytes:
            found[plan] = None
    return list(found)


def _random_option(options, generator: np.random.Generator) -> int:
    sizes = sorted({size for _, size in options.places if options.shapes[size]})
    size = sizes[generator.integers(len(sizes))]
    places = [place for place in options.places if place[1] == size]
    numbers = options.numbers(places[generator.integers(len(places))])
    return int(numbers[generator.integers(len(numbers))])


def searched_and_symmetric(
    options: argparse.Namespace,
    cluster: Cluster,
    coefficients: Coefficients,
    bar: rich.progress.Progress,
) -> list[dict[str, Any]]:
    """Run the searched plan beside the symmetric one, step by step in turn."""
    found = []
    settings = SETTINGS[: options.settings]
    for setting in bar.track(settings, description="settings"):
        space = space_of(setting, cluster, coefficients)
        same = symmetric_plans(space)
        if not same:
            raise ValueError(
                f"No one strategy serves all calls of the setting {setting} on"
                f" {cluster.name}. Give it as many prompts as there are devices."
            )
        best = search(
            space,
            seconds=options.seconds,
            seed=options.seed,
            starts=[plan for plan, _ in same],
        )
        plans = {"searched": best.plan, "symmetric": same[0][0]}
        predicted = {"searched": best.seconds, "symmetric": same[0][1]}
        seconds: dict[str, list[float]] = {name: [] for name in plans}
        with contextlib.ExitStack() as opened:
            runs = {
                name: opened.enter_context(running(setting, space.execution_plan(plan)))
                for name, plan in plans.items()
            }
            for _ in range(WARM_UP_STEPS):
                for steps in runs.values():
                    steps.run()
            for _ in range(options.compared_steps):
                for name, steps in runs.items():
                    seconds[name].append(steps.run())
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        row = {
            "setting": str(setting),
            "predicted_seconds": predicted,
            "measured_seconds": medians,
            "measured_ranges": {n: [min(s), max(s)] for n, s in seconds.items()},
            "ratio": medians["searched"] / medians["symmetric"],
            "plans": {
                name: {call: str(a) for call, a in space.chosen(plan).items()}
                for name, plan in plans.items()
            },
        }
        found.append(row)
        bar.console.print(f"{setting}: searched / symmetric = {row['ratio']:.3f}")
        _forget()
    return found


def agreement(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Say how near predictions are to what was measured.

    Args:
        rows: with predicted and measured seconds.
    """
    predicted = np.array([row["predicted_seconds"] for row in rows])
    measured = np.array([row["measured_seconds"] for row in rows])
    errors = predicted / measured - 1
    ranks = [scipy.stats.rankdata(seconds) for seconds in (predicted, measured)]
    together = np.corrcoef(*ranks)[0, 1] if len(rows) > 1 else 1.0
    return {
        "mean_error": float(np.mean(np.abs(errors))),
        "worst_error": float(errors[np.argmax(np.abs(errors))]),
        "bias": float(np.mean(errors)),
        "rank_correlation": float(together),
    }


def outcome(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say how the searched plans did.

    Args:
        rows: of settings, each with the ratio of searched to symmetric seconds.
    """
    ratios = [row["ratio"] for row in rows]
    return {"worst_ratio": max(ratios), "num_faster": sum(r < 1 for r in ratios)}


def picture(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw predicted over measured seconds, with the line where both are equal.

    Args:
        rows: with predicted and measured seconds.
        path: of the file; its ending says the format.
    """
    predicted = [row["predicted_seconds"] for row in rows]
    measured = [row["measured_seconds"] for row in rows]
    figure = Figure(figsize=(4.2, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = min(predicted + measured) * 0.9, max(predicted + measured) * 1.1
    line = np.array([low, high])
    axes.fill_between(
        line, 0.85 * line, 1.15 * line, color="#eceef1", label="within 15 %"
    )
    axes.plot(line, line, color="#8a8f98", linewidth=1)
    axes.scatter(measured, predicted, s=14, color="#2f6db5", label="random plans")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel("measured seconds of a step")
    axes.set_ylabel("predicted seconds of a step")
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _line(index: int, row: dict[str, Any], chosen: dict[str, Any]) -> str:
    error = row["predicted_seconds"] / row["measured_seconds"] - 1
    return (
        f"{index + 1:3}  predicted {row['predicted_seconds']:6.3f} s, measured"
        f" {row['measured_seconds']:6.3f} s, {100 * error:+4.0f} %   "
        + "  ".join(str(allocation) for allocation in chosen.values())
    )


def _forget() -> None:
    """Drop programs and arrays of a plan: there are many."""
    jax.clear_caches()
    gc.collect()


if __name__ == "__main__":
    sys.exit(main())
