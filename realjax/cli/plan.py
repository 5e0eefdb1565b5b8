r"""Find the allocation of every call of a run, before there is a machine to run it on.

    python -m realjax.cli.plan --config=configs/compile_llama_8b.py --cluster=8xh200
    python -m realjax.cli.plan --config=configs/compile_llama_8b.py --cluster=4x8xh100 \
      --new_tokens=300 --svg=plan.svg --trace=plan.trace.json --json=plan.json
    python -m realjax.cli.plan --config=… --cluster=8xh200 --explain=rollout
    python -m realjax.cli.plan --config=… --cluster=8xh200 --explain=rollout=t8@0-7

The cluster is a preset (h100, h200, a100, cpu; how many, and of how many nodes), a JSON
file, or by default the devices of this machine. Prints the plan with what the planner
expects of it, beside the best plan that has one allocation for all calls and ReaL's
template; last comes one line of JSON. A call that begins before 0 runs beside the end
of the step before.

    --json          the plan, which a run takes with --config.plan=plan.json
    --svg, --trace  its timeline: a picture, and a file for ui.perfetto.dev
    --explain       why a call has no other allocation: the best plans that differ in
                    this call, or the best plan that has it elsewhere, or what forbids
                    that
    --compile_for   devices that need not be there (h100x8): every call is compiled for
                    them, and its memory set beside what is expected
    --measured      a run's folder: its medians beside what is expected here

Seconds are those of a model of the machine, with --coefficients (a JSON file) or those
that `realjax.cli.profile` has stored of such devices, else with a guess.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table
from absl import flags

from pallas_kernels.testing import aot
from realjax.cli import flags as cli_flags
from realjax.cli import plan_explained
from realjax.cli.compile import run_config
from realjax.core.metrics import read_metrics
from realjax.dataflow.account import Account
from realjax.dataflow.plan import ExecutionPlan
from realjax.parallel.allocation import Allocation
from realjax.planner.cluster import Cluster
from realjax.planner.coefficients import coefficients_of
from realjax.planner.cost import Coefficients
from realjax.planner.fitting import until_it_fits
from realjax.planner.heuristic import template_plan
from realjax.planner.memory import fit_pools, memory_account
from realjax.planner.search import Found, search, tight_lower_bound
from realjax.planner.simulate import price
from realjax.planner.space import Space, make_space
from realjax.planner.symmetric import symmetric_plans
from realjax.planner.timeline import plan_timeline, timeline_svg, write_trace
from realjax.runtime.confirming import confirmed
from realjax.runtime.given_plans import (
    fixed_allocations,
    microbatch_tokens,
    wishes_of,
)
from realjax.runtime.plan_choice import Setting, padded_roles
from realjax.runtime.planning import described_setting, of_steps
from realjax.runtime.run_config import RunConfig

_GIB = 2**30
_WARM_UP_STEPS = 2


def declare(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Adds the flags."""
    rest, _ = cli_flags.declare_config(values, arguments)
    add: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string(
        "cluster", "", "As 8xh100, 4x8xh200, or a JSON file; '' is this machine.", **add
    )
    flags.DEFINE_string("coefficients", "", "Of the machine: a JSON file.", **add)
    flags.DEFINE_string("plan", "", "To start from: a JSON file as of --json.", **add)
    flags.DEFINE_float("seconds", 5.0, "Of the search, after compilation.", **add)
    flags.DEFINE_integer("seed", 0, "Of the search.", **add)
    flags.DEFINE_float(
        "prompt_tokens", 0.0, "Mean of a prompt; 0 is the longest.", **add
    )
    flags.DEFINE_float(
        "new_tokens", 0.0, "Mean of a completion; 0 is what the config expects.", **add
    )
    flags.DEFINE_string("svg", "", "File for a picture of the timeline.", **add)
    flags.DEFINE_string("trace", "", "File for ui.perfetto.dev.", **add)
    flags.DEFINE_string("json", "", "File for the plan.", **add)
    flags.DEFINE_string("explain", "", "A call, or call=allocation.", **add)
    flags.DEFINE_string("compile_for", "", "Described devices, as h100x8.", **add)
    flags.DEFINE_string("measured", "", "Folder of a run to compare with.", **add)
    return rest


