"""Plans that have one strategy on all devices for every call."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from realjax.planner.simulate import FEWEST, price
from realjax.planner.space import Space

_ROUNDS = 8
"""In each, every plan changes the one call that gives the most."""


def symmetric_plans(space: Space) -> list[tuple[tuple[int, ...], float]]:
    """Return the plans of one allocation for all calls that fit, the fastest first.

    Rows of microbatches, what is computed anew and what is offloaded are chosen by
    descent, call by call.

    Args:
        space: of all plans.

    Returns:
        The number of each call's option, and the seconds of a step.
    """
    everything = (0, max(size for o in space.options for _, size in o.places))
    tables: list[Mapping[str, list[int]]] = []
    for options in space.options:
        table: dict[str, list[int]] = {}
        for number in options.numbers(everything):
            table.setdefault(options[number].allocation.strategy, []).append(number)
        tables.append(table)
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    if not shared:
        return []
    choices = [[table[strategy] for table in tables] for strategy in shared]
    plans = np.array([[numbers[0] for numbers in one] for one in choices])
    limit = float(space.problem.memory_bytes)
    for _ in range(_ROUNDS):
        whose, changed = [], []
        for index, one in enumerate(choices):
            for call, numbers in enumerate(one):
                for number in numbers:
                    plan = plans[index].copy()
                    plan[call] = number
                    whose.append(index)
                    changed.append(plan)
        seconds, memory = _priced(space, np.stack(changed))
        # What fits comes before what does not; then less, of seconds or of bytes.
        fits = memory <= limit
        order = np.lexsort((np.where(fits, seconds, memory), ~fits, whose))
        first = np.unique(np.asarray(whose)[order], return_index=True)[1]
        better = np.stack(changed)[order[first]]
        if (better == plans).all():
            break
        plans = better
    seconds, memory = _priced(space, plans)
    fitting = sorted(np.flatnonzero(memory <= limit), key=lambda index: seconds[index])
    return [(tuple(plans[i].tolist()), float(seconds[i])) for i in fitting]


def _priced(space: Space, plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [
        price(space.problem, jnp.asarray(plans[start : start + FEWEST], jnp.int32))
        for start in range(0, len(plans), FEWEST)
    ]
    joined = lambda name: np.concatenate([getattr(part, name) for part in parts])
    return joined("seconds"), joined("memory_bytes")
