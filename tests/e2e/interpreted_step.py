"""A PPO step twice: as a CPU computes it, and with every kernel there is, interpreted.

    JAX_PLATFORMS=cpu python -m tests.e2e.interpreted_step

Prints one line of JSON. A process of its own: the interpreter runs programs from within
a program, for which JAX must not run any on threads that may all be waiting.
"""

import collections
import json
from typing import Any

import jax
import numpy as np

from pallas_kernels import _dispatch
from pallas_kernels.testing.interpret import interpreted
from realjax.testing import tiny_model
from tests.e2e.tiny_ppo import PLAN, hyperparameters, make_executor, run_step

# Heads as wide as kernels take them, and one layer; everything else is small. Norms of
# queries and keys make scores differ, and those after the attention all that follows.
MODEL = tiny_model(
    width=128,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=64,
    has_post_norms=True,
    has_query_key_norm=True,
)
SIZE = 4
SAMPLING = {"temperature": 0.7, "top_p": 0.9}


def one_step():
    executor = make_executor(
        hyperparameters(SAMPLING, minibatches=1),
        dict.fromkeys(PLAN, "d1"),
        num_devices=1,
        model=MODEL,
        dtype="bfloat16",
    )
    try:
        return run_step(executor, 1, size=SIZE)
    finally:
        executor.close()


def forced(found: dict[str, collections.Counter]):
    """A `choose` that takes the kernel where it can serve, and notes what it takes."""
    choose = _dispatch.choose

    def choose_kernel(operation, implementations, request, *, name=None):
        for one in implementations:
            if one.name == "mosaic" and one.unsupported(request) is None:
                name = name or "mosaic"
        choice = choose(operation, implementations, request, name=name)
        found[operation][choice.name] += 1
        return choice

    return choose_kernel


def compared(found: Any, expected: Any) -> dict[str, float]:
    """The largest difference of every number of two steps."""
    arrays = {name: (found.made[name], x) for name, x in expected.made.items()}
    arrays |= {name: (found.updates[name], x) for name, x in expected.updates.items()}
    return {
        name: float(np.abs(np.float64(x) - np.float64(y)).max())
        for name, (x, y) in arrays.items()
    }


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 16)  # As many threads.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    expected = one_step()
    chosen: dict[str, collections.Counter] = collections.defaultdict(
        collections.Counter
    )
    _dispatch.choose = forced(chosen)
    with interpreted(detect_races=False) as checks:
        found = one_step()
    numbers = {name: float(x[0]) for name, x in expected.updates.items()}
    report = {
        "chosen": chosen,
        "num_kernels": checks.num_kernels,
        "differences": compared(found, expected),
        "numbers": numbers,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