def main(values: flags.FlagValues) -> int:
    """Searches; prints a table, then JSON."""
    if values.config is None:
        raise ValueError("--config is missing, as in --config=configs/ppo.py.")
    if values.cluster:
        # Planned for, and not used.
        jax.config.update("jax_platforms", "cpu")
    cluster = Cluster.load(values.cluster) if values.cluster else Cluster.detect()
    planning = Planning(values, cluster)
    same = symmetric_plans(planning.space)
    thumb = template_plan(planning.space)
    console = rich.console.Console(stderr=True)
    with console.status(f"{planning.space.num_plans:.2e} plans on {cluster.name}"):
        starts = [plan for plan, _ in same] + ([thumb[0]] if thumb else [])
        found, account = planning.searched(planning.given() + starts)
        bound = tight_lower_bound(planning.space)
        found = dataclasses.replace(found, lower_bound=bound)
    report = as_dict(planning.space, found, cluster, same)
    report["template"] = {"seconds": thumb[1]} if thumb else None
    report["coefficients"] = planning.source
    print_table(planning.space, found, report)
    if values.measured:
        report["measured"] = measured = read_measured(values.measured)
        print_measured(report, measured)
    write_files(values, planning.space, found, account)
    if values.compile_for:
        plan = planning.space.execution_plan(found.plan)
        report["compiled"] = compiled(planning.config, plan, values.compile_for)
    if values.explain:
        planning.explain(values.explain, found)
    print(json.dumps(report))
    return 0


class Planning:
    """The plans of a run, and searches among them."""

    def __init__(self, values: flags.FlagValues, cluster: Cluster):
        """Lists the plans.

        Raises:
            ValueError: a role without a known model, or a call that fits nowhere.
        """
        self.values = values
        self.config = of_steps(run_config(values.config.to_dict()))
        self.setting: Setting = described_setting(
            self.config,
            cluster,
            prompt_tokens=values.prompt_tokens,
            new_tokens=values.new_tokens,
        )
        known = coefficients_of(cluster)
        self.coefficients, self.source = known.coefficients, known.source
        if values.coefficients:
            self.coefficients = read_coefficients(values.coefficients)
            self.source = values.coefficients
        graph = self.setting.graph
        self.fixed = fixed_allocations(self.config, graph, cluster)
        self.wishes = wishes_of(self.config, graph, cluster)
        self.space = self.make_space({})

    def make_space(self, fixed: Mapping[str, Allocation]) -> Space:
        """List the plans in which some more calls have a given allocation."""
        setting = self.setting
        return make_space(
            *(setting.graph, setting.roles, setting.work, setting.lengths),
            *(setting.cluster, self.coefficients),
            microbatch_tokens=microbatch_tokens(self.config, setting.cluster),
            fixed={**self.fixed, **fixed},
            wishes=self.wishes,
        )

    def given(self) -> list[tuple[int, ...]]:
        """Return the plan of --plan as numbers, if there is one.

        Raises:
            ValueError: it is no plan of this run on this machine.
        """
        if not self.values.plan:
            return []
        plan = ExecutionPlan.from_dict(
            self.setting.graph,
            json.loads(pathlib.Path(self.values.plan).read_text()),
            num_devices=self.setting.cluster.num_devices,
        )
        space = self.space
        return [
            tuple(
                space.number_of(name, plan.calls[name].allocation)
                for name in space.names
            )
        ]

    def searched(
        self, starts: Sequence[Sequence[int]], space: Space | None = None
    ) -> tuple[Found, Account]:
        """Search until a plan fits by the account of its schedule, which is exact.

        Args:
            starts: plans to begin with.
            space: to search; None is that of all plans.

        Raises:
            ValueError: none fits.
        """
        space = space or self.space
        find = lambda space: search(
            space, seconds=self.values.seconds, seed=self.values.seed, starts=starts
        )
        count = lambda found: self.account(space, found.plan)
        found = until_it_fits(space, find, count)
        if found is None:
            find(space)  # Says so, if the simulator finds none.
            raise ValueError(
                f"Plans were found that fit {space.cluster.name} by the simulator, and"
                " none by the account of its schedule. Search longer, or give more"
                " devices."
            )
        return found, count(found)

    def account(self, space: Space, plan: Sequence[int]) -> Account:
        """Count the memory of a plan's schedule."""
        setting, limit = self.setting, self.setting.limit_bytes
        taken = space.execution_plan(plan)
        roles = padded_roles(setting.roles, setting.graph, taken)
        given = (roles, setting.work)
        if limit:
            taken = fit_pools(setting.graph, taken, *given, limit_bytes=limit)
        return memory_account(setting.graph, taken, *given, limit_bytes=limit)

    def explain(self, asked: str, found: Found) -> None:
        """Say why a call has no other allocation."""
        name, _, text = asked.partition("=")
        if not text:
            plan_explained.print_alternatives(self.space, found.plan, name)
            return
        allocation = Allocation.parse(text)
        why = plan_explained.refused(self.space, self.setting, name, allocation)
        if not why:
            try:
                space = self.make_space({name: allocation})
                others = self.space.chosen(found.plan) | {name: allocation}
                starts = plan_explained.as_numbers(space, others)
                other, _ = self.searched(starts, space)
            except ValueError as error:
                why = str(error)
            else:
                plan_explained.print_difference(
                    self.space, found.plan, space, other.plan, name
                )
        if why:
            rich.print(f"{name} cannot have {allocation}: {why}")


