"""How the planner's work grows with devices and with calls.

Each size is measured in a process of its own, so that the most memory it took is its
own: beside what a process takes that has imported jax and nothing else.
"""

import functools
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

DEVICES = (8, 32, 128, 512, 1024, 4096)
CALLS = (6, 10, 14, 20)
DEVICES_OF_CALLS = 64
SEARCH_SECONDS = {128: 5, 1024: 30, 2**30: 120}
"""Of a search, by the most devices."""

PLANS = 2**20
"""Priced in each measurement."""

_AT_A_TIME = 2**14
_NODE = 8


def measured(
    devices: Sequence[int] | None = None, *, num_plans: int = PLANS
) -> dict[str, Any]:
    """Measure all sizes, and how fast seconds grow.

    Args:
        devices: numbers of them; None is `DEVICES`.
        num_plans: priced in each measurement.
    """
    devices = tuple(devices or DEVICES)
    measure = functools.partial(_measured, plain=_child(_PLAIN), num_plans=num_plans)
    rows = [measure("ppo_7_7", count) for count in devices]
    calls = [measure(f"rewards_{n}", DEVICES_OF_CALLS) for n in CALLS]
    # What is fixed in a few devices' time hides how it grows: the larger half counts.
    large = rows[len(rows) // 2 - 1 :] if len(rows) > 2 else rows
    return {
        "devices": rows,
        "calls": calls,
        "exponents": {
            "space_seconds by devices": exponent(large, "num_devices", "space_seconds"),
            "price_seconds by devices": exponent(rows, "num_devices", "price_seconds"),
            "space_seconds by calls": exponent(calls, "num_calls", "space_seconds"),
            "price_seconds by calls": exponent(calls, "num_calls", "price_seconds"),
        },
    }


def exponent(rows: Sequence[dict[str, Any]], of: str, value: str) -> float:
    """Return the slope of a straight line through logarithms."""
    import numpy as np

    if len(rows) < 2:
        return math.nan
    x = np.log([row[of] for row in rows])
    y = np.log([row[value] for row in rows])
    return float(np.polyfit(x, y, 1)[0])


# Of a process that has imported jax and nothing of this package.
_PLAIN = """
import jax
jax.devices()
(line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(1024 * int(line.split()[1]))
"""


def _measured(
    name: str, num_devices: int, *, plain: int, num_plans: int
) -> dict[str, Any]:
    most = next(n for n in SEARCH_SECONDS if num_devices <= n)
    seconds = SEARCH_SECONDS[most]
    code = (
        "from realjax.bench.planner_growth import one;"
        f" one({name!r}, {num_devices}, {seconds}, {num_plans})"
    )
    found = _child(code)
    found["memory_gib"] = (found.pop("most_memory") - plain) / 2**30
    shown = ("num_devices", "num_calls", "space_seconds", "price_seconds", "memory_gib")
    print(*(f"{name} {found[name]:.4g}" for name in shown), file=sys.stderr)
    return found


def _child(code: str) -> Any:
    """Run some Python in a process of its own; what it prints last is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def one(name: str, num_devices: int, search_seconds: float, num_plans: int) -> None:
    """Measure one size; prints JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from realjax.bench.environment import memory_bytes
    from realjax.bench.planner_problems import problem
    from realjax.planner.search import search
    from realjax.planner.simulate import price

    cluster = f"{max(1, num_devices // _NODE)}x{min(num_devices, _NODE)}xh100"
    begin = time.perf_counter()
    space = problem(name, cluster)
    jax.block_until_ready(space.problem)
    built = time.perf_counter() - begin
    generator = np.random.default_rng(0)
    columns = [generator.integers(0, len(o), _AT_A_TIME) for o in space.options]
    plans = jnp.asarray(np.stack(columns, axis=1), jnp.int32)
    look = functools.partial(price, space.problem, plans)
    jax.block_until_ready(look())  # Compiles.
    begin = time.perf_counter()
    for _ in range(num_plans // _AT_A_TIME):
        jax.block_until_ready(look())
    priced = time.perf_counter() - begin
    begin = time.perf_counter()
    found = search(space, seconds=search_seconds)
    searched = time.perf_counter() - begin
    print(
        json.dumps(
            {
                "num_devices": num_devices,
                "num_calls": len(space.names),
                "options": [len(options) for options in space.options],
                "space_seconds": built,
                "price_seconds": priced * 2**20 / num_plans,
                "search_seconds": search_seconds,
                "with_compilation_seconds": searched,
                "seconds_of_a_step": found.seconds,
                "seconds_until_within_1_percent": _until_near(found),
                "most_memory": memory_bytes("VmHWM"),
            }
        )
    )


def _until_near(found: Any) -> float:
    """Return when a search was within 1 % of where it ended."""
    near = [when for when, best in found.history if best <= 1.01 * found.seconds]
    return near[0] if near else 0.0


def draw(growth: dict[str, Any], path: pathlib.Path) -> None:
    """Draw seconds over devices and over calls."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, rows, of in (
        (left, growth["devices"], "num_devices"),
        (right, growth["calls"], "num_calls"),
    ):
        x = [row[of] for row in rows]
        for value, label in (
            ("space_seconds", "list the options"),
            ("price_seconds", "price a million plans"),
        ):
            axes.plot(x, [row[value] for row in rows], marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(x, [str(n) for n in x])
        axes.minorticks_off()
        axes.set_xlabel(of.removeprefix("num_"))
        axes.set_ylabel("seconds")
        axes.grid(alpha=0.3)
    left.legend()
    left.set_title("PPO's six calls")
    right.set_title(f"{DEVICES_OF_CALLS} devices")
    figure.savefig(path)
