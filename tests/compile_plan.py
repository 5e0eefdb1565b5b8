"""Find the plan of a config for described devices and compile all of its calls.

    python tests/compile_plan.py llama7b_ppo h100x8

Prints one line of JSON; see `realjax/runtime/confirming.py`.
"""

import json
import sys

import jax

from pallas_kernels.testing import aot
from realjax.cli.compile import run_config
from realjax.runtime.confirming import cluster_of, confirmed
from realjax.runtime.planning import described_plan
from realjax.runtime.recipe import load_config


def main(name: str, devices: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    # A program from the cache would not say what it needs.
    jax.config.update("jax_enable_compilation_cache", False)
    machine = aot.describe(devices)
    config = run_config(load_config(f"configs/{name}.py").to_dict())
    plan = described_plan(config, cluster_of(machine))
    calls = [found.as_dict() for found in confirmed(config, plan, machine)]
    print(json.dumps({"plan": plan.as_dict(), "calls": calls}))


if __name__ == "__main__":
    main(*sys.argv[1:])
