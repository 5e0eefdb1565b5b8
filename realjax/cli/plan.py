r"""Find the allocation of every call of a run, before there is a machine to run it on.

    python -m realjax.cli.plan --config=configs/compile_llama_8b.py --cluster=8xh200
    python -m realjax.cli.plan --config=configs/compile_llama_8b.py --cluster=4x8xh100 \
      --new_tokens=300

The cluster is a preset (h100, h200, a100, cpu; how many, and of how many nodes), a JSON
file, or by default the devices of this machine. Prints the plan with what the planner
expects of it, beside the best plan that has one allocation for all calls; last comes
one line of JSON, whose `allocations` go to `config.allocations`. A call that begins
before 0 runs beside the end of the step before. Seconds are those of a model of the
machine with default coefficients, not measured on it.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich
import rich.table
from absl import flags

from realjax.cli import flags as cli_flags
from realjax.cli.compile import run_config
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Coefficients
from realjax.planner.search import Found, search, tight_lower_bound
from realjax.planner.simulate import price
from realjax.planner.space import Space
from realjax.planner.symmetric import symmetric_plans
from realjax.runtime.planning import described_space

_GIB = 2**30


def declare(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Adds the flags."""
    rest, _ = cli_flags.declare_config(values, arguments)
    add: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string(
        "cluster", "", "As 8xh100, 4x8xh200, or a JSON file; '' is this machine.", **add
    )
    flags.DEFINE_float("seconds", 5.0, "Of the search, after compilation.", **add)
    flags.DEFINE_integer("seed", 0, "Of the search.", **add)
    flags.DEFINE_float(
        "prompt_tokens", 0.0, "Mean of a prompt; 0 is the longest.", **add
    )
    flags.DEFINE_float(
        "new_tokens", 0.0, "Mean of a completion; 0 is the longest.", **add
    )
    return rest


def main(values: flags.FlagValues) -> int:
    """Searches; prints a table, then JSON."""
    if values.config is None:
        raise ValueError("--config is missing, as in --config=configs/ppo.py.")
    if values.cluster:
        # Planned for, and not used.
        jax.config.update("jax_platforms", "cpu")
    cluster = Cluster.load(values.cluster) if values.cluster else Cluster.detect()
    space = described_space(
        run_config(values.config.to_dict()),
        cluster,
        Coefficients(),
        prompt_tokens=values.prompt_tokens,
        new_tokens=values.new_tokens,
    )
    same = symmetric_plans(space)
    console = rich.console.Console(stderr=True)
    with console.status(f"{space.num_plans:.2e} plans on {cluster.name}"):
        found = search(
            space,
            seconds=values.seconds,
            seed=values.seed,
            starts=[plan for plan, _ in same],
        )
        found = dataclasses.replace(found, lower_bound=tight_lower_bound(space))
    report = as_dict(space, found, cluster, same)
    print_table(space, found, report)
    print(json.dumps(report))
    return 0


def print_table(space: Space, found: Found, report: dict[str, Any]) -> None:
    """Print a line a call, and what the whole is expected to take."""
    table = rich.table.Table(title=f"A step on {report['cluster']}, in seconds")
    table.add_column("call", no_wrap=True)
    table.add_column("allocation", no_wrap=True)
    for column in ("begin", "end", "copy"):
        table.add_column(column, justify="right")
    for name, call in report["calls"].items():
        numbers = (f"{call[key]:.3f}" for key in ("begin", "end", "copy_seconds"))
        table.add_row(name, call["allocation"], *numbers)
    console = rich.console.Console()
    console.print(table)
    console.print(
        f"{found.seconds:.3f} s a step, {found.memory_bytes / _GIB:.1f} GiB on the"
        f" fullest device; no plan takes less than {found.lower_bound:.3f} s"
    )
    if report["symmetric"]:
        best = report["symmetric"]
        console.print(f"the same for all calls, {best['strategy']}:", end=" ")
        console.print(f"{best['seconds']:.3f} s")
    else:
        console.print("no one allocation for all calls fits")


def as_dict(
    space: Space, found: Found, cluster: Cluster, same: Sequence[tuple]
) -> dict[str, Any]:
    """Give everything as plain values."""
    priced = price(space.problem, jnp.asarray([found.plan]))
    chosen = space.chosen(found.plan)
    calls = {
        name: {
            "allocation": str(allocation),
            "begin": float(priced.begin[0, index]),
            "end": float(priced.end[0, index]),
            "copy_seconds": float(priced.copy_seconds[0, index]),
        }
        for index, (name, allocation) in enumerate(chosen.items())
    }
    symmetric = None
    if same:
        plan, seconds = same[0]
        strategy = next(iter(space.chosen(plan).values())).strategy
        symmetric = {"strategy": strategy, "seconds": seconds}
    return {
        "cluster": cluster.name,
        "seconds": found.seconds,
        "lower_bound_seconds": found.lower_bound,
        "memory_bytes": found.memory_bytes,
        "num_plans": space.num_plans,
        "num_priced": found.num_priced,
        "allocations": {name: str(allocation) for name, allocation in chosen.items()},
        "calls": calls,
        "symmetric": symmetric,
    }


def command(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    return cli_flags.run(declare, main, arguments, about=__doc__ or "")


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
