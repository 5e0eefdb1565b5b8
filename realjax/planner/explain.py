"""Why a call has the allocation that it has, and not another.

    alternatives(space, plan, "rollout")    others, with the rest of the plan as it is
    refusal(space, …, "rollout", "s4@0-3")  the rule that forbids one; "" if none does

A plan's step is what its calls and copies take, less what runs beside each other, and
more what waits. So is the difference of two.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from realjax.functions.function import Generate
from realjax.functions.role import Role
from realjax.parallel.allocation import Allocation
from realjax.parallel.sharding import check_fit
from realjax.planner.copies import AXES
from realjax.planner.memory import Work
from realjax.planner.simulate import FEWEST, price
from realjax.planner.space import Space
from realjax.planner.strategies import Rules, ranges

MOST_ALTERNATIVES = 12
"""That are told; there may be thousands."""


class Parts(NamedTuple):
    """What a step is the sum of, in seconds.

    Attributes:
        call: the call in question.
        others: all other calls.
        copies: of parameters, before all calls.
        waiting: the rest; below 0 where more runs beside each other than waits.
    """

    call: float
    others: float
    copies: float
    waiting: float

    def less(self, other: "Parts") -> "Parts":
        """Return the difference."""
        return Parts(*(a - b for a, b in zip(self, other, strict=True)))

    def __str__(self) -> str:
        """As in "the call itself +0.41 s, other calls −0.02 s, …"."""
        names = ("the call itself", "other calls", "copies", "waiting")
        shown = zip(names, self, strict=True)
        return ", ".join(f"{name} {signed(seconds)}" for name, seconds in shown)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """A plan with another allocation for one call.

    Attributes:
        allocation: of that call.
        plan: the number of each call's option.
        seconds: of a step.
        memory_bytes: the most on any device.
        is_fitting: whether that is no more than a device has.
        parts: of the step.
    """

    allocation: Allocation
    plan: tuple[int, ...]
    seconds: float
    memory_bytes: float
    is_fitting: bool
    parts: Parts


def alternatives(space: Space, plan: Sequence[int], name: str) -> list[Alternative]:
    """Return plans that differ in one call, those that fit first, the fastest first.

    Of options with the same allocation (rows of a microbatch, what is computed anew)
    the best one counts.

    Args:
        space: of all plans.
        plan: the number of each call's option.
        name: of the call.

    Raises:
        ValueError: no such call.
    """
    index = _index(space, name)
    count = len(space.options[index])
    seconds, memory = np.empty(count), np.empty(count)
    for start in range(0, count, FEWEST):
        numbers = np.arange(start, min(start + FEWEST, count))
        plans = np.tile(np.asarray(plan, np.int32), (len(numbers), 1))
        plans[:, index] = numbers
        found = price(space.problem, jnp.asarray(plans))
        seconds[numbers], memory[numbers] = found.seconds, found.memory_bytes
    is_over = memory > float(space.problem.memory_bytes)
    order = np.lexsort((np.where(is_over, memory, seconds), is_over))
    numbers = np.broadcast_to(np.arange(count), (len(space.names), count))
    table = space.problem.options.of(jnp.asarray(numbers, jnp.int32))
    columns = (table.start, table.size, *(getattr(table, axis) for axis in AXES))
    places = np.stack([np.asarray(column[index]) for column in columns], axis=1)
    # The first of each allocation, in order.
    firsts = np.sort(np.unique(places[order], axis=0, return_index=True)[1])
    return [
        alternative(space, _replaced(plan, index, int(number)), name)
        for number in order[firsts[:MOST_ALTERNATIVES]]
    ]


def alternative(space: Space, plan: Sequence[int], name: str) -> Alternative:
    """Describe a plan in view of one of its calls.

    Args:
        space: of all plans.
        plan: the number of each call's option.
        name: of the call.
    """
    index = _index(space, name)
    found = price(space.problem, jnp.asarray([plan]))
    taken = np.asarray(found.end - found.begin)[0]
    copies = float(np.asarray(found.copy_seconds)[0].sum())
    seconds, memory = float(found.seconds[0]), float(found.memory_bytes[0])
    call = float(taken[index])
    others = float(taken.sum()) - call
    return Alternative(
        allocation=space.chosen(plan)[name],
        plan=tuple(map(int, plan)),
        seconds=seconds,
        memory_bytes=memory,
        is_fitting=memory <= float(space.problem.memory_bytes),
        parts=Parts(call, others, copies, seconds - call - others - copies),
    )


def refusal(
    space: Space,
    roles: Mapping[str, Role],
    work: Work,
    name: str,
    allocation: Allocation,
    *,
    rules: Rules | None = None,
) -> str:
    """Return the rule that forbids an allocation of a call; "" if none does.

    Whether it fits the memory is not asked.

    Args:
        space: of all plans.
        roles: by name.
        work: shapes of a step.
        name: of the call.
        allocation: in question.
        rules: of the space; None is `Rules()`.

    Raises:
        ValueError: no such call.
    """
    _index(space, name)
    rules, cluster = rules or Rules(), space.cluster
    node = space.graph.calls[name]
    role = roles[node.role or ""]
    last, count = max(allocation.devices), cluster.num_devices
    if last >= count:
        return f"there is no device {last}: {cluster.name} has {count}"
    if (allocation.devices[0], allocation.size) not in ranges(cluster, rules) or (
        allocation.devices != tuple(range(allocation.devices[0], last + 1))
    ):
        return (
            "its devices are no aligned range: a power of two of a node's devices, or"
            " of nodes, that begins at a multiple of itself"
        )
    is_generating = isinstance(node.function, Generate)
    if is_generating and allocation.stage > 1 and not rules.generates_in_stages:
        return "it generates, and a stage would wait for the others at every token"
    within = allocation.tensor * allocation.expert
    if within > cluster.devices_per_node:
        return (
            f"tensor × expert is {within}, and a node has"
            f" {cluster.devices_per_node} devices"
        )
    if allocation.stage > role.model.num_layers:
        return f"there are {role.model.num_layers} layers for {allocation.stage} stages"
    rows = _rows_of(space, work, name)
    if allocation.num_row_shards > rows:
        return f"there are {rows} sequences for {allocation.num_row_shards} row shards"
    try:
        check_fit(allocation, role.model)
    except ValueError as error:
        return str(error)
    return ""


def signed(seconds: float) -> str:
    """Write a difference, as in "+0.41 s"."""
    size = f"{abs(seconds):.3g}" if abs(seconds) >= 5e-4 else "0"
    return f"{'−' if seconds < 0 and size != '0' else '+'}{size} s"


def _index(space: Space, name: str) -> int:
    if name not in space.names:
        raise ValueError(
            f"There is no call {name!r} with an allocation of its own; there are"
            f" {', '.join(space.names)}."
        )
    return space.names.index(name)


def _rows_of(space: Space, work: Work, name: str) -> int:
    """Return the sequences of a call: those of a batch, and the completions of each."""
    rows = work.num_rows
    order = space.graph.order()
    for other in order[: order.index(name) + 1]:
        function = space.graph.calls[other].function
        if isinstance(function, Generate):
            rows *= function.completions_per_prompt
    return rows


def _replaced(plan: Sequence[int], index: int, number: int) -> tuple[int, ...]:
    return (*plan[:index], number, *plan[index + 1 :])
