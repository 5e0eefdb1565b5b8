"""The schedule of one step: calls, and the reallocations and offloads between them.

A role that is trained keeps its float32 masters where it is trained; a call elsewhere,
or in another type, gets a copy before it runs, dropped when the last call that needs
it has. A role that no call trains lives where its first call is, or in host memory
between its calls.

    Move policy → t4@0-3 bfloat16
    Run rollout
    Release policy t4@0-3
    …
"""

import dataclasses
from collections.abc import Collection, Mapping

from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan
from realjax.parallel.allocation import Allocation


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a copy of a role's parameters lies, and in which type."""

    allocation: Allocation
    dtype: str

    @property
    def key(self):
        """Equal for places where the same copy serves."""
        return self.allocation.layout_key, self.dtype

    def __str__(self):
        """As in the drawing above."""
        return f"{self.allocation} {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Move:
    """Reallocate a role's parameters from its home to a place."""

    role: str
    place: Place


@dataclasses.dataclass(frozen=True)
class Run:
    """Run a call."""

    call: str


@dataclasses.dataclass(frozen=True)
class Release:
    """Drop a role's copy at a place."""

    role: str
    place: Place


@dataclasses.dataclass(frozen=True)
class Reload:
    """Bring a role back from host memory to its home."""

    role: str


@dataclasses.dataclass(frozen=True)
class Offload:
    """Leave a role in host memory only."""

    role: str


Step = Move | Run | Release | Reload | Offload


def home_places(
    graph: DataflowGraph, plan: ExecutionPlan, dtypes: Mapping[str, str]
) -> dict[str, Place]:
    """Where each role's parameters stay between calls.

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
        training = [name for name in names if graph.calls[name].is_training]
        if len(training) > 1:
            raise ValueError(
                f"Calls {training} both train {role!r}; one call trains a role."
            )
        if training:
            homes[role] = Place(plan.calls[training[0]].allocation, "float32")
        else:
            homes[role] = Place(plan.calls[names[0]].allocation, dtypes[role])
    return homes


def place_of(
    graph: DataflowGraph, plan: ExecutionPlan, dtypes: Mapping[str, str], name: str
) -> Place:
    """Where call `name` needs its role's parameters."""
    node = graph.calls[name]
    assert node.role is not None
    dtype = "float32" if node.is_training else dtypes[node.role]
    return Place(plan.calls[name].allocation, dtype)


def make_schedule(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    dtypes: Mapping[str, str],
    *,
    offloaded: Collection[str] = (),
) -> list[Step]:
    """The steps of one pass through the graph, in the order they are issued.

    Args:
        graph: of the algorithm.
        plan: allocations.
        dtypes: of each role's computation.
        offloaded: roles that wait in host memory; none of them is trained.
    """
    homes = home_places(graph, plan, dtypes)
    order = graph.order()
    last_use: dict[tuple, str] = {}
    last_call: dict[str, str] = {}
    for name in order:
        role = graph.calls[name].role
        if role is not None:
            last_use[role, place_of(graph, plan, dtypes, name).key] = name
            last_call[role] = name
    steps: list[Step] = []
    present = {(role, home.key) for role, home in homes.items()}
    on_host = set(offloaded)
    for name in order:
        role = graph.calls[name].role
        if role is None:
            steps.append(Run(name))
            continue
        place = place_of(graph, plan, dtypes, name)
        if role in on_host:
            steps.append(Reload(role))
            on_host.discard(role)
        if (role, place.key) not in present:
            steps.append(Move(role, place))
            present.add((role, place.key))
        steps.append(Run(name))
        if last_use[role, place.key] == name and place.key != homes[role].key:
            steps.append(Release(role, place))
            present.discard((role, place.key))
        if role in offloaded and last_call[role] == name:
            steps.append(Offload(role))
    return steps
