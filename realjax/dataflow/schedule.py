"""The schedule of one step: calls, and the reallocations and offloads between them.

A role that a call changes keeps its float32 masters where that call runs; a call
elsewhere, or in another type, gets a copy before it, dropped when the last call that
needs it has. A role that no call changes lives where its first call is. What a role
keeps waits in host memory between calls where an allocation says `+offload`.

    Move policy → t4@0-3 bfloat16     the copy that the rollout needs
    Reload reference parameters       for later: it overlaps the rollout
    Run rollout
    Release policy t4@0-3
    Run reference
    Offload reference parameters
    …

Steps are issued in this order by one thread and do not wait for each other, except
through what they read. So a copy is issued as early as what it reads is there and the
memory of its devices allows, before the calls that it overlaps.

A call with staleness 1 works for the next step. Where its role is trained on other
devices, it is issued last, so that it runs beside the training, with a copy made before
that:

    Run reward, reference, …          of step k
    Move policy → t4@0-3              as it is before step k trains it
    Run train_policy                  of step k, on devices 4 to 7
    Run rollout                       of step k + 1, on devices 0 to 3
    Release policy t4@0-3

Where they share devices nothing can be beside, and it runs first, as in its own step.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan
from realjax.functions.function import Follow
from realjax.parallel.allocation import Allocation

Part = Literal["parameters", "optimizer"]
"""What a role keeps between calls: float32 masters or a copy; Adam's moments."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a copy of a role's parameters lies, and in which type.

    Attributes:
        allocation: devices and strategy.
        dtype: of the parameters.
        weights: of matrices where those are of 8 bits; "" is `dtype`.
    """

    allocation: Allocation
    dtype: str
    weights: str = ""

    @property
    def key(self):
        """Equal for places where the same copy serves."""
        return self.allocation.layout_key, self.dtype, self.weights

    def __str__(self):
        """As in the drawing above."""
        return f"{self.allocation} {self.dtype} {self.weights}".rstrip()


@dataclasses.dataclass(frozen=True)
class Move:
    """Reallocate a role's parameters from its home to a place.

    Attributes:
        role, place: whose, and where to.
        version: how often the role was changed before, in this step.
    """

    role: str
    place: Place
    version: int = 0

    def __str__(self):
        """As in the drawing above."""
        return f"Move {self.role} → {self.place}"


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a call.

    Attributes:
        call: its name.
        version: how often its role was changed before, in this step.
    """

    call: str
    version: int = 0

    def __str__(self):
        """As in the drawing above."""
        return f"Run {self.call}"


@dataclasses.dataclass(frozen=True)
class Release:
    """Drop a role's copy at a place."""

    role: str
    place: Place

    def __str__(self):
        """As in the drawing above."""
        return f"Release {self.role} {self.place}"


@dataclasses.dataclass(frozen=True)
class Reload:
    """Bring a part of a role back from host memory to its home."""

    role: str
    part: Part = "parameters"

    def __str__(self):
        """As in the drawing above."""
        return f"Reload {self.role} {self.part}"


@dataclasses.dataclass(frozen=True)
class Offload:
    """Leave a part of a role in host memory only."""

    role: str
    part: Part = "parameters"

    def __str__(self):
        """As in the drawing above."""
        return f"Offload {self.role} {self.part}"


Step = Move | Run | Release | Reload | Offload


def home_places(
    graph: DataflowGraph, plan: ExecutionPlan, dtypes: Mapping[str, str]
) -> dict[str, Place]:
    """Where each role's parameters stay between calls.

    In 8 bits only where all its calls take the same: whole numbers are not to be had of
    them again.

    Args:
        graph: of the algorithm.
        plan: allocations.
        dtypes: of each role's computation.

    Raises:
        ValueError: if two calls train one role.
    """
    homes = {}
    for role in graph.roles:
        names = [name for name in graph.order() if graph.calls[name].role == role]
        changing = [name for name in names if graph.calls[name].changes_role]
        if len(changing) > 1:
            raise ValueError(
                f"Calls {changing} both train {role!r}; one call trains a role."
            )
        if changing:
            homes[role] = Place(plan.calls[changing[0]].allocation, "float32")
            continue
        first, *others = (place_of(graph, plan, dtypes, name) for name in names)
        if any(place.key != first.key for place in others):
            first = dataclasses.replace(first, weights="")
        homes[role] = first
    return homes


def place_of(
    graph: DataflowGraph, plan: ExecutionPlan, dtypes: Mapping[str, str], name: str
) -> Place:
    """Where call `name` needs its role's parameters."""
    node = graph.calls[name]
    assert node.role is not None
    dtype = "float32" if node.needs_masters else dtypes[node.role]
    call = plan.calls[name]
    return Place(call.allocation, dtype, call.weights)


