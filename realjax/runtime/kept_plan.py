"""The plan that a run leaves in its folder: `plan.json`, to go on with, or for others.

A run that goes on takes the plan it had, so that it goes on bit for bit, whatever the
planner would find by now. `config.plan` of another run may name the file.
"""

import dataclasses
import json
import pathlib
from typing import Any

from realjax.planner.cluster import Cluster
from realjax.runtime.agreement import Agreement
from realjax.runtime.given_plans import asked
from realjax.runtime.run import Run

_NAME = "plan.json"


def write_plan(workdir: pathlib.Path, run: Run) -> None:
    """Leaves a run's plan in its folder, with what the config asked for."""
    values = dataclasses.replace(run.chosen, plan=run.plan).as_dict()
    values["asked"] = asked(run.config, Cluster.detect().num_devices)
    temporary = workdir / f"{_NAME}.tmp"
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(workdir / _NAME)


def read_plan(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The plan of the run that this folder holds a checkpoint of, if it left one."""

    def read() -> dict[str, Any] | None:
        path = workdir / _NAME
        has_begun = any((workdir / "checkpoints").glob("[0-9]*"))
        if not has_begun or not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is not JSON ({error}). Remove it, and the run is planned anew."
            ) from error
        return values if isinstance(values, dict) else None

    return Agreement("plan of this folder").decide(read)
