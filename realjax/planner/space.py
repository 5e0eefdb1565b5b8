"""The plans of a step: every option that each of its calls may have, and its price.

    rollout         d8@0-7  t8@0-7  d2t4@0-7  d4@0-3  d4@4-7  …
    reward          d8@0-7  …
    train_policy    …

A call's seconds and bytes do not depend on the others; copies between calls, waiting
for devices, and memory shared with others are for `simulate`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array
from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import CallPlan, ExecutionPlan, planned
from realjax.functions.function import Generate
from realjax.functions.role import Role
from realjax.parallel.allocation import Allocation
from realjax.planner.cluster import Cluster
from realjax.planner.copies import AXES, PIECE_PROGRAMS, num_arrays_of
from realjax.planner.cost import Coefficients
from realjax.planner.memory import Work
from realjax.planner.options import CallOptions, Lengths, Option, Shapes, Wish
from realjax.planner.simulate import Options, Problem
from realjax.planner.strategies import Range, Rules, ranges

__all__ = ["Lengths", "Option", "Space", "Wish", "make_space"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """All plans of a step.

    Attributes:
        graph: of the algorithm.
        names: of the calls that have allocations of their own, in the order in which
            they are issued.
        options: of each, as many as `problem` has numbers for.
        problem: what `simulate.price` takes.
        homes: the call where each role's parameters live, by role.
        cluster: the machine.
        microbatch_tokens: of the plans, where an option does not say its rows.
    """

    graph: DataflowGraph
    names: tuple[str, ...]
    options: tuple[CallOptions, ...]
    problem: Problem
    homes: Mapping[str, str]
    cluster: Cluster
    microbatch_tokens: int

    @property
    def num_plans(self) -> int:
        """How many plans there are."""
        return math.prod(map(len, self.options))

    def picked(self, plan: Sequence[int]) -> dict[str, Option]:
        """Return the options of a plan, by call."""
        return {
            name: options[int(number)]
            for name, options, number in zip(
                self.names, self.options, plan, strict=True
            )
        }

    def chosen(self, plan: Sequence[int]) -> dict[str, Allocation]:
        """Return the allocations of a plan, by call."""
        picked = self.picked(plan)
        offloaded = {
            role for role, home in self.homes.items() if picked[home].is_offloaded
        }
        return {
            name: _offloading(option.allocation)
            if self.graph.calls[name].role in offloaded
            else option.allocation
            for name, option in picked.items()
        }

    def execution_plan(self, plan: Sequence[int]) -> ExecutionPlan:
        """Return a plan as a run takes it."""
        chosen = self.chosen(plan)
        calls: dict[str, CallPlan] = {
            name: dataclasses.replace(option.plan, allocation=chosen[name])
            for name, option in self.picked(plan).items()
        }
        return planned(self.graph, calls, microbatch_tokens=self.microbatch_tokens)

    def number_of(self, name: str, allocation: Allocation) -> int:
        """Return the number of a call's fastest option with an allocation.

        Raises:
            ValueError: the call has no such option.
        """
        options = self.options[self.names.index(name)]
        place = allocation.devices[0], allocation.size
        is_parked = "offload" in allocation.options and name in self.homes.values()
        found = [
            (option.seconds, number)
            for number in options.numbers(place)
            if (option := options[number]).allocation.layout_key
            == allocation.layout_key
            and option.is_offloaded == is_parked
        ]
        if found:
            return min(found)[1]
        raise ValueError(
            f"Call {name!r} cannot have the allocation {allocation} here: it does not"
            " divide the model or the rows, does not fit the memory, or its devices"
            " are no aligned range."
        )


def make_space(
    graph: DataflowGraph,
    roles: Mapping[str, Role],
    work: Work,
    lengths: Lengths,
    cluster: Cluster,
    coefficients: Coefficients,
    *,
    microbatch_tokens: int,
    rules: Rules | None = None,
    fixed: Mapping[str, Allocation] | None = None,
    wishes: Mapping[str, Wish] | None = None,
) -> Space:
    """List the options of every call.

    Args:
        graph: of the algorithm.
        roles: models, types and optimizers, by name.
        work: shapes of a step, which memory is for.
        lengths: of its sequences in the mean, which time is for.
        cluster: the machine; what its devices' memory is, no plan goes beyond.
        coefficients: of its devices.
        microbatch_tokens: of the plans, where the rules leave no choice of rows.
        rules: which options are looked at; None is all.
        fixed: by call, the one allocation that it may have, with its options.
        wishes: by call, what else is settled.

    Raises:
        ValueError: a call fits nowhere, by itself; names it and the bytes. Or a fixed
            allocation whose devices do not follow each other.
    """
    rules = rules or Rules()
    shapes = Shapes(
        *(graph, roles, work, lengths, cluster, coefficients),
        microbatch_tokens=microbatch_tokens,
        rules=rules,
        wishes=wishes or {},
    )
    names = [name for name in graph.order() if graph.calls[name].role is not None]
    ahead = [name for name in names if graph.calls[name].staleness]
    homes = {role: _home(graph, role, names) for role in graph.roles}
    everywhere, limit = ranges(cluster, rules), cluster.device.memory_bytes
    of_calls, num_rows = {}, work.num_rows
    for name in names:
        node = graph.calls[name]
        if isinstance(node.function, Generate):
            num_rows *= node.function.completions_per_prompt
        is_home = name in homes.values()
        places, by_size = everywhere, {}
        if name in (fixed or {}):
            allocation = (fixed or {})[name]
            places = (_range_of(name, allocation),)
            by_size[allocation.size] = shapes.of_allocation(
                name, allocation, num_rows, is_home=is_home
            )
        for size in {size for _, size in places} - by_size.keys():
            by_size[size] = shapes.of_size(name, size, num_rows, is_home=is_home)
        fitting = {
            size: tuple(
                sorted(
                    (o for o in options if o.alone_bytes <= limit),
                    key=lambda option: option.seconds,
                )
            )
            for size, options in by_size.items()
        }
        if not any(fitting.values()):
            raise ValueError(_nowhere(name, node, by_size, cluster))
        of_calls[name] = CallOptions(places=places, shapes=fitting)
    names = [name for name in names if name not in ahead] + ahead  # As issued.
    found = [of_calls[name] for name in names]
    problem = _problem(graph, roles, names, homes, found, cluster, coefficients)
    return Space(
        graph=graph,
        names=tuple(names),
        options=tuple(found),
        problem=problem,
        homes=homes,
        cluster=cluster,
        microbatch_tokens=microbatch_tokens,
    )


def _home(graph: DataflowGraph, role: str, names: Sequence[str]) -> str:
    """Return the call where a role's parameters live: what changes it, or the first."""
    own = [name for name in names if graph.calls[name].role == role]
    changing = [name for name in own if graph.calls[name].changes_role]
    return (changing or own)[0]