def read_coefficients(path: str) -> Coefficients:
    """Read coefficients from a file.

    Args:
        path: of a JSON object with the fields of `Coefficients`, or with such an object
            as its "coefficients", as a profile has it.

    Raises:
        ValueError: a file with other fields.
    """
    values = json.loads(pathlib.Path(path).read_text())
    values = values.get("coefficients", values)
    names = {field.name for field in dataclasses.fields(Coefficients)}
    if not isinstance(values, dict) or values.keys() - names:
        raise ValueError(
            f"{path} holds no coefficients. It must be a JSON object with some of"
            f" {', '.join(sorted(names))}."
        )
    return Coefficients(**values)


def read_measured(workdir: str) -> dict[str, float]:
    """Read the median seconds of a run's calls, after the steps that compile.

    Args:
        workdir: of the run.

    Raises:
        FileNotFoundError, ValueError: no run was here, or its calls were not timed.
    """
    columns = read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
    found = {}
    for name, column in columns.items():
        known = column[np.isfinite(column)]
        known = known[_WARM_UP_STEPS:] if len(known) > _WARM_UP_STEPS else known
        if name.startswith("timing_s/") and len(known):
            found[name.removeprefix("timing_s/")] = float(np.median(known))
    if not found:
        raise ValueError(f"The metrics of {workdir} hold no seconds of calls.")
    return found


def compiled(
    config: RunConfig, plan: ExecutionPlan, described: str
) -> list[dict[str, Any]]:
    """Compile a plan's calls for devices that are not there; print a line a call.

    Raises:
        ValueError: devices that cannot be described here.
    """
    try:
        machine = aot.describe(described)
    except (ValueError, ModuleNotFoundError) as error:
        raise ValueError(f"--compile_for={described}: {error}") from None
    # A program from the cache would not say what it needs.
    jax.config.update("jax_enable_compilation_cache", False)
    table = rich.table.Table(title=f"GiB of one device, compiled for {described}")
    for column in ("call", "expected", "compiled", "fullest device", "limit"):
        table.add_column(column, justify="left" if column == "call" else "right")
    found = []
    for one in confirmed(config, plan, machine):
        sizes = (one.predicted_bytes, one.compiled_bytes, one.peak_bytes)
        shown = (f"{size / _GIB:.2f}" for size in (*sizes, one.limit_bytes))
        table.add_row(one.call, *shown, style=None if one.fits else "red")
        found.append(one.as_dict())
    rich.print(table)
    return found


def write_files(
    values: flags.FlagValues, space: Space, found: Found, account: Account
) -> None:
    """Write the files that were asked for."""
    if values.json:
        plan = space.execution_plan(found.plan).as_dict()
        _write(values.json, json.dumps(plan, indent=1) + "\n")
    if values.svg or values.trace:
        timeline = plan_timeline(space, found.plan, account)
        if values.svg:
            title = f"A step on {space.cluster.name}, as planned"
            _write(values.svg, timeline_svg(timeline, title) + "\n")
        if values.trace:
            write_trace(timeline, values.trace)


def _write(path: str, text: str) -> None:
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


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
    if report["template"]:
        console.print(f"ReaL's template: {report['template']['seconds']:.3f} s")
    console.print(f"coefficients: {report['coefficients']}")


def print_measured(report: dict[str, Any], measured: Mapping[str, float]) -> None:
    """Print a line a call: expected here, and measured in a run."""
    table = rich.table.Table(title="Expected of this plan and measured, in seconds")
    table.add_column("call", no_wrap=True)
    for column in ("expected", "measured", "measured / expected"):
        table.add_column(column, justify="right")
    for name, call in report["calls"].items():
        seconds = measured.get(name)
        shown = ("", "")
        if seconds is not None:
            shown = (f"{seconds:.4g}", f"{seconds / max(call['seconds'], 1e-9):.2f}")
        table.add_row(name, f"{call['seconds']:.4g}", *shown)
    rich.console.Console().print(table)


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
            "seconds": float(priced.end[0, index] - priced.begin[0, index]),
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
