"""The best options for calls whose allocations are settled.

Rows of microbatches, what is computed anew and what waits in host memory stay open;
they are chosen by descent, call by call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from realjax.planner.simulate import FEWEST, price
from realjax.planner.space import Space

_ROUNDS = 8
"""In each, every plan changes the one call that gives the most."""


class Variants(NamedTuple):
    """Plans, one for each that was asked for.

    Attributes:
        plans: the number of each call's option.
        seconds: of a step.
        memory_bytes: the most on any device.
        fits: whether that is no more than a device has.
    """

    plans: list[tuple[int, ...]]
    seconds: np.ndarray
    memory_bytes: np.ndarray
    fits: np.ndarray


def best_variants(space: Space, choices: Sequence[Sequence[Sequence[int]]]) -> Variants:
    """Choose among some options of every call, for several plans.

    Args:
        space: of all plans.
        choices: for each plan and call, numbers of options.
    """
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
    return Variants(list(map(tuple, plans.tolist())), seconds, memory, memory <= limit)


def _priced(space: Space, plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [
        price(space.problem, jnp.asarray(plans[start : start + FEWEST], jnp.int32))
        for start in range(0, len(plans), FEWEST)
    ]
    joined = lambda name: np.concatenate([getattr(part, name) for part in parts])
    return joined("seconds"), joined("memory_bytes")
