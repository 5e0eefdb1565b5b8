"""Plans that fit by the account of their schedule, and not by the simulator alone."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from realjax.dataflow.account import Account
from realjax.planner.space import Space

TRIES = 6
"""Of finding a plan, each with less memory."""

SLACK = 0.98
"""Of the memory that the last try should have kept to."""


def until_it_fits[T](
    space: Space, find: Callable[[Space], T], count: Callable[[T], Account | None]
) -> T | None:
    """Find a plan, with less and less memory until one fits.

    The simulator counts for many plans at once, near to what their schedules take; the
    account follows one schedule, and is exact.

    Args:
        space: the plans.
        find: finds one; a ValueError says that there is none.
        count: gives its account; None where the devices' memory is not known.

    Returns:
        What was found; None where nothing that was found fits.
    """
    limit = float(space.problem.memory_bytes)
    for _ in range(TRIES):
        problem = space.problem._replace(memory_bytes=jnp.float32(limit))
        try:
            found = find(dataclasses.replace(space, problem=problem))
        except ValueError:
            return None
        account = count(found)
        if account is None or account.fits:
            return found
        limit *= SLACK * account.limit_bytes / float(account.peak_bytes.max())
    return None
