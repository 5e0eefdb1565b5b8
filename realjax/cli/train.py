"""Runs a config: one algorithm, or several stages in a row.

    python -m realjax.cli.train --config=configs/ppo.py --workdir=runs/ppo
    python -m realjax.cli.train --config=configs/ppo.py:debug --config.steps=3

The same command goes on with a run that was stopped. On several hosts it is the same,
too, with three variables of the environment that say who is who:

    JAX_COORDINATOR_ADDRESS=host0:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0   on host0
    JAX_COORDINATOR_ADDRESS=host0:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1   on host1

The folder of the run and the data must be the same for all, as on a shared disk.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from realjax.cli import flags as cli_flags
from realjax.runtime import cluster
from realjax.runtime.recipe import train


def declare(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Adds the flags."""
    rest, name = cli_flags.declare_config(values, arguments)
    flags.DEFINE_string(
        "workdir",
        f"runs/{name}" if name else "",
        "Folder of the run; by default runs/<name of the config>.",
        flag_values=values,
    )
    return rest


def main(values: flags.FlagValues) -> int:
    """Trains; 130 when stopped by a signal before the end."""
    config = values.config
    if config is None:
        raise ValueError("--config is missing, as in --config=configs/quickstart.py.")
    cli_flags.use_compilation_cache()
    cli_flags.use_cpu_devices(config.get("cpu_devices", 0))
    cluster.start()
    result = train(config, pathlib.Path(values.workdir))
    return 0 if result.is_finished else 130


def command(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    return cli_flags.run(declare, main, arguments, about=__doc__ or "")


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
