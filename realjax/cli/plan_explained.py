"""What `realjax.cli.plan --explain` prints: why a call has no other allocation."""

from collections.abc import Mapping, Sequence

import rich
import rich.table

from realjax.parallel.allocation import Allocation
from realjax.planner.explain import alternative, alternatives, refusal, signed
from realjax.planner.space import Space
from realjax.runtime.plan_choice import Setting

_GIB = 2**30


def refused(space: Space, setting: Setting, name: str, allocation: Allocation) -> str:
    """Return the rule that forbids an allocation of a call; "" if none does."""
    return refusal(space, setting.roles, setting.work, name, allocation)


def as_numbers(
    space: Space, allocations: Mapping[str, Allocation]
) -> list[tuple[int, ...]]:
    """Return the plan with some allocations, if there is one."""
    try:
        return [tuple(space.number_of(n, allocations[n]) for n in space.names)]
    except ValueError:
        return []


def print_alternatives(space: Space, plan: Sequence[int], name: str) -> None:
    """Print a line for each of the best plans that differ in one call.

    Args:
        space: of all plans.
        plan: the number of each call's option.
        name: of the call.
    """
    chosen = alternative(space, plan, name)
    table = rich.table.Table(
        title=f"The plan with {name} elsewhere, in seconds a step; what differs"
    )
    table.add_column("allocation", no_wrap=True)
    for column in ("step", "call", "others", "copies", "waiting", "GiB"):
        table.add_column(column, justify="right")
    for found in alternatives(space, plan, name):
        # The title has their unit.
        parts = [signed(s)[:-2] for s in found.parts.less(chosen.parts)]
        is_it = found.allocation == chosen.allocation
        note = " (chosen)" if is_it else "" if found.is_fitting else " (does not fit)"
        table.add_row(
            f"{found.allocation}{note}",
            f"{found.seconds:.3f}",
            *parts,
            f"{found.memory_bytes / _GIB:.1f}",
        )
    rich.console.Console().print(table)


def print_difference(
    space: Space, plan: Sequence[int], other: Space, their: Sequence[int], name: str
) -> None:
    """Print how the best plan with another allocation of a call differs.

    Args:
        space: of all plans.
        plan: the number of each call's option.
        other: the plans with that allocation.
        their: the best of those.
        name: of the call.
    """
    chosen, found = alternative(space, plan, name), alternative(other, their, name)
    print(
        f"With {name} on {found.allocation} the best plan that was found takes"
        f" {found.seconds:.3f} s a step, {signed(found.seconds - chosen.seconds)}"
        f" beside {chosen.seconds:.3f} s with {chosen.allocation}:"
        f" {found.parts.less(chosen.parts)}."
        f" It takes {found.memory_bytes / _GIB:.1f} GiB of the fullest device,"
        f" and {chosen.memory_bytes / _GIB:.1f}."
    )
    before = space.chosen(plan)
    for call, allocation in other.chosen(their).items():
        if call != name and allocation != before[call]:
            print(f"{call} would have {allocation}, not {before[call]}")
