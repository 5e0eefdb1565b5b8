"""Compile the calls of a run for GPUs that are not there.

    python -m realjax.cli.compile --config=configs/compile_llama_8b.py --for=h200x8
    python -m realjax.cli.compile --config=configs/ppo.py --for=a100x8 --calls=rollout

The plan is the config's, searched for where it gives none. Prints what every program
needs on one device and how its parts talk to each other; last comes one line of JSON
with all of it. Neither GPU, weights nor data are needed, but XLA's compiler for CUDA
is: `make check-gpu-compile` puts it in .venv/aot, and PYTHONPATH=.venv/aot lets Python
find it.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich
import rich.table
from absl import flags

from pallas_kernels.testing import aot
from realjax.cli import flags as cli_flags
from realjax.core.config import to_dataclass
from realjax.runtime.confirming import cluster_of
from realjax.runtime.described import DescribedProgram, described_programs
from realjax.runtime.planning import described_plan
from realjax.runtime.run_config import RunConfig

_GIB = 2**30
_WIDTH = 110


def declare(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Adds the flags."""
    rest, _ = cli_flags.declare_config(values, arguments)
    flags.DEFINE_string(
        "for",
        "h200x8",
        f"GPU ({', '.join(aot.GPUS)}) and how many ({', '.join(map(str, aot.SIZES))}).",
        flag_values=values,
    )
    flags.DEFINE_list(
        "calls", [], "Calls to compile; by default all.", flag_values=values
    )
    return rest


def main(values: flags.FlagValues) -> int:
    """Compiles; prints a table, then JSON."""
    if values.config is None:
        raise ValueError("--config is missing, as in --config=configs/ppo.py.")
    # The GPU is only described: tracing happens beside it, on the CPU.
    jax.config.update("jax_platforms", "cpu")
    try:
        machine = aot.describe(values["for"].value)
    except (ValueError, ModuleNotFoundError) as error:
        raise ValueError(f"--for={values['for'].value}: {error}") from None
    # A program from the cache would not say what it needs.
    jax.config.update("jax_enable_compilation_cache", False)
    config = run_config(values.config.to_dict())
    console, found = rich.console.Console(stderr=True), []
    plan = described_plan(config, cluster_of(machine))
    console.print(plan.table())
    for part in described_programs(config, machine, plan, tuple(values.calls)):
        with console.status(f"{part.call} {part.allocation}: {part.name}"):
            found.append((part, part.compile()))
    print_table(machine, found)
    print(json.dumps(as_dict(machine, found)))
    return 0


def run_config(values: dict[str, Any]) -> RunConfig:
    """Read a config as a run's; of several in `stages`, the last.

    What a config has made first (`corpus`, `new_tokenizer`) is not needed here.
    """
    for name in ("cpu_devices", "corpus", "new_tokenizer"):
        values.pop(name, None)
    paths = values.pop("paths", {})
    stages = values.pop("stages", ())
    if stages:
        values = values[stages[-1]]
    for role in values.get("roles", {}).values():
        for name, path in paths.items():
            role["path"] = role["path"].replace("{" + name + "}", path)
    return to_dataclass(RunConfig, values)


def print_table(
    machine: aot.Machine, found: Sequence[tuple[DescribedProgram, aot.Report]]
) -> None:
    """Print one line a program, and the collectives of each below."""
    table = rich.table.Table(title=f"GiB of one device, compiled for {machine.name}")
    for column in ("call", "allocation", "program"):
        table.add_column(column, no_wrap=True)
    for column in ("inputs", "new", "temporary", "peak", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for part, report in found:
        sizes = (
            report.argument_bytes,
            report.output_bytes - report.alias_bytes,
            report.temporary_bytes,
            report.peak_bytes,
        )
        names = (part.call, str(part.allocation), part.name)
        numbers = (f"{size / _GIB:.2f}" for size in sizes)
        table.add_row(*names, *numbers, f"{report.seconds:.0f}")
    # Also where the output is a file: the numbers are not to be cut off.
    console = rich.console.Console(width=max(rich.get_console().width, _WIDTH))
    console.print(table)
    for part, report in found:
        in_loops, outside = report.count(is_looped=True), report.count(is_looped=False)
        console.print(f"{part.call} {part.name}: {_list(in_loops)} in loops,", end=" ")
        console.print(f"{_list(outside)} outside")


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "nothing"


def as_dict(
    machine: aot.Machine, found: Sequence[tuple[DescribedProgram, aot.Report]]
) -> dict[str, Any]:
    """Give everything as plain values."""
    return {
        "for": machine.name,
        "programs": [
            {
                "call": part.call,
                "role": part.role,
                "allocation": str(part.allocation),
                "program": part.name,
                **report.as_dict(),
            }
            for part, report in found
        ],
    }


def command(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    return cli_flags.run(declare, main, arguments, about=__doc__ or "")


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