def parts_of(graph: DataflowGraph, role: str, streamed: Collection[str]) -> set[Part]:
    """What of a role goes to the host and comes back.

    Args:
        graph: of the algorithm.
        role: which.
        streamed: roles whose moments stay in host memory all the time.
    """
    if role in graph.trained_roles and role not in streamed:
        return {"parameters", "optimizer"}
    return {"parameters"}


def issued(
    graph: DataflowGraph, plan: ExecutionPlan, *, is_training: bool = True
) -> list[str]:
    """Call names in the order in which a step issues them.

    Those that run a step ahead come last, if they run beside what changes their role.
    Of no training is a pass in which everything is of its own step.

    Args:
        graph: of the algorithm.
        plan: allocations.
        is_training: False for a pass that changes no role.
    """
    names = graph.order()
    last = [name for name in names if is_training and is_beside(graph, plan, name)]
    return [name for name in names if name not in last] + last


def is_beside(graph: DataflowGraph, plan: ExecutionPlan, name: str) -> bool:
    """Whether a call runs a step ahead, apart from the devices that train its role.

    Args:
        graph: of the algorithm.
        plan: allocations.
        name: of the call.
    """
    node = graph.calls[name]
    if not node.staleness:
        return False
    changing = changing_call(graph, node.role)
    if changing is None:
        return True
    own = set(plan.calls[name].allocation.devices)
    return own.isdisjoint(plan.calls[changing].allocation.devices)


def changing_call(graph: DataflowGraph, role: str | None) -> str | None:
    """The call that changes a role; None where none does."""
    names = (n for n, c in graph.calls.items() if c.role == role and c.changes_role)
    return next(names, None)


def resting_on_host(
    graph: DataflowGraph, plan: ExecutionPlan, streamed: Collection[str] = ()
) -> frozenset[tuple[str, Part]]:
    """Parts of roles that are in host memory between steps.

    Those of a role whose last call offloads it.

    Args:
        graph: of the algorithm.
        plan: allocations.
        streamed: roles whose moments stay in host memory all the time.
    """
    last = {graph.calls[name].role: name for name in graph.order()}
    return frozenset(
        (role, part)
        for role in graph.roles
        if _offloads(plan, last[role])
        for part in parts_of(graph, role, streamed)
    )


def make_schedule(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    dtypes: Mapping[str, str],
    *,
    streamed: Collection[str] = (),
    is_training: bool = True,
    without: Collection[str] = (),
    fits: Callable[[Sequence[Step]], bool] | None = None,
    homes: Mapping[str, Place] | None = None,
    resting: Collection[tuple[str, Part]] | None = None,
) -> list[Step]:
    """The steps of one pass through the graph, in the order they are issued.

    It begins and ends with every role where it rests, so passes can follow each other.

    Args:
        graph: of the algorithm.
        plan: allocations.
        dtypes: of each role's computation.
        streamed: roles whose moments stay in host memory all the time.
        is_training: False for a pass that changes no role.
        without: calls that are left out.
        fits: tells whether a schedule fits the devices' memory. Copies are issued as
            early as it allows; with None, one call ahead.
        homes: where each role stays; None is where this graph would have it.
        resting: parts of roles that are in host memory between passes; the same.
    """
    if homes is None:
        homes = home_places(graph, plan, dtypes)
    if resting is None:
        resting = resting_on_host(graph, plan, streamed)
    walk = _Walk(
        graph,
        plan,
        dtypes,
        streamed,
        is_training,
        without=frozenset(without),
        homes=homes,
        resting=frozenset(resting),
    )
    return _issued_early(walk.steps, graph, is_training, fits)