def _role(graph: DataflowGraph, name: str) -> str:
    role = graph.calls[name].role
    assert role is not None  # Others have no allocation of their own.
    return role


def _range_of(name: str, allocation: Allocation) -> Range:
    start, size = allocation.devices[0], allocation.size
    if allocation.devices != tuple(range(start, start + size)):
        raise ValueError(
            f"Call {name!r} has the allocation {allocation}, whose devices do not"
            " follow each other; plans around it are not searched. Give it a range,"
            " as in @0-3, or every call an allocation."
        )
    return start, size


def _offloading(allocation: Allocation) -> Allocation:
    options = allocation.options | {"offload"}
    return dataclasses.replace(allocation, options=options)


def _nowhere(
    name: str, node, by_size: Mapping[int, Sequence[Option]], cluster: Cluster
) -> str:
    """Say what a call needs that fits nowhere, and the least that would change that."""
    everything = [option for options in by_size.values() for option in options]
    if not everything:
        return (
            f"Call {name!r} has no strategy on {cluster.name}: none divides its model"
            " and its rows."
        )
    least = min(everything, key=lambda option: option.alone_bytes)
    needed, there = least.alone_bytes, cluster.device.memory_bytes
    parts = {
        "parameters and what belongs to them": needed
        - least.bytes.working
        - least.bytes.pool
        - least.bytes.batch,
        "keys and values": least.bytes.pool,
        "what it works with": least.bytes.working,
        "the batch": least.bytes.batch,
    }
    listed = ", ".join(f"{n / 2**30:.1f} {what}" for what, n in parts.items() if n)
    return (
        f"Call {name!r} fits no devices of {cluster.name}: with the least memory, as"
        f" {least.allocation}, it takes {needed / 2**30:.1f} GiB of each device's"
        f" {there / 2**30:.1f} ({listed}). It would fit with"
        f" {(needed - there) / 2**30:.1f} GiB more on each device, with"
        f" {needed / there:.1f} times the devices, or with {_remedy(node, least)}."
    )


def _remedy(node, least: Option) -> str:
    """Name the change of a config that takes the least of a call's memory away."""
    if node.is_training and least.bytes.masters > least.bytes.working:
        return (
            "the optimizer's moments in host memory"
            f" (config.roles.{node.role}.optimizer.offload)"
        )
    if least.bytes.pool > least.bytes.working:
        return "shorter completions, or keys and values of 8 bits (config.kv_dtype)"
    return "shorter sequences"


