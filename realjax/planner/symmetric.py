"""Plans that have one strategy on all devices for every call."""

from collections.abc import Mapping

import numpy as np

from realjax.planner.space import Space
from realjax.planner.variants import best_variants


def symmetric_plans(space: Space) -> list[tuple[tuple[int, ...], float]]:
    """Return the plans of one allocation for all calls that fit, the fastest first.

    What allocations leave open is chosen by `best_variants`.

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
    found = best_variants(space, choices)
    fitting = sorted(np.flatnonzero(found.fits), key=lambda index: found.seconds[index])
    return [(found.plans[index], float(found.seconds[index])) for index in fitting]