class _Walk:
    """Goes through the calls in order and writes down what each needs."""

    def __init__(
        self, graph, plan, dtypes, streamed, is_training, *, without, homes, resting
    ):
        self.graph, self.plan, self.dtypes = graph, plan, dtypes
        self.is_training, self.streamed = is_training, streamed
        self.homes = homes
        self.order = [
            name
            for name in issued(graph, plan, is_training=is_training)
            if name not in without
            and (is_training or not graph.calls[name].is_following)
        ]
        everything: set[tuple[str, Part]] = {
            (role, part)
            for role in graph.roles
            for part in parts_of(graph, role, streamed)
        }
        self.at_rest = everything - resting
        self.on_device = set(self.at_rest)
        self.copies: set[tuple] = set()
        self.versions = dict.fromkeys(graph.roles, 0)
        self.steps: list[Step] = []
        for index, name in enumerate(self.order):
            self._copy_before(index, name)
            self._call(index, name)
        for role in graph.roles:
            self._offload(role, keep=self.at_rest)
            # One that a call before its last one offloads may still be on the host.
            for part in sorted(parts_of(graph, role, streamed)):
                if (role, part) in self.at_rest:
                    self._reload(role, part)

    def _copy_before(self, index: int, changing: str) -> None:
        """Copies for calls that still read a role as it is before a call changes it."""
        node = self.graph.calls[changing]
        for name in self.order[index + 1 :]:
            if not (node.changes_role and self.is_training):
                break
            other = self.graph.calls[name]
            if other.staleness and other.role == node.role:
                self._copy(name)

    def _copy(self, name: str) -> None:
        """A copy for a call elsewhere, unless it is there."""
        role = self.graph.calls[name].role
        place = place_of(self.graph, self.plan, self.dtypes, name)
        copy = (role, place.key)
        if place.key == self.homes[role].key or copy in self.copies:
            return
        self._reload(role, "parameters")
        self.steps.append(Move(role, place, self.versions[role]))
        self.copies.add(copy)

    def _call(self, index: int, name: str) -> None:
        node = self.graph.calls[name]
        role, later = node.role, self.order[index + 1 :]
        if role is None:
            self.steps.append(Run(name))
            return
        place = place_of(self.graph, self.plan, self.dtypes, name)
        is_home = place.key == self.homes[role].key
        # What the next call or a follower reads would come back at once.
        followers = [n for n in later if self.graph.calls[n].is_following]
        offloads = _offloads(self.plan, name) and not any(
            self._reads_home(reader, role) for reader in (*later[:1], *followers)
        )
        copy = (role, place.key)
        if is_home:
            for reader in (role, *_sources(node)):
                self._reload(reader, "parameters")
            if node.is_training and self.is_training and role not in self.streamed:
                self._reload(role, "optimizer")
        self._copy(name)
        if offloads and not is_home:
            self._offload(role)
        # One that runs a step ahead reads what its role was when the step began.
        version = 0 if node.staleness else self.versions[role]
        self.steps.append(Run(name, version))
        if node.changes_role and self.is_training:
            self.versions[role] += 1
        if not is_home and not any(self._place_key(n) == copy for n in later):
            self.steps.append(Release(role, place))
            self.copies.discard(copy)
        if offloads and is_home:
            self._offload(role)

    def _place_key(self, name: str) -> tuple | None:
        role = self.graph.calls[name].role
        if role is None:
            return None
        return role, place_of(self.graph, self.plan, self.dtypes, name).key

    def _reads_home(self, name: str, role: str) -> bool:
        node = self.graph.calls[name]
        if role in _sources(node):
            return True
        return self._place_key(name) == (role, self.homes[role].key)

    def _reload(self, role: str, part: Part) -> None:
        if (role, part) not in self.on_device:
            self.steps.append(Reload(role, part))
            self.on_device.add((role, part))

    def _offload(self, role: str, keep: Collection[tuple[str, Part]] = ()) -> None:
        for part in sorted(parts_of(self.graph, role, self.streamed)):
            if (role, part) in self.on_device and (role, part) not in keep:
                self.steps.append(Offload(role, part))
                self.on_device.discard((role, part))


def _issued_early(
    steps: Sequence[Step],
    graph: DataflowGraph,
    is_training: bool,
    fits: Callable[[Sequence[Step]], bool] | None,
) -> list[Step]:
    """Let copies pass the steps before them, one by one, while memory allows it.

    Copies do not pass each other: what is needed first is issued first. Where the
    memory is not known, a copy comes one call ahead, as in double buffering.
    """
    issued, start = list(steps), 0
    while start < len(issued):
        step, place, is_ahead = issued[start], start, False
        start += 1
        if not isinstance(step, Move | Reload):
            continue
        while place and not _must_follow(step, issued[place - 1], graph, is_training):
            moved = [*issued]
            moved[place - 1], moved[place] = moved[place], moved[place - 1]
            if is_ahead if fits is None else not fits(moved):
                break
            is_ahead = isinstance(issued[place - 1], Run)
            issued, place = moved, place - 1
        if fits and place and issued[place - 1] == _undone_by(step):
            # There is room for it all the time: it need not go at all.
            del issued[place - 1 : place + 1]
            start -= 2
    return issued


def _undone_by(step: Move | Reload) -> Offload | None:
    return Offload(step.role, step.part) if isinstance(step, Reload) else None


def _must_follow(
    step: Move | Reload, before: Step, graph: DataflowGraph, is_training: bool
) -> bool:
    """Whether a copy waits for the step before it."""
    match before:
        case Move() | Reload():
            return True
        case Run(name):
            node = graph.calls[name]
            return is_training and node.role == step.role and node.changes_role
        case Release(role, place):
            return isinstance(step, Move) and (role, place.key) == (
                step.role,
                step.place.key,
            )
        case Offload(role, part):
            wanted = step.part if isinstance(step, Reload) else "parameters"
            return (role, part) == (step.role, wanted)


def _sources(node) -> tuple[str, ...]:
    """Roles whose parameters a call reads besides its own."""
    return (node.function.source,) if isinstance(node.function, Follow) else ()


def _offloads(plan: ExecutionPlan, name: str) -> bool:
    return name in plan.calls and "offload" in plan.calls[name].allocation.options
