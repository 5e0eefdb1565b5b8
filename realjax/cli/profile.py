r"""Measures the devices of this machine, for the planner.

    python -m realjax.cli.profile
    python -m realjax.cli.profile --cpu_devices=8 --minutes=10 --output=cpu.json

Draws calls of small models (sampling, inference, training, on any strategy) and copies,
measures them for some minutes, and fits the eight coefficients of the planner's costs.
Calls drawn after the fit say how far its predictions are off. What was found goes to
the user's cache folder, by kind of device and version, where the planner finds it, or
to the file given. The last line is the same as JSON.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.progress
from absl import flags

from realjax.cli import flags as cli_flags
from realjax.planner.cluster import Cluster
from realjax.planner.coefficients import store_profile
from realjax.planner.profiler import describe, profile


def declare(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Adds the flags."""
    add: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_float("minutes", 8.0, "About as long.", lower_bound=0.0, **add)
    flags.DEFINE_string("output", "", "A file; '' is the user's cache folder.", **add)
    flags.DEFINE_integer("seed", 0, "Of the calls that are drawn.", **add)
    flags.DEFINE_integer(
        "cpu_devices", 0, "Virtual devices, on a machine without others.", **add
    )
    return arguments


def main(values: flags.FlagValues) -> int:
    """Measures, stores and prints."""
    cli_flags.use_compilation_cache()
    cli_flags.use_cpu_devices(values.cpu_devices)
    cluster = Cluster.detect()
    bar = rich.progress.Progress(
        rich.progress.TextColumn("[bold blue]{task.description}", markup=True),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=1.0, rate="")

        def progress(share: float, count: int, name: str) -> None:
            minutes = share * values.minutes
            rate = f"{count / minutes:.1f} calls/min" if minutes else ""
            bar.update(task, completed=share, description=name, rate=rate)

        found = profile(
            cluster, minutes=values.minutes, seed=values.seed, progress=progress
        )
    path = store_profile(found, pathlib.Path(values.output) if values.output else None)
    print(f"{cluster.name}, jax {found.jax}, realjax {found.realjax}")
    print("\n".join(describe(found)))
    print(f"stored in {path}")
    print(json.dumps(found.as_dict()))
    return 0


def command(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    return cli_flags.run(declare, main, arguments, about=__doc__ or "")


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
