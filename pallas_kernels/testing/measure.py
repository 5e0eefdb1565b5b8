"""Whether kernels are right on a device, and how fast beside others and the floor.

    found = measure(case)
    found["implementations"]["mosaic"]["share_of_floor"]

Inputs are fresh. An implementation that is wrong is not timed. Those that are right
take turns on several sets of inputs, which together are larger than the cache; the time
is the device's own, kernels alone, from CUPTI.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.testing.cases import Case

# Inputs beyond the 60 MB of the level-two cache of an H200.
CACHE_BYTES = 60e6
MOST_SETS = 4
ROUNDS = 7


def measure(
    case: Case, *, seed: int, is_timed: bool = True, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Compare all implementations of a case with its reference, and time them.

    Args:
        case: what to run.
        seed: of the inputs.
        is_timed: also time them; needs a GPU.
        names: of the implementations; None is all.

    Returns:
        The floor in seconds, and for each implementation its error (or why it cannot
        run) and, where it is right and timed, the median of its seconds, their spread,
        and the floor's share of the median.
    """
    keys = jax.random.split(jax.random.key(seed), MOST_SETS)
    make = jax.jit(case.inputs)
    sets = [make(keys[0])]
    set_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(sets[0]))
    num_sets = int(min(MOST_SETS, 1 + CACHE_BYTES // max(1, set_bytes)))
    sets += [make(key) for key in keys[1:num_sets]]
    expected = jax.tree.map(np.asarray, case.reference(*sets[0]))
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[..., Any]] = {}
    for name in names or case.implementations:
        run = jax.jit(case.implementations[name], donate_argnums=tuple(case.donated))
        try:
            found = run(*undonated(case, sets[0]))
            error = largest_error(found, expected)
        except Exception as failure:  # One that cannot run must not stop the others.
            results[name] = {"failure": f"{type(failure).__name__}: {failure}"[:500]}
            continue
        results[name] = {"error": error, "is_right": error <= case.tolerance}
        if results[name]["is_right"]:
            runs[name] = run
    if is_timed:
        for name, seconds in _seconds(case, runs, sets).items():
            median = statistics.median(seconds)
            results[name] |= {
                "seconds": median,
                "spread": [min(seconds), max(seconds)],
                "share_of_floor": case.floor_seconds / median,
            }
    return {
        "operation": case.operation,
        "case": case.name,
        "floor_seconds": case.floor_seconds,
        "goal": case.goal,
        "tolerance": case.tolerance,
        "implementations": results,
    }


def largest_error(found: Any, expected: Any) -> float:
    """Return the largest relative error of any array, in the L2 norm.

    Whole numbers must be equal, and so must infinities.
    """
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max((_error(np.asarray(x), np.asarray(y)) for x, y in pairs), default=0.0)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if not jnp.issubdtype(expected.dtype, jnp.floating):
        return 0.0 if np.array_equal(found, expected) else float("inf")
    x, y = found.astype(np.float64), expected.astype(np.float64)
    is_finite = np.isfinite(y)
    if not np.array_equal(x[~is_finite], y[~is_finite]):
        return float("inf")
    norm = np.linalg.norm(y[is_finite]) or 1.0
    error = np.linalg.norm(x[is_finite] - y[is_finite]) / norm
    return float(error) if np.isfinite(error) else float("inf")


def undonated(case: Case, inputs: Sequence[Any]) -> list[Any]:
    """Return inputs of which those that will be given away are copies."""
    return [
        jax.tree.map(jnp.copy, x) if number in case.donated else x
        for number, x in enumerate(inputs)
    ]


def _seconds(
    case: Case, runs: dict[str, Callable[..., Any]], sets: Sequence[Any]
) -> dict[str, list[float]]:
    """Time the implementations in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS * len(sets)):
        inputs = sets[number % len(sets)]
        for name, run in runs.items():
            took = device_seconds(run, *undonated(case, inputs))
            if number >= len(sets):  # The first round warms up.
                seconds[name].append(took)
    return seconds


def device_seconds(run: Callable[..., Any], *inputs: Any) -> float:
    """Run once; return the seconds of its kernels on the GPU.

    Where CUPTI does not work, those of the host until the result is there.
    """
    # Imported here: it needs JAX's libraries for CUDA.
    from jax.experimental.mosaic.gpu import profiler

    jax.block_until_ready(inputs)
    try:
        _, milliseconds = profiler.measure(run)(*inputs)
    except RuntimeError:
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        return time.perf_counter() - start
    return (milliseconds or 0.0) / 1e3