def _problem(
    graph: DataflowGraph,
    roles: Mapping[str, Role],
    names: Sequence[str],
    homes: Mapping[str, str],
    found: Sequence[CallOptions],
    cluster: Cluster,
    coefficients: Coefficients,
) -> Problem:
    index = {name: number for number, name in enumerate(names)}
    reads = np.zeros((len(names), len(names)), bool)
    for name in names:
        for parent in _ancestors(graph, name):
            if parent in index:
                reads[index[name], index[parent]] = True
    is_ahead = [bool(graph.calls[name].staleness) for name in names]
    home = [index[homes[_role(graph, name)]] for name in names]
    dtypes = [_dtype(graph, roles, name) for name in names]
    home_dtypes = [
        "float32" if graph.calls[names[h]].changes_role else dtypes[h] for h in home
    ]
    casts = [a != b for a, b in zip(dtypes, home_dtypes, strict=True)]
    shares = [
        [
            j < i
            and dtypes[i] == dtypes[j]
            and _role(graph, names[i]) == _role(graph, names[j])
            and j not in home
            and (
                # It reads what was there before any change.
                is_ahead[i]
                or not any(
                    graph.calls[name].changes_role
                    and _role(graph, name) == _role(graph, names[i])
                    for name in names[j:i]
                )
            )
            for j in range(len(names))
        ]
        for i in range(len(names))
    ]
    num_arrays = [num_arrays_of(roles[_role(graph, name)].model) for name in names]
    as_float = lambda x: jnp.asarray(x, jnp.float32)
    device = cluster.device
    return Problem(
        options=table(found),
        reads=jnp.asarray(reads),
        is_ahead=jnp.asarray(is_ahead),
        home=jnp.asarray(home),
        casts=jnp.asarray(casts),
        shares=jnp.asarray(shares),
        is_serial=jnp.asarray(cluster.is_serial),
        concurrent_devices=jnp.asarray(cluster.concurrent_devices, jnp.int32),
        devices_per_node=jnp.asarray(cluster.devices_per_node, jnp.int32),
        num_arrays=jnp.asarray(num_arrays, jnp.int32),
        memory=as_float(coefficients.memory / device.bytes_per_second),
        link=as_float(coefficients.link / cluster.link_bytes_per_second),
        network=as_float(coefficients.network / cluster.network_bytes_per_second),
        host=as_float(coefficients.host / device.host_bytes_per_second),
        piece_seconds=as_float(PIECE_PROGRAMS * coefficients.program_seconds),
        memory_bytes=as_float(device.memory_bytes),
    )


def table(found: Sequence[CallOptions]) -> Options:
    """Write the options of all calls as arrays; short rows are filled up with zeros."""

    def rows(of_calls: Sequence[np.ndarray]) -> Array:
        # One of few lengths, so that compiled searches serve again.
        most = 1 << (max(map(len, of_calls)) - 1).bit_length()
        padded = np.zeros((len(of_calls), most), of_calls[0].dtype)
        for row, values in zip(padded, of_calls, strict=True):
            row[: len(values)] = values
        return jnp.asarray(padded)

    def column(value, dtype: Any = np.float32):
        return rows([np.array([*map(value, o.different)], dtype) for o in found])

    # At least 1: what fills up is divided by, though never looked at.
    size = lambda of: jnp.maximum(column(of, np.int32), 1)
    return Options(
        start=rows([options.starts() for options in found]),
        size=size(lambda option: option.allocation.size),
        **{
            axis: size(lambda option, axis=axis: getattr(option.allocation, axis))
            for axis in AXES
        },
        seconds=column(lambda option: option.seconds),
        static_bytes=column(lambda option: option.static_bytes),
        working_bytes=column(lambda option: option.working_bytes),
        copy_bytes=column(lambda option: option.bytes.copy),
        parked_bytes=column(lambda option: option.parked_bytes),
        reload_seconds=column(lambda option: option.reload_seconds),
        offload_seconds=column(lambda option: option.offload_seconds),
        column=rows([options.columns() for options in found]),
    )


def _dtype(graph: DataflowGraph, roles: Mapping[str, Role], name: str) -> str:
    is_whole = graph.calls[name].needs_masters
    return "float32" if is_whole else roles[_role(graph, name)].dtype


def _ancestors(graph: DataflowGraph, name: str) -> set[str]:
    """Return the calls that one reads from, also through calls without a role."""
    found: set[str] = set()
    waiting = list(graph.parents(name))
    while waiting:
        parent = waiting.pop()
        if parent not in found:
            found.add(parent)
            if graph.calls[parent].role is None:
                waiting += graph.parents(parent)
    return found
