"""The best plan of all, by looking at every one."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Int
from realjax.planner.cluster import Cluster
from realjax.planner.memory import CallBytes
from realjax.planner.options import CallOptions, Option
from realjax.planner.simulate import Problem, price
from realjax.planner.space import Space, table

MOST_PLANS = 2**31 - 1
"""More are not counted with 32 bits, and would take an hour."""

MOST_RELAXED_PLANS = 2**23
"""Of a bound: looked at in some seconds."""

_CHUNK, _CHUNKS_AT_A_TIME = 2**14, 64


def best_of_all(
    space: Space, *, progress: Callable[[int], None] = lambda done: None
) -> tuple[tuple[int, ...], float]:
    """Return the plan that takes the least time of those that fit, and its seconds.

    Args:
        space: the plans.
        progress: is told how many have been looked at.

    Raises:
        ValueError: there are too many plans, or none fits.
    """
    if space.num_plans > MOST_PLANS:
        raise ValueError(
            f"There are {space.num_plans} plans, more than {MOST_PLANS}, to look at one"
            " by one. Use `search`, or fewer devices or rules of less freedom."
        )
    counts = jnp.asarray([len(options) for options in space.options], jnp.int32)
    best_seconds, best_index = float("inf"), 0
    for start in range(0, space.num_plans, _CHUNK * _CHUNKS_AT_A_TIME):
        left = min(-(-(space.num_plans - start) // _CHUNK), _CHUNKS_AT_A_TIME)
        seconds, index = _best_from(
            space.problem, counts, jnp.int32(start), jnp.int32(left)
        )
        if float(seconds) < best_seconds:
            best_seconds, best_index = float(seconds), int(index)
        progress(min(start + _CHUNK * _CHUNKS_AT_A_TIME, space.num_plans))
    if best_seconds == float("inf"):
        raise ValueError(
            "No plan fits the memory. Give more devices, or offload roles"
            " (config.roles.<role>.offload)."
        )
    plan = _plans(counts, jnp.asarray([best_index], jnp.int32))[0]
    return tuple(int(number) for number in plan), best_seconds


def relaxed(space: Space) -> Space | None:
    """Return a space whose best plan takes no longer than that of another.

    Every call has one option for each range of devices: as fast as the fastest there,
    with no bytes, so that copies and memory cost nothing. Where the ranges of each size
    cover all devices they are alike, and the first call may as well begin at device 0.

    Args:
        space: of all plans.

    Returns:
        The space; None where it still has too many plans to look at.
    """
    reduced, is_even = [], _is_even(space.cluster)
    for index, options in enumerate(space.options):
        places = options.places
        if is_even and index == 0:
            places = tuple(place for place in places if place[0] == 0)
        reduced.append(
            CallOptions(
                places=places,
                shapes={n: _fastest(shapes) for n, shapes in options.shapes.items()},
            )
        )
    if math.prod(map(len, reduced)) > MOST_RELAXED_PLANS:
        return None
    problem = space.problem._replace(
        options=table(reduced), piece_seconds=jnp.float32(0.0)
    )
    return dataclasses.replace(space, options=tuple(reduced), problem=problem)


def _fastest(shapes: Sequence[Option]) -> tuple[Option, ...]:
    """Return the fastest of some options, without bytes."""
    if not shapes:
        return ()
    best = min(shapes, key=lambda option: option.seconds)
    return (
        dataclasses.replace(
            best,
            bytes=CallBytes(),
            static_bytes=0,
            working_bytes=0,
            parked_bytes=0,
            reload_seconds=0.0,
            offload_seconds=0.0,
        ),
    )


def _is_even(cluster: Cluster) -> bool:
    """Tell whether the ranges of every size cover all devices."""
    return all(
        size & (size - 1) == 0 for size in (cluster.devices_per_node, cluster.num_nodes)
    )


@jax.jit
def _best_from(
    problem: Problem,
    counts: Int[Array, "C"],
    start: Int[Array, ""],
    num_chunks: Int[Array, ""],
) -> tuple[Array, Array]:
    """Return the least seconds of some plans from a number on, and whose they are."""

    def look(chunk: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        index = start + chunk * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
        # Past the last plan, the number overflows or the first call has no such option.
        plans = _plans(counts, index)
        is_plan = (index >= 0) & (plans[:, 0] < counts[0])
        found = price(problem, jnp.minimum(plans, counts[None] - 1))
        fits = (found.memory_bytes <= problem.memory_bytes) & is_plan
        seconds = jnp.where(fits, found.seconds, jnp.inf)
        place = jnp.argmin(seconds)
        is_better = seconds[place] < best[0]
        return (
            jnp.where(is_better, seconds[place], best[0]),
            jnp.where(is_better, index[place], best[1]),
        )

    nothing = (jnp.float32(jnp.inf), jnp.int32(0))
    return jax.lax.fori_loop(0, num_chunks, look, nothing)


def _plans(counts: Int[Array, "C"], index: Int[Array, "P"]) -> Int[Array, "P C"]:
    """Return plans by their numbers; the last call's option changes the fastest."""
    columns = []
    rest = index
    for call in reversed(range(len(counts))):
        if call == 0:
            columns.append(rest)
            break
        columns.append(rest % counts[call])
        rest = rest // counts[call]
    return jnp.stack(columns[::-1], axis=1)
