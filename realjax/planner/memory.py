"""How much memory an execution plan takes, from shapes alone.

What roles keep and copies of it are counted exactly: they are arrays whose shardings
are known. What a call works with (activations, caches, gradients) is `working`'s: it is
counted from the sizes of the model, and `docs/memory.md` says how near that comes to
what XLA takes on H200s.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

from realjax.dataflow import schedule as schedule_lib
from realjax.dataflow.account import Account, Sizes, account
from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan
from realjax.functions.function import Generate
from realjax.functions.role import Role
from realjax.parallel.allocation import Allocation
from realjax.planner.stored import (
    MOMENTS,
    base_bytes,
    bases_kept,
    cut_bytes,
    fitted,
    parameter_bytes,
)
from realjax.planner.working import (
    Work,
    num_kept,
    page_bytes,
    pool_bytes,
    room,
    working_bytes,
)

PIECES = 0.25
"""The most that is on its way at the same time, of a copy: reallocation keeps to it."""


def memory_account(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    roles: Mapping[str, Role],
    work: Work,
    *,
    limit_bytes: int = 0,
) -> Account:
    """Make a plan's schedule and count what every device holds at every step of it.

    Nothing is refused here: ask `Account.fits`, or let `Account.check` say why not.

    Args:
        graph: of the algorithm.
        plan: allocations.
        roles: models, types and optimizers, by name.
        work: shapes of a step.
        limit_bytes: of a device. The schedule issues copies as early as it allows; 0
            is not known.
    """
    count = account_counter(graph, plan, roles, work, limit_bytes=limit_bytes)
    steps = schedule_lib.make_schedule(
        graph,
        plan,
        {name: role.dtype for name, role in roles.items()},
        streamed=streamed_roles(roles),
        fits=(lambda steps: count(steps).fits) if limit_bytes else None,
    )
    return count(steps)


def account_counter(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    roles: Mapping[str, Role],
    work: Work,
    *,
    limit_bytes: int = 0,
) -> Callable[[Sequence[schedule_lib.Step]], Account]:
    """Return the function that counts for any schedule of a plan; see above."""
    sizes = memory_sizes(graph, plan, roles, work)
    dtypes = {name: role.dtype for name, role in roles.items()}
    homes = schedule_lib.home_places(graph, plan, dtypes)
    return lambda steps: account(
        steps, graph, plan, homes, sizes, limit_bytes=limit_bytes
    )


def fit_pools(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    roles: Mapping[str, Role],
    work: Work,
    *,
    limit_bytes: int,
) -> ExecutionPlan:
    """Give pools of keys and values what the rest of a plan leaves free.

    A pool that the plan gives no pages gets as many as any completions take, or if
    those do not fit as many as do. With fewer, rows give way to others and come back.
    One that would be too small for a single row is left as it is, for
    `Account.check` to refuse.

    Args:
        graph: of the algorithm.
        plan: allocations.
        roles: models, types and optimizers, by name.
        work: shapes of a step.
        limit_bytes: of a device.
    """
    found = memory_account(graph, plan, roles, work, limit_bytes=limit_bytes)
    if found.fits:
        return plan
    sizes, calls = memory_sizes(graph, plan, roles, work), dict(plan.calls)
    open_pools = {n: s for n, s in sizes.pools.items() if not plan.calls[n].pages}
    left = _shares(open_pools, plan, found)
    num_rows = work.num_rows
    for name in graph.order():
        node = graph.calls[name]
        if not isinstance(node.function, Generate) or name not in calls:
            continue
        num_rows *= node.function.completions_per_prompt
        if name not in open_pools:
            continue
        role = roles[node.role]  # pyright: ignore[reportArgumentType]: it generates
        num_pages = left[name] // page_bytes(plan, name, role)
        needed = room(plan, name, role, num_rows, work).needed_pages(work.width)
        is_less = left[name] < open_pools[name]
        if is_less and num_pages >= needed:
            shards = calls[name].allocation.num_row_shards
            calls[name] = dataclasses.replace(calls[name], pages=num_pages * shards)
    return dataclasses.replace(plan, calls=calls)


def _shares(
    pools: Mapping[str, int], plan: ExecutionPlan, found: Account
) -> dict[str, int]:
    """Return what is left of pools when those of a device share what is too much."""
    left = dict(pools)
    for group, peak in zip(found.groups, found.peak_bytes.tolist(), strict=True):
        here = [n for n in pools if group[0] in plan.calls[n].allocation.devices]
        excess, total = max(peak - found.limit_bytes, 0), sum(pools[n] for n in here)
        for name in here:
            share = pools[name] - math.ceil(excess * pools[name] / total)
            left[name] = min(left[name], share)
    return left


def memory_sizes(
    graph: DataflowGraph, plan: ExecutionPlan, roles: Mapping[str, Role], work: Work
) -> Sizes:
    """Count the bytes of everything a plan's schedule moves or works with.

    Args:
        graph: of the algorithm.
        plan: allocations.
        roles: models, types and optimizers, by name.
        work: shapes of a step.
    """
    roles = _fitted_roles(graph, plan, roles)
    dtypes = {name: role.dtype for name, role in roles.items()}
    homes = schedule_lib.home_places(graph, plan, dtypes)
    parts, copies, moving, arriving = {}, {}, {}, {}
    working, batch, pools, bases = {}, {}, {}, {}
    basing = bases_kept(graph, plan, {name: r.model for name, r in roles.items()})
    for name, home in homes.items():
        parts[name, "parameters"] = parameter_bytes(roles[name].model, home)
        parts[name, "optimizer"] = MOMENTS * cut_bytes(
            roles[name].model, home.allocation
        )
    num_rows = work.num_rows
    for name in graph.order():
        node = graph.calls[name]
        if name not in plan.calls:
            continue
        allocation = plan.calls[name].allocation
        if isinstance(node.function, Generate):
            num_rows *= node.function.completions_per_prompt
        batch[name] = _batch_bytes(graph, name, roles, num_rows, work, allocation)
        if node.role is None:
            continue
        place = schedule_lib.place_of(graph, plan, dtypes, name)
        if place.key != homes[node.role].key:
            key = (node.role, place.key)
            model = roles[node.role].model
            whole = parameter_bytes(model, dataclasses.replace(place, weights=""))
            copies[key] = parameter_bytes(model, place)
            # Of the first copy, which brings a base along that stays.
            moving[key] = int(PIECES * whole)
            # It arrives whole, and is quantized matrix by matrix.
            arriving[key] = whole - copies[key]
            if node.role in basing:
                kept = base_bytes(model, place)
                copies[key] -= kept
                if _layout_of(place) != _layout_of(homes[node.role]):
                    bases[node.role, _layout_of(place)] = place, kept
        role = roles[node.role]
        working[name] = sum(working_bytes(plan, name, role, num_rows, work))
        if isinstance(node.function, Generate):
            pools[name] = pool_bytes(plan, name, role, num_rows, work)
    return Sizes(
        parts=parts,
        copies=copies,
        moving=moving,
        arriving=arriving,
        working=working,
        batch=batch,
        pools=pools,
        bases=bases,
        streamed=streamed_roles(roles),
    )


def _layout_of(place: schedule_lib.Place) -> Hashable:
    """What two places share where one base serves both."""
    return place.allocation.layout_key, place.weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallBytes:
    """What a call takes on each of its devices, wherever those are.

    Attributes:
        parameters: of its role in float32.
        masters: those, with the optimizer's moments if the
            call trains and they are not in host memory.
        copy: parameters in the type it computes in; beside a base that stays, the
            adapters.
        base: what stays, where copies are of adapters alone.
        working: while it runs, beside parameters.
        temporary: of that, what one of its programs takes beside what it is given.
        pool: keys and values that stay, of a call that generates.
        batch: keys of the batch that it reads and writes; those of two steps where it
            runs a step ahead.
    """

    parameters: int = 0
    masters: int = 0
    copy: int = 0
    base: int = 0
    working: int = 0
    temporary: int = 0
    pool: int = 0
    batch: int = 0


def call_bytes(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    name: str,
    roles: Mapping[str, Role],
    num_rows: int,
    work: Work,
) -> CallBytes:
    """Count the bytes of one call alone.

    Args:
        graph: of the algorithm.
        plan: needs only this call's allocation.
        name: of the call.
        roles: models, types and optimizers, by name.
        num_rows: sequences that it takes.
        work: shapes of a step.
    """
    node, allocation = graph.calls[name], plan.calls[name].allocation
    batch = _batch_bytes(graph, name, roles, num_rows, work, allocation)
    batch *= 1 + node.staleness
    if node.role is None:
        return CallBytes(batch=batch)
    role = _fitted(roles[node.role], allocation)
    place = schedule_lib.Place(allocation, "float32")
    masters = parameters = parameter_bytes(role.model, place)
    if node.is_training and not role.config.optimizer.offload:
        masters += MOMENTS * cut_bytes(role.model, allocation)
    place = schedule_lib.place_of(graph, plan, {node.role: role.dtype}, name)
    working = working_bytes(plan, name, role, num_rows, work)
    pool = base = 0
    if isinstance(node.function, Generate):
        pool = pool_bytes(plan, name, role, num_rows, work)
    if not role.config.offload and bases_kept(graph, plan, {node.role: role.model}):
        base = base_bytes(role.model, place)
    return CallBytes(
        parameters=parameters,
        masters=masters,
        copy=parameter_bytes(role.model, place) - base,
        base=base,
        working=sum(working),
        temporary=working.temporary,
        pool=pool,
        batch=batch,
    )


def _fitted(role: Role, allocation: Allocation) -> Role:
    """Return a role whose model is padded for an allocation, as a run has it."""
    model = fitted(role.model, allocation)
    return role if model is role.model else dataclasses.replace(role, model=model)


def _fitted_roles(
    graph: DataflowGraph, plan: ExecutionPlan, roles: Mapping[str, Role]
) -> dict[str, Role]:
    """Return the roles, each padded for the allocations of all its calls."""
    found = dict(roles)
    for name, call in plan.calls.items():
        role = graph.calls[name].role
        if role is not None:
            found[role] = _fitted(found[role], call.allocation)
    return found


def streamed_roles(roles: Mapping[str, Role]) -> frozenset[str]:
    """Roles whose moments stay in host memory all the time."""
    return frozenset(
        name
        for name, role in roles.items()
        if role.is_trained and role.config.optimizer.offload
    )


def _batch_bytes(graph, name, roles, num_rows, work, allocation: Allocation) -> int:
    node = graph.calls[name]
    shards = allocation.num_row_shards
    num_tokens = -(-num_rows // shards) * work.width
    keys: Collection[str] = {*node.reads, *node.writes}
    kept = num_kept(graph, node, lambda role: roles[role].model.vocab_size)
    return 4 * num_tokens * (len(keys) + kept)
