r"""How well and how fast the planner searches.

    python -m realjax.bench.planner --enumerate   # 20 seeds against every plan there is
    python -m realjax.bench.planner --reference --seeds=20 --seconds=600
    python -m realjax.bench.planner --known       # searches of 5 s against the above
    python -m realjax.bench.planner --growth --figure=docs/planner_growth.svg

The first searches for PPO's six calls with four models of 7B (Llama 2) on eight H100s,
256 prompts of 128 tokens and completions of 384, with 20 seeds of 2 s. With the options
of ReaL (halves of the node or all of it; data, tensor and stage) the best plan is known
by looking at all of them. With all options there are more, and how far from the best a
search has ended is bounded by the best placement of the calls.

The second searches long on 64 and 128 devices, for the five problems of
`planner_problems`, and keeps the best in planner_references.json; the third tells how
near short searches come. The fourth lists options and prices plans on 8 to 4096
devices and of 6 to 20 calls, each in a process of its own, and draws how that grows.

Seconds of a search are those after compilation, on the processor that is named. The
last line is one JSON object.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import rich.progress

from realjax.bench import planner_growth
from realjax.bench.environment import describe
from realjax.bench.planner_problems import NAMES, problem
from realjax.planner.exhaustive import best_of_all
from realjax.planner.search import Found, lower_bound, search, tight_lower_bound
from realjax.planner.space import Space
from realjax.planner.strategies import REAL
from realjax.planner.symmetric import symmetric_plans

SEEDS, SECONDS = 20, 2.0
KNOWN_SECONDS = 5.0
NUM_PROMPTS = 256
CLUSTERS = ("8x8xh100", "16x8xh100")
REFERENCES = pathlib.Path(__file__).parent / "planner_references.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the module says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--enumerate", action="store_true")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--known", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--problems", nargs="*", default=NAMES)
    parser.add_argument("--node", default="8xh100", help="Of the first searches.")
    parser.add_argument("--clusters", nargs="*", default=CLUSTERS)
    parser.add_argument("--devices", type=int, nargs="*")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, help="Of a search.")
    parser.add_argument("--figure", help="Where --growth draws.")
    parser.add_argument("--references", default=str(REFERENCES))
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"environment": describe()}
    path = pathlib.Path(options.references)
    if options.reference:
        report["references"] = long_searches(options, path)
    elif options.known:
        report["known"] = short_searches(options, path)
    elif options.growth:
        report["growth"] = planner_growth.measured(options.devices)
        if options.figure:
            planner_growth.draw(report["growth"], pathlib.Path(options.figure))
    else:
        report |= on_one_node(options)
    print(json.dumps(report))
    return 0


def on_one_node(options: argparse.Namespace) -> dict[str, Any]:
    """Search with many seeds where the best plan is known, or a bound is near."""
    report: dict[str, Any] = {}
    for name, rules in (("real", REAL), ("all", None)):
        space, built = timed(
            lambda rules=rules: problem(
                NAMES[0], options.node, num_prompts=NUM_PROMPTS, rules=rules
            )
        )
        found = searched(space, options.seeds, options.seconds or SECONDS)
        found |= {"space_seconds": built, "num_plans": space.num_plans}
        found |= {"options": [len(one) for one in space.options]}
        if name == "real" and options.enumerate:
            found["enumeration"] = enumerated(space)
        elif name == "all":
            bound, seconds = timed(lambda space=space: tight_lower_bound(space))
            found |= {"lower_bound": bound, "bound_seconds": seconds}
            found["gaps"] = [one / bound - 1 for one in found["seconds_of_a_step"]]
        report[name] = found
    return report


def searched(space: Space, seeds: int, seconds: float) -> dict[str, Any]:
    """Search with every seed."""
    search(space, most_moves=1)  # Compiles.
    found = [search(space, seconds=seconds, seed=seed) for seed in range(seeds)]
    best = min(found, key=lambda one: one.seconds)
    return {
        "seconds_of_a_step": [one.seconds for one in found],
        "seconds_until_the_best": [_until_the_best(one) for one in found],
        "plans_priced": [one.num_priced for one in found],
        "plan": space.execution_plan(best.plan).as_dict()["calls"],
    }


def _until_the_best(found: Found) -> float:
    return found.history[-1][0] if found.history else 0.0


def enumerated(space: Space) -> dict[str, Any]:
    """Look at every plan."""
    with rich.progress.Progress() as bar:
        task = bar.add_task("plans", total=space.num_plans)
        (plan, seconds), took = timed(
            lambda: best_of_all(
                space, progress=lambda done: bar.update(task, completed=done)
            )
        )
    return {
        "best_seconds": seconds,
        "plan": {name: str(a) for name, a in space.chosen(plan).items()},
        "seconds": took,
        "plans_per_second": space.num_plans / took,
    }


def long_searches(
    options: argparse.Namespace, path: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Search long with every seed; what was kept before stays where it is as good."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    pairs = [(p, c) for p in options.problems for c in options.clusters]
    seconds = options.seconds or 600.0
    with rich.progress.Progress() as bar:
        task = bar.add_task("searches", total=len(pairs) * options.seeds)
        for name, cluster in pairs:
            space = problem(name, cluster)
            starts = [plan for plan, _ in symmetric_plans(space)]
            results = []
            for seed in range(options.seeds):
                results.append(search(space, seconds=seconds, seed=seed, starts=starts))
                bar.advance(task)
            seed = min(range(len(results)), key=lambda index: results[index].seconds)
            best = results[seed]
            entry = {
                "seconds_of_a_step": best.seconds,
                "seed": seed,
                "seeds": options.seeds,
                "seconds": seconds,
                "all_seconds": [one.seconds for one in results],
                "lower_bound": lower_bound(space),
                "symmetric": symmetric_plans(space)[0][1] if starts else None,
                "plan": space.execution_plan(best.plan).as_dict()["calls"],
                "environment": describe(),
            }
            key = f"{name} {cluster}"
            before = kept.get(key, {}).get("seconds_of_a_step", float("inf"))
            if best.seconds < before:
                kept[key] = entry
                path.write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def short_searches(
    options: argparse.Namespace, path: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Search for some seconds, as `cli.plan` does, and compare with long searches."""
    kept, report = json.loads(path.read_text()), {}
    for name in options.problems:
        for cluster in options.clusters:
            space, built = timed(lambda n=name, c=cluster: problem(n, c))
            starts = [plan for plan, _ in symmetric_plans(space)]
            seconds = options.seconds or KNOWN_SECONDS
            search(space, most_moves=1)  # Compiles.
            found = search(space, seconds=seconds, starts=starts)
            best = kept[f"{name} {cluster}"]["seconds_of_a_step"]
            report[f"{name} {cluster}"] = {
                "seconds_of_a_step": found.seconds,
                "above_the_best": found.seconds / best - 1,
                "above_the_bound": found.seconds / lower_bound(space) - 1,
                "space_seconds": built,
                "search_seconds": seconds,
            }
    return report


def timed(function: Any) -> tuple[Any, float]:
    """Return what a function returns, and its seconds."""
    begin = time.perf_counter()
    found = function()
    return found, time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
