"""The plans of a step: every allocation that each of its calls may have, and its price.

    rollout         d8@0-7  t8@0-7  d2t4@0-7  d4@0-3  d4@4-7  …
    reward          d8@0-7  …
    train_policy    …

A call's seconds and bytes do not depend on the others; copies between calls, waiting
for devices, and memory shared with others are for `simulate`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import CallPlan, ExecutionPlan, planned
from realjax.functions.function import Follow, Generate, Infer, Train
from realjax.functions.role import Role
from realjax.parallel.allocation import Allocation
from realjax.planner.cluster import Cluster
from realjax.planner.cost import CallWork, Coefficients, Quantities, quantities
from realjax.planner.memory import CallBytes, Work, call_bytes
from realjax.planner.simulate import Options, Problem
from realjax.planner.strategies import Range, Rules, ranges, strategies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of the sequences of a step.

    Attributes:
        prompt_tokens: mean of a prompt, or of a sequence where nothing is generated.
        new_tokens: mean of a completion.
        most_new_tokens: of any completion.
    """

    prompt_tokens: float
    new_tokens: float = 0.0
    most_new_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One allocation of one call.

    Attributes:
        allocation: devices and strategy.
        quantities: what the call takes of them.
        seconds: of the call.
        bytes: on each device.
    """

    allocation: Allocation
    quantities: Quantities
    seconds: float
    bytes: CallBytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """All plans of a step.

    Attributes:
        graph: of the algorithm.
        names: of the calls that have allocations of their own, in order.
        options: of each, as many as `problem` has numbers for.
        problem: what `simulate.price` takes.
        microbatch_tokens: of the plans.
    """

    graph: DataflowGraph
    names: tuple[str, ...]
    options: tuple[tuple[Option, ...], ...]
    problem: Problem
    microbatch_tokens: int

    @property
    def num_plans(self) -> int:
        """How many plans there are."""
        count = 1
        for options in self.options:
            count *= len(options)
        return count

    def chosen(self, plan: Sequence[int]) -> dict[str, Allocation]:
        """Return the allocations of a plan, by call."""
        return {
            name: options[number].allocation
            for name, options, number in zip(
                self.names, self.options, plan, strict=True
            )
        }

    def execution_plan(self, plan: Sequence[int]) -> ExecutionPlan:
        """Return a plan as a run takes it."""
        calls = {
            name: CallPlan(allocation=allocation)
            for name, allocation in self.chosen(plan).items()
        }
        return planned(self.graph, calls, microbatch_tokens=self.microbatch_tokens)

    def number_of(self, name: str, allocation: Allocation) -> int:
        """Return the number of a call's option.

        Raises:
            ValueError: the call has no such option.
        """
        options = self.options[self.names.index(name)]
        for number, option in enumerate(options):
            if option.allocation.layout_key == allocation.layout_key:
                return number
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
) -> Space:
    """List the options of every call.

    Args:
        graph: of the algorithm.
        roles: models, types and optimizers, by name.
        work: shapes of a step, which memory is for.
        lengths: of its sequences in the mean, which time is for.
        cluster: the machine.
        coefficients: of its devices.
        microbatch_tokens: of the plans.
        rules: which allocations are looked at; None is all.
        fixed: by call, the one allocation that it may have, with its options.

    Raises:
        ValueError: a call fits nowhere, by itself; names it and the bytes.
    """
    fixed = fixed or {}
    names = [name for name in graph.order() if graph.calls[name].role is not None]
    homes = {role: _home(graph, role, names) for role in graph.roles}
    everywhere = ranges(cluster, rules)
    found, num_rows = [], work.num_rows
    for name in names:
        node = graph.calls[name]
        role = _role(graph, name)
        if isinstance(node.function, Generate):
            num_rows *= node.function.completions_per_prompt
        shape = _call_work(graph, name, roles, num_rows, lengths)
        option = functools.partial(
            _option,
            *(graph, name, roles, num_rows, work, shape),
            cluster=cluster,
            coefficients=coefficients,
            microbatch_tokens=microbatch_tokens,
        )
        by_size: dict[int, list[Option]] = {}
        places = everywhere
        if name in fixed:
            places = (_range_of(fixed[name]),)
            by_size[fixed[name].size] = [option(fixed[name])]
        for size in {size for _, size in places} - by_size.keys():
            by_size[size] = [
                option(allocation)
                for allocation in strategies(
                    size,
                    roles[role].model,
                    cluster,
                    num_rows=num_rows,
                    is_generating=isinstance(node.function, Generate),
                    rules=rules,
                )
            ]
        is_home = homes[role] == name
        options = [
            _moved(one, place)
            for place in places
            for one in by_size[place[1]]
            if _bytes_of(one, node, is_home) <= cluster.device.memory_bytes
        ]
        if not options:
            raise ValueError(_nowhere(name, node, is_home, by_size, cluster))
        found.append(tuple(options))
    problem = _problem(graph, names, homes, found, cluster, coefficients)
    return Space(
        graph=graph,
        names=tuple(names),
        options=tuple(found),
        problem=problem,
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


def _call_work(
    graph: DataflowGraph,
    name: str,
    roles: Mapping[str, Role],
    num_rows: int,
    lengths: Lengths,
) -> CallWork | None:
    """Return what a call has to do; None for what follows another role."""
    node, role = graph.calls[name], roles[_role(graph, name)]
    common = {
        "model": role.model,
        "num_rows": num_rows,
        "prompt_tokens": lengths.prompt_tokens,
        "new_tokens": lengths.new_tokens,
        "most_new_tokens": lengths.most_new_tokens,
        "itemsize": jnp.dtype(role.dtype).itemsize,
    }
    match node.function:
        case Generate():
            return CallWork(kind="generate", **common)
        case Infer():
            return CallWork(kind="infer", **common)
        case Train() as train:
            return CallWork(
                kind="train",
                num_updates=train.minibatches,
                num_epochs=train.epochs,
                remat=role.remat(),
                **common,
            )
        case Follow():
            return None
    raise TypeError(
        f"Call {name!r} has a role and the function {type(node.function).__name__},"
        " which the planner does not know. It knows Generate, Infer, Train and Follow."
    )


def _option(
    graph: DataflowGraph,
    name: str,
    roles: Mapping[str, Role],
    num_rows: int,
    work: Work,
    shape: CallWork | None,
    allocation: Allocation,
    *,
    cluster: Cluster,
    coefficients: Coefficients,
    microbatch_tokens: int,
) -> Option:
    plan = ExecutionPlan(
        graph=graph,
        calls={name: CallPlan(allocation=allocation)},
        microbatch_tokens=microbatch_tokens,
    )
    taken = call_bytes(graph, plan, name, roles, num_rows, work)
    if shape is None:
        # Both parameters are read, and one is written.
        seconds = 3 * taken.masters / cluster.device.bytes_per_second
        needs = Quantities(memory=seconds, programs=1.0)
    else:
        if shape.kind != "generate":
            rows = plan.num_rows(name, max_rows=num_rows, row_length=work.width)
            tokens = rows // allocation.num_row_shards * work.width
            shape = dataclasses.replace(shape, microbatch_tokens=tokens)
        else:
            settings = plan.rollout_settings(name, num_rows=num_rows)
            slots = settings.slots // allocation.num_row_shards
            shape = dataclasses.replace(shape, slots=slots)
        needs = quantities(shape, allocation, cluster)
    return Option(
        allocation=allocation,
        quantities=needs,
        seconds=coefficients.seconds(needs),
        bytes=taken,
    )


def _range_of(allocation: Allocation) -> Range:
    return allocation.devices[0], allocation.size


def _moved(option: Option, place: Range) -> Option:
    """Return the same option on another range of devices."""
    start, size = place
    if start == option.allocation.devices[0]:
        return option
    devices = tuple(range(start, start + size))
    allocation = dataclasses.replace(option.allocation, devices=devices)
    return dataclasses.replace(option, allocation=allocation)


def _bytes_of(option: Option, node, is_home: bool) -> int:
    """Return what the call alone needs of a device."""
    static, working = _held(option, node, is_home)
    return static + working + (0 if is_home else option.bytes.copy)


def _held(option: Option, node, is_home: bool) -> tuple[int, int]:
    """Return what a call's devices hold at all times because of it, and as it runs."""
    taken = option.bytes
    static = taken.pool
    if is_home:
        static += taken.masters if node.changes_role else taken.copy
    return static, taken.working + taken.batch


