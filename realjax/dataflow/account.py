"""The memory account of a schedule: what every device holds at every step of it.

    step                         device 0–3   device 4–7   host
    Move policy → t4@0-3            31.2         12.0
    Run rollout                     58.9 ◀       12.0
    …

It is worked out before anything runs, from bytes that the caller gives (`Sizes`):
`planner/memory.py` counts them for a run. Steps are taken in the order they are
issued. That is the order in which a device's memory is given out, too: a computation
takes it as soon as the one before it on that device has left it, and a copy waits for
that.

Devices that every allocation treats alike are one group, so that an account of
thousands of devices costs what one of a few does.
"""

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan
from realjax.dataflow.schedule import (
    Move,
    Offload,
    Part,
    Place,
    Release,
    Reload,
    Run,
    Step,
    parts_of,
    resting_on_host,
)

GIB = 1 << 30


class DoesNotFitError(ValueError):
    """A plan needs more memory than its devices have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes on each of the devices of an allocation.

    Attributes:
        parts: what roles keep, by (role, part), on the devices of their home.
        copies: of a role's parameters elsewhere, by (role, key of the place).
        moving: pieces on their way, beside source and destination, by the same key.
        working: what a call needs while it runs, by its name.
        batch: keys of the batch that a call reads and writes, by its name. They stay
            until the step ends; what a call with staleness makes, for a step more.
        arriving: what a copy takes, beyond `copies`, until it is quantized.
        pools: keys and values of a call that generates, by its name; they stay from one
            step to the next.
        bases: of what stands beside adapters, where calls are elsewhere, and the place;
            by role and layout. They stay.
        streamed: roles whose moments stay in host memory all the time.
    """

    parts: Mapping[tuple[str, Part], int]
    copies: Mapping[tuple[str, Hashable], int]
    moving: Mapping[tuple[str, Hashable], int]
    working: Mapping[str, int]
    batch: Mapping[str, int]
    arriving: Mapping[tuple[str, Hashable], int] = dataclasses.field(
        default_factory=dict
    )
    pools: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bases: Mapping[tuple[str, Hashable], tuple[Place, int]] = dataclasses.field(
        default_factory=dict
    )
    streamed: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """What devices hold during one step of a schedule.

    Attributes:
        step: which.
        held: bytes by what they are, by group of devices.
        device_bytes, host_bytes: their sums, [groups]; host memory is counted beside
            the device whose arrays it holds.
    """

    step: Step
    held: Mapping[str, np.ndarray]
    device_bytes: np.ndarray
    host_bytes: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """Memory over the steps of a schedule.

    Attributes:
        groups: device indices that hold the same at all times.
        moments: one for each step.
        resting_bytes, resting_host_bytes: held after the last step, [groups].
        limit_bytes: of a device; 0 where it is not known.
    """

    groups: tuple[tuple[int, ...], ...]
    moments: tuple[Moment, ...]
    resting_bytes: np.ndarray
    resting_host_bytes: np.ndarray
    limit_bytes: int = 0

    @property
    def peak_bytes(self) -> np.ndarray:
        """The most that each group of devices holds, [groups]."""
        return np.max([moment.device_bytes for moment in self.moments], axis=0)

    @property
    def fits(self) -> bool:
        """Whether no device ever holds more than it has."""
        return not self.limit_bytes or bool((self.peak_bytes <= self.limit_bytes).all())

    def check(self) -> None:
        """Refuse a schedule that does not fit.

        Raises:
            DoesNotFitError: with the table, and what is held at the worst moment.
        """
        if self.fits:
            return
        group = int(np.argmax(self.peak_bytes))
        peak = int(self.peak_bytes[group])
        worst = max(self.moments, key=lambda moment: moment.device_bytes[group])
        held = sorted(worst.held.items(), key=lambda item: -item[1][group])
        parts = ", ".join(
            f"{what} {_gib(sizes[group])}" for what, sizes in held if sizes[group]
        )
        raise DoesNotFitError(
            f"The plan needs {_gib(peak)} GiB on device {self.groups[group][0]} and it"
            f" has {_gib(self.limit_bytes)}. At '{worst.step}' it holds, in GiB:"
            f" {parts}. Spread the largest over more devices, let a role wait in host"
            " memory (+offload), take fewer rows at a time, give a pool fewer pages, or"
            f" recompute more (remat).\n{self.table()}"
        )

    def table(self) -> str:
        """One line a step: GiB on each group of devices, and in host memory."""
        heads = ["step", *(_ranges(group) for group in self.groups), "host"]
        rows = [heads]
        sizes = np.array([len(group) for group in self.groups])
        for moment in self.moments:
            cells = [
                _gib(held) + (" ◀" if held == peak else "  ")
                for held, peak in zip(moment.device_bytes, self.peak_bytes, strict=True)
            ]
            on_host = int((moment.host_bytes * sizes).sum())
            rows.append([str(moment.step), *cells, _gib(on_host)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def account(
    steps: Sequence[Step],
    graph: DataflowGraph,
    plan: ExecutionPlan,
    homes: Mapping[str, Place],
    sizes: Sizes,
    *,
    limit_bytes: int = 0,
) -> Account:
    """Follow a schedule and count what every device holds.

    Args:
        steps: of the schedule.
        graph: of the algorithm.
        plan: allocations.
        homes: where each role stays.
        sizes: of everything.
        limit_bytes: of a device; 0 where it is not known.
    """
    ledger = _Ledger(graph, plan, homes, sizes)
    ledger.begin_later(steps)
    moments = tuple(ledger.take(step) for step in steps)
    ledger.end_step()
    return Account(
        groups=ledger.groups,
        moments=moments,
        resting_bytes=ledger.total(ledger.device),
        resting_host_bytes=ledger.total(ledger.host),
        limit_bytes=limit_bytes,
    )


class _Ledger:
    """What is where, while a schedule is followed."""

    def __init__(self, graph, plan, homes, sizes: Sizes):
        self.graph, self.plan, self.homes, self.sizes = graph, plan, homes, sizes
        self.groups, self._masks = _groups(plan)
        self.device: dict[tuple, tuple[str, np.ndarray]] = {}
        self.host: dict[tuple, tuple[str, np.ndarray]] = {}
        for name, size in sizes.pools.items():
            pool = self._held(plan.calls[name], f"pool of {name}", size)
            self.device["pool", name] = pool
        for key, (place, size) in sizes.bases.items():
            what = f"base of {key[0]} at {place.allocation}"
            self.device["base", *key] = self._held(place, what, size)
        for name in graph.stale_calls:
            made = self._held(plan.calls[name], "batch", sizes.batch.get(name, 0))
            self.device["waiting", name] = made
        resting = resting_on_host(graph, plan, sizes.streamed)
        for role in graph.roles:
            for part in parts_of(graph, role, sizes.streamed):
                where = self.host if (role, part) in resting else self.device
                self._keep(where, role, part)
            if role in sizes.streamed:
                self._keep(self.host, role, "optimizer")

    def begin_later(self, steps: Sequence[Step]) -> None:
        """Begin as every step but the first: with host copies that the last one left.

        Those of a role that no call changes serve again.
        """
        for step in steps:
            match step:
                case Offload(role, part):
                    self._keep(self.host, role, part)
                case Run(name):
                    self._drop_host_copies(name)
        for role, part in resting_on_host(self.graph, self.plan, self.sizes.streamed):
            self._keep(self.host, role, part)

    def take(self, step: Step) -> Moment:
        """Do one step; the moment is while it runs."""
        passing: dict[tuple, tuple[str, np.ndarray]] = {}
        match step:
            case Move(role, place):
                key = (role, place.key)
                what = f"{role} at {place}"
                self.device[key] = self._held(place, what, self.sizes.copies[key])
                for end in (place, self.homes[role]):
                    moving = self.sizes.moving.get(key, 0)
                    passing["moving", end.key] = self._held(end, "pieces", moving)
                arriving = self.sizes.arriving.get(key, 0)
                passing["arriving", key] = self._held(place, what, arriving)
            case Release(role, place):
                del self.device[role, place.key]
            case Reload(role, part):
                self._keep(self.device, role, part)
            case Offload(role, part):
                self._keep(self.host, role, part)
                del self.device[role, part]
            case Run(name) if name in self.plan.calls:
                place = self.plan.calls[name]
                batch = self.sizes.batch.get(name, 0)
                working = self.sizes.working.get(name, 0)
                self.device["batch", name] = self._held(place, "batch", batch)
                passing["working", name] = self._held(place, f"{name}", working)
        held: dict[str, np.ndarray] = collections.defaultdict(
            lambda: np.zeros(len(self.groups), np.int64)
        )
        for what, array in (*self.device.values(), *passing.values()):
            held[what] = held[what] + array
        moment = Moment(
            step=step,
            held=dict(held),
            device_bytes=self.total(self.device) + self.total(passing),
            host_bytes=self.total(self.host),
        )
        if isinstance(step, Run):
            self._drop_host_copies(step.call)
        return moment

    def end_step(self) -> None:
        """Drop the batch, but for what waits for the next step."""
        for key in [key for key in self.device if key[0] == "batch"]:
            del self.device[key]

    def total(self, where: Mapping) -> np.ndarray:
        """Add up bytes, [groups]."""
        zeros = np.zeros(len(self.groups), np.int64)
        return sum((array for _, array in where.values()), zeros)

    def _drop_host_copies(self, name: str) -> None:
        """A copy of what a call has changed is of no use any more."""
        role = self.graph.calls[name].role
        if self.graph.calls[name].changes_role:
            for part in parts_of(self.graph, role, self.sizes.streamed):
                self.host.pop((role, part), None)

    def _keep(self, where: dict, role: str, part: Part) -> None:
        size = self.sizes.parts[role, part]
        where[role, part] = self._held(self.homes[role], f"{role} {part}", size)

    def _held(self, place, what: str, size: int) -> tuple[str, np.ndarray]:
        return what, self._masks[place.allocation.devices] * size


def _groups(
    plan: ExecutionPlan,
) -> tuple[tuple[tuple[int, ...], ...], dict[tuple[int, ...], np.ndarray]]:
    """Put devices together that the same allocations use."""
    lists = list(dict.fromkeys(p.allocation.devices for p in plan.calls.values()))
    members = [frozenset(devices) for devices in lists]
    groups: dict[tuple[bool, ...], list[int]] = collections.defaultdict(list)
    for device in sorted(frozenset().union(*members)):
        groups[tuple(device in member for member in members)].append(device)
    masks = {
        devices: np.array([key[index] for key in groups], np.int64)
        for index, devices in enumerate(lists)
    }
    return tuple(tuple(group) for group in groups.values()), masks


def _gib(size: int | np.integer) -> str:
    gib = size / GIB
    return f"{gib:.2f}" if gib >= 0.1 or not gib else f"{gib:.1g}"


def _ranges(devices: Sequence[int]) -> str:
    first, last = devices[0], devices[-1]
    if first == last:
        return f"device {first}"
    if len(devices) == last - first + 1:
        return f"device {first}–{last}"
    return f"device {first}, {devices[1]}" + (f" … {last}" * (len(devices) > 2))
