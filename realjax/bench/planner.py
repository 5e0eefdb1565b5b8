"""How well and how fast the planner searches.

    python -m realjax.bench.planner                # the searches
    python -m realjax.bench.planner --enumerate    # also every plan of ReaL's options

PPO's six calls with four models of 7B (Llama 2) on eight H100s, 256 prompts of 128
tokens and completions of 384. With the options of ReaL (halves of the node or all of
it; data, tensor and stage) there are 22 a call, and the best plan is known by looking
at all. With all options there are more, and how far from the best a search has ended is
bounded by the best placement of the calls. Seconds are those of the search after
compilation, on the processor that is named. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import rich.progress

from realjax.algorithms import ppo
from realjax.bench.environment import describe
from realjax.functions.role import Role, RoleConfig
from realjax.models.families import llama
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Coefficients
from realjax.planner.exhaustive import best_of_all
from realjax.planner.memory import Work
from realjax.planner.search import search, tight_lower_bound
from realjax.planner.space import Lengths, Space, make_space
from realjax.planner.strategies import REAL, Rules
from realjax.rl import Sampling

PROMPT_TOKENS, NEW_TOKENS, NUM_PROMPTS = 128, 384, 256
SEEDS = 20
SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the module says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--enumerate", action="store_true")
    parser.add_argument("--cluster", default="8xh100")
    parser.add_argument("--model", default="2-7b", help="A size of Llama.")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"environment": describe(), "cluster": options.cluster}
    report["model"] = f"llama-{options.model}"
    for name, rules in (("real", REAL), ("all", None)):
        space, built = timed(
            lambda rules=rules: space_of(options.cluster, options.model, rules)
        )
        found = searched(space, options)
        found |= {"space_seconds": built, "num_plans": space.num_plans}
        found |= {"options": [len(one) for one in space.options]}
        if name == "real" and options.enumerate:
            found["enumeration"] = enumerated(space)
        else:
            bound, seconds = timed(lambda space=space: tight_lower_bound(space))
            best = min(found["seconds_of_a_step"])
            found |= {"lower_bound": bound, "bound_seconds": seconds}
            found |= {"gap": best / bound - 1}
        report[name] = found
    print(json.dumps(report))
    return 0


def space_of(cluster: str, model: str, rules: Rules | None) -> Space:
    """List the plans."""
    hp = ppo.PPO(sampling=Sampling(max_new_tokens=NEW_TOKENS), minibatches=4)
    graph = ppo.graph(hp)
    roles = {}
    for name in graph.roles:
        head = "scalar" if name in ("reward", "critic") else "language"
        roles[name] = Role(
            name=name,
            config=RoleConfig(remat="block"),
            model=dataclasses.replace(llama.size(model), head=head),
            eos_ids=(2,),
            dtype="bfloat16",
            is_trained=name in graph.trained_roles,
        )
    machine = Cluster.load(cluster)
    return make_space(
        graph,
        roles,
        Work(
            num_rows=NUM_PROMPTS,
            width=PROMPT_TOKENS + NEW_TOKENS,
            prompt_width=PROMPT_TOKENS,
        ),
        Lengths(
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
            most_new_tokens=NEW_TOKENS,
        ),
        machine,
        Coefficients(),
        microbatch_tokens=8192 * machine.num_devices,
        rules=rules,
    )


def searched(space: Space, options: argparse.Namespace) -> dict[str, Any]:
    """Search with every seed."""
    search(space, most_moves=1)  # Compiles.
    found = [
        search(space, seconds=options.seconds, seed=seed)
        for seed in range(options.seeds)
    ]
    best = min(found, key=lambda one: one.seconds)
    return {
        "seconds_of_a_step": [one.seconds for one in found],
        "seconds_until_the_best": [
            one.history[-1][0] if one.history else 0.0 for one in found
        ],
        "plans_priced": [one.num_priced for one in found],
        "plan": {name: str(a) for name, a in space.chosen(best.plan).items()},
    }


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


def timed(function: Any) -> tuple[Any, float]:
    """Return what a function returns, and its seconds."""
    begin = time.perf_counter()
    found = function()
    return found, time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