def _nowhere(name: str, node, is_home: bool, by_size, cluster: Cluster) -> str:
    """Say what a call needs that fits nowhere."""
    everything = [option for options in by_size.values() for option in options]
    if not everything:
        return (
            f"Call {name!r} has no strategy on {cluster.name}: none divides its model"
            " and its rows."
        )
    least = min(everything, key=lambda option: _bytes_of(option, node, is_home))
    needed = _bytes_of(least, node, is_home)
    short = needed / cluster.device.memory_bytes
    return (
        f"Call {name!r} fits no devices of {cluster.name}: with the least memory, as"
        f" {least.allocation}, it takes {needed / 2**30:.1f} GiB of each device's"
        f" {cluster.device.memory_bytes / 2**30:.1f}. Give {short:.1f} times the"
        " devices, shorter sequences or smaller microbatches, or offload the role"
        f" (config.roles.{node.role}.offload)."
    )


def _problem(
    graph: DataflowGraph,
    names: Sequence[str],
    homes: Mapping[str, str],
    found: Sequence[Sequence[Option]],
    cluster: Cluster,
    coefficients: Coefficients,
) -> Problem:
    most = max(map(len, found))
    shape = (len(names), most)
    start, size, layout = (np.zeros(shape, np.int32) for _ in range(3))
    seconds, static, working, copy = (np.zeros(shape, np.float32) for _ in range(4))
    layouts: dict[tuple, int] = {}
    for row, (name, options) in enumerate(zip(names, found, strict=True)):
        node = graph.calls[name]
        is_home = homes[_role(graph, name)] == name
        for column in range(most):
            # What fills up the row is the first option again.
            option = options[column if column < len(options) else 0]
            place = row, column
            allocation = option.allocation
            start[place], size[place] = allocation.devices[0], allocation.size
            seconds[place] = option.seconds
            static[place], working[place] = _held(option, node, is_home)
            copy[place] = option.bytes.copy
            key = allocation.layout_key[:5]  # pyright: ignore[reportIndexIssue]
            layout[place] = layouts.setdefault(key, len(layouts))
    numbers = [start, size, seconds, static, working, copy, layout]
    options = Options(*map(jnp.asarray, numbers))
    index = {name: number for number, name in enumerate(names)}
    reads = np.zeros((len(names), len(names)), bool)
    for name in names:
        for parent in _ancestors(graph, name):
            if parent in index:
                reads[index[name], index[parent]] = True
    as_float = lambda x: jnp.asarray(x, jnp.float32)
    return Problem(
        options=options,
        reads=jnp.asarray(reads),
        home=jnp.asarray([index[homes[_role(graph, name)]] for name in names]),
        devices_per_node=jnp.asarray(cluster.devices_per_node, jnp.int32),
        link=as_float(coefficients.link / cluster.link_bytes_per_second),
        network=as_float(coefficients.network / cluster.network_bytes_per_second),
        hop_seconds=as_float(coefficients.hop_seconds),
        memory_bytes=as_float(cluster.device.memory_bytes),
    )


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
