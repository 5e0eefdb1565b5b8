"""The best options for calls whose allocations are settled.

Rows of microbatches, what is computed anew and what waits in host memory stay open;
they are chosen by descent, call by call. Of about equal plans the one that leaves more
roles on their devices is better: what is hidden behind other work still takes links and
host memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from realjax.planner.simulate import price_all
from realjax.planner.space import Space

_ROUNDS = 24
"""In each, every plan changes the one call that gives the most."""

PARKED_SHARE = 1e-4
"""Of a step that a role in host memory must save."""


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


def best_variants(
    space: Space,
    choices: Sequence[Sequence[Sequence[int]]],
    starts: Sequence[Sequence[int]] | None = None,
) -> Variants:
    """Choose among some options of every call, for several plans.

    Args:
        space: of all plans.
        choices: for each plan and call, numbers of options.
        starts: plans to begin with; None begins with the first of each call's numbers.
    """
    if starts is None:
        starts = [[numbers[0] for numbers in one] for one in choices]
    plans, limit = np.array(starts), float(space.problem.memory_bytes)
    for _ in range(_ROUNDS):
        whose, changed = [], []
        for index, one in enumerate(choices):
            for call, numbers in enumerate(one):
                for number in numbers:
                    plan = plans[index].copy()
                    plan[call] = number
                    whose.append(index)
                    changed.append(plan)
        together = np.stack(changed)
        seconds, memory = price_all(space.problem, together)
        is_parked = space.problem.options.of(jnp.asarray(together.T)).parked_bytes > 0
        seconds = seconds * (1 + PARKED_SHARE * np.asarray(is_parked.sum(0)))
        # What fits comes before what does not; then less, of seconds or of bytes.
        fits = memory <= limit
        order = np.lexsort((np.where(fits, seconds, memory), ~fits, whose))
        first = np.unique(np.asarray(whose)[order], return_index=True)[1]
        better = together[order[first]]
        if (better == plans).all():
            break
        plans = better
    seconds, memory = price_all(space.problem, plans)
    return Variants(list(map(tuple, plans.tolist())), seconds, memory, memory <= limit)
