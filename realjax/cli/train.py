"""Runs a config: one algorithm, or several stages in a row.

    python -m realjax.cli.train --config=configs/ppo.py --workdir=runs/ppo
    python -m realjax.cli.train --config=configs/ppo.py:debug --config.steps=3

The same command goes on with a run that was stopped.
"""

import pathlib
import sys

from absl import flags

from realjax.cli import flags as cli_flags
from realjax.runtime.recipe import train

CONFIG = cli_flags.define_config()
WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; by default runs/<name of the config>."
)


def main() -> None:
    """Trains; exits with 130 when stopped by a signal before the end."""
    config = CONFIG.value
    if config is None:
        raise ValueError("--config is missing, as in --config=configs/quickstart.py.")
    cli_flags.use_compilation_cache()
    cli_flags.use_cpu_devices(config.get("cpu_devices", 0))
    file = next(a for a in sys.argv if a.lstrip("-").startswith("config="))
    name = pathlib.Path(file.partition("=")[2].partition(":")[0]).stem
    result = train(config, pathlib.Path(WORKDIR.value or f"runs/{name}"))
    if not result.is_finished:
        sys.exit(130)


if __name__ == "__main__":
    cli_flags.run(main)
