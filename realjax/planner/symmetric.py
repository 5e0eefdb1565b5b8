"""Plans that have one strategy on all devices for every call."""

import jax.numpy as jnp
import numpy as np

from realjax.planner.simulate import price
from realjax.planner.space import Space


def symmetric_plans(space: Space) -> list[tuple[tuple[int, ...], float]]:
    """Return the plans of one allocation for all calls that fit, the fastest first.

    Args:
        space: of all plans.

    Returns:
        The number of each call's option, and the seconds of a step.
    """
    everything = max(o.allocation.size for options in space.options for o in options)
    tables = [
        {
            option.allocation.strategy: number
            for number, option in enumerate(options)
            if option.allocation.size == everything
        }
        for options in space.options
    ]
    shared = set.intersection(*map(set, tables))
    plans = [tuple(table[strategy] for table in tables) for strategy in sorted(shared)]
    if not plans:
        return []
    found = price(space.problem, jnp.asarray(plans))
    fits = np.asarray(found.memory_bytes) <= float(space.problem.memory_bytes)
    seconds = np.asarray(found.seconds)
    order = sorted(np.flatnonzero(fits), key=lambda index: seconds[index])
    return [(plans[index], float(seconds[index])) for index in order]
