"""What each call of a plan may choose: devices, strategy, and how it saves memory.

    8 devices, one call      on all    d8 · f8, 4 rows · f8, 16 rows · t8 · …    shapes
                             on 0-3    d4 · f4, 8 rows · …
                             on 4-7    the same

A shape is an allocation on the first devices of a cluster with its rows of a
microbatch, what it computes anew, and whether its role waits in host memory. A range of
devices is as good as any other of its size, so shapes are priced once for each size.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from realjax.dataflow.graph import DataflowGraph, ModelFunctionCall
from realjax.dataflow.plan import MOST_SLOTS, CallPlan, ExecutionPlan
from realjax.functions.function import Follow, Generate, Infer, Train
from realjax.functions.role import Role
from realjax.models.transformer import REMATS
from realjax.parallel.allocation import Allocation
from realjax.parallel.pipeline import num_pieces
from realjax.planner.cluster import Cluster
from realjax.planner.cost import CallWork, Coefficients, Quantities, quantities
from realjax.planner.memory import CallBytes, Work, call_bytes
from realjax.planner.strategies import Range, Rules, strategies

FEWEST_SLOTS = 16
"""Completions of a row shard that are decoded at the same time, at least: with fewer,
weights are read for almost nothing."""


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
class Wish:
    """What is settled of a call before the search, beside its allocation.

    Attributes:
        rows, remat: as of `CallPlan`; 0 and "" leave them open.
        pages, kv_dtype, weights: as of `CallPlan`.
    """

    rows: int = 0
    pages: int = 0
    kv_dtype: str = ""
    weights: str = ""
    remat: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """What one call may choose, and what that takes.

    Attributes:
        plan: allocation, rows of a microbatch and what is computed anew.
        is_offloaded: whether what the role keeps waits in host memory, of the call
            where that lives.
        quantities: what the call takes of its devices.
        seconds: of the call.
        bytes: on each device.
        static_bytes: held at all times because of it.
        working_bytes: held while it runs.
        alone_bytes: the most that it needs, whatever the others do.
        parked_bytes: of parameters that come back from the host for copies.
        reload_seconds, offload_seconds: from and to the host, of the call itself.
    """

    plan: CallPlan
    is_offloaded: bool
    quantities: Quantities
    seconds: float
    bytes: CallBytes
    static_bytes: int
    working_bytes: int
    alone_bytes: int
    parked_bytes: int = 0
    reload_seconds: float = 0.0
    offload_seconds: float = 0.0

    @property
    def allocation(self) -> Allocation:
        """Devices and strategy."""
        return self.plan.allocation

    @property
    def _costs(self) -> tuple[float, ...]:
        """What is the better the less it is, for options that lie alike."""
        host = self.reload_seconds + self.offload_seconds
        return (self.seconds, self.static_bytes, self.working_bytes, host)

    def on(self, place: Range) -> "Option":
        """Return the same on another range of devices."""
        start, size = place
        if start == self.allocation.devices[0]:
            return self
        devices = tuple(range(start, start + size))
        allocation = dataclasses.replace(self.allocation, devices=devices)
        plan = dataclasses.replace(self.plan, allocation=allocation)
        return dataclasses.replace(self, plan=plan)


@dataclasses.dataclass(frozen=True, eq=False)
class CallOptions(Sequence[Option]):
    """The options of a call: of every range of devices, every shape of its size.

    Attributes:
        places: ranges, the largest first.
        shapes: options on the first devices, by how many those are.
    """

    places: tuple[Range, ...]
    shapes: Mapping[int, tuple[Option, ...]]

    @functools.cached_property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """Size of ranges, its first range's index and its first option's number."""
        found, number = [], 0
        indexed = enumerate(self.places)
        for size, of_size in itertools.groupby(indexed, key=lambda pair: pair[1][1]):
            group = list(of_size)
            found.append((size, group[0][0], number))
            number += len(group) * len(self.shapes[size])
        return tuple(found)

    @functools.cached_property
    def _length(self) -> int:
        return sum(len(self.shapes[size]) for _, size in self.places)

    def __len__(self) -> int:
        """How many options there are."""
        return self._length

    def __getitem__(self, number: int) -> Option:  # pyright: ignore[reportIncompatibleMethodOverride]: no slices
        """Return an option by its number."""
        if not 0 <= number < len(self):
            raise IndexError(f"There is no option {number} of {len(self)}.")
        firsts = [first for _, _, first in self.sizes]
        # The last of those that begin here: others are empty.
        size, place, first = self.sizes[bisect.bisect_right(firsts, number) - 1]
        index, shape = divmod(number - first, len(self.shapes[size]))
        return self.shapes[size][shape].on(self.places[place + index])

    @functools.cached_property
    def different(self) -> tuple[Option, ...]:
        """All shapes, in the order of their sizes' ranges."""
        return tuple(o for size, _, _ in self.sizes for o in self.shapes[size])

    def least(self, value: Callable[[Option], float]) -> int:
        """Return the number of the first option with the least of some value.

        Args:
            value: of an option, the same on all ranges of a size.
        """
        values = np.array([value(option) for option in self.different])
        return int(np.argmax(self.columns() == np.argmin(values)))

    def columns(self) -> np.ndarray:
        """Return for every option which of the different shapes it has."""
        parts, before = [np.zeros(0, np.int32)], 0
        for size, of_size in itertools.groupby(self.places, key=lambda place: place[1]):
            count = len(self.shapes[size])
            numbers = np.arange(before, before + count, dtype=np.int32)
            parts.append(np.tile(numbers, len(list(of_size))))
            before += count
        return np.concatenate(parts)

    def starts(self) -> np.ndarray:
        """Return the first device of every option."""
        counts = [len(self.shapes[size]) for _, size in self.places]
        return np.repeat(np.array([s for s, _ in self.places], np.int32), counts)

    def numbers(self, place: Range) -> range:
        """Return the numbers of a range's options; none where it has none."""
        for size, index, first in self.sizes:
            if size == place[1] and place in self.places:
                count = len(self.shapes[size])
                first += (self.places.index(place) - index) * count
                return range(first, first + count)
        return range(0)


class Shapes:
    """Makes the options of calls on the first devices of a cluster."""

    def __init__(
        self,
        graph: DataflowGraph,
        roles: Mapping[str, Role],
        work: Work,
        lengths: Lengths,
        cluster: Cluster,
        coefficients: Coefficients,
        *,
        microbatch_tokens: int,
        rules: Rules,
        wishes: Mapping[str, Wish],
    ):
        """Prices nothing yet; see `space.make_space` for the arguments."""
        self.graph, self.roles, self.work, self.lengths = graph, roles, work, lengths
        self.cluster, self.coefficients = cluster, coefficients
        self.microbatch_tokens, self.rules = microbatch_tokens, rules
        self.wishes = wishes

    def of_size(
        self, name: str, size: int, num_rows: int, *, is_home: bool
    ) -> list[Option]:
        """Return what a call may choose on so many devices, if it fits or not.

        Args:
            name: of the call.
            size: devices.
            num_rows: sequences it has.
            is_home: whether its role's parameters live where it runs.
        """
        node = self.graph.calls[name]
        found = []
        for allocation in strategies(
            size,
            self.roles[_role_of(node)].model,
            self.cluster,
            num_rows=num_rows,
            is_generating=isinstance(node.function, Generate),
            rules=self.rules,
        ):
            found += self.of_allocation(name, allocation, num_rows, is_home=is_home)
        return found

    def of_allocation(
        self, name: str, allocation: Allocation, num_rows: int, *, is_home: bool
    ) -> list[Option]:
        """Return what a call may choose on an allocation; see `of_size`."""
        node, wish = self.graph.calls[name], self.wishes.get(name, Wish())
        role = self.roles[_role_of(node)]
        if "offload" in allocation.options:
            config = dataclasses.replace(role.config, offload=True)
            role = dataclasses.replace(role, config=config)
            options = allocation.options - {"offload"}
            allocation = dataclasses.replace(allocation, options=options)
        return _undominated(
            [
                option
                for rows in self._rows(node, allocation, num_rows, wish)
                for remat in self._remats(node, role, wish)
                for option in self._priced(
                    name, role, allocation, rows, remat, num_rows, is_home
                )
            ]
        )

    def _rows(self, node, allocation: Allocation, num_rows: int, wish: Wish):
        """Give rows of a microbatch, or completions decoded at the same time."""
        if wish.rows or not self.rules.varies or isinstance(node.function, Follow):
            return [wish.rows]
        shards = allocation.num_row_shards
        is_training = isinstance(node.function, Train)
        if is_training:
            num_rows = max(1, num_rows // node.function.minibatches)
        most = -(-num_rows // shards)
        if isinstance(node.function, Generate):
            most = min(most, MOST_SLOTS)
            least = min(FEWEST_SLOTS, most)
        else:
            least = 1
        powers = itertools.takewhile(
            lambda rows: rows < most, (least * 2**k for k in itertools.count())
        )
        return [shards * rows for rows in (*powers, most)]

    def _remats(self, node, role: Role, wish: Wish) -> list[str]:
        if not isinstance(node.function, Train):
            return [""]
        if role.config.remat or wish.remat or not self.rules.varies:
            return [wish.remat]
        return [remat for remat in REMATS if remat != "offload"]

    def _priced(
        self,
        name: str,
        role: Role,
        allocation: Allocation,
        rows: int,
        remat: str,
        num_rows: int,
        is_home: bool,
    ) -> Iterator[Option]:
        """Price one choice; where the role lives here, also with it in host memory."""
        node, wish = self.graph.calls[name], self.wishes.get(name, Wish())
        call = CallPlan(
            allocation=allocation,
            rows=rows,
            pages=wish.pages,
            kv_dtype=wish.kv_dtype,
            weights=wish.weights,
            remat=remat,
        )
        plan = ExecutionPlan(
            graph=self.graph,
            calls={name: call},
            microbatch_tokens=self.microbatch_tokens,
        )
        taken = call_bytes(self.graph, plan, name, self.roles, num_rows, self.work)
        needs = self._quantities(name, plan, taken, num_rows)
        static, working = taken.pool + taken.batch, taken.working
        common = {
            "plan": call,
            "quantities": needs,
            "seconds": self.coefficients.seconds(needs),
            "bytes": taken,
        }
        if not is_home:
            yield Option(
                is_offloaded=False,
                # Also where it is the home's own, which is known of whole plans only.
                static_bytes=static + taken.base,
                working_bytes=working,
                alone_bytes=static + working + taken.copy + taken.base,
                **common,
            )
            return
        kept = taken.masters if node.changes_role else taken.copy + taken.base
        common["alone_bytes"] = static + working + kept
        is_open = self.rules.varies and self.rules.offloads
        choices = (True,) if role.config.offload else (False, True)[: 1 + is_open]
        for is_offloaded in choices:
            if not is_offloaded:
                yield Option(
                    is_offloaded=False,
                    static_bytes=static + kept,
                    working_bytes=working,
                    **common,
                )
                continue
            host = self.coefficients.host / self.cluster.device.host_bytes_per_second
            parameters = taken.parameters if node.changes_role else kept
            yield Option(
                is_offloaded=True,
                static_bytes=static,
                working_bytes=working + kept,
                parked_bytes=parameters,
                reload_seconds=host * kept,
                offload_seconds=host * kept if node.changes_role else 0.0,
                **common,
            )

    def _quantities(
        self, name: str, plan: ExecutionPlan, taken: CallBytes, num_rows: int
    ) -> Quantities:
        """Return what a call takes of its devices."""
        node, call = self.graph.calls[name], plan.calls[name]
        role, allocation = self.roles[_role_of(node)], call.allocation
        shards = allocation.num_row_shards
        work: dict[str, Any] = {
            "model": role.model,
            "num_rows": num_rows,
            "prompt_tokens": self.lengths.prompt_tokens,
            "new_tokens": self.lengths.new_tokens,
            "most_new_tokens": self.lengths.most_new_tokens,
            "itemsize": jnp.dtype(role.dtype).itemsize,
        }
        if isinstance(node.function, Follow):
            # Both parameters are read, and one is written.
            seconds = 3 * taken.masters / self.cluster.device.bytes_per_second
            return Quantities(memory=seconds, programs=1.0)
        if isinstance(node.function, Generate):
            settings = plan.rollout_settings(name, num_rows=num_rows)
            shape = CallWork(kind="generate", slots=settings.slots // shards, **work)
            return quantities(shape, allocation, self.cluster)
        rows = plan.num_rows(name, max_rows=num_rows, row_length=self.work.width)
        packed: dict[str, Any] = {
            "microbatch_tokens": rows // shards * self.work.width,
            "pieces": num_pieces(rows, shards, allocation.stage),
        }
        match node.function:
            case Infer():
                shape = CallWork(kind="infer", **work, **packed)
            case Train() as train:
                shape = CallWork(
                    kind="train",
                    num_updates=train.minibatches,
                    num_epochs=train.epochs,
                    remat=role.remat(call.remat),
                    **work,
                    **packed,
                )
            case _:
                raise TypeError(
                    f"Call {name!r} has a role and the function"
                    f" {type(node.function).__name__}, which the planner does not know."
                    " It knows Generate, Infer, Train and Follow."
                )
        return quantities(shape, allocation, self.cluster)


def _role_of(node: ModelFunctionCall) -> str:
    assert node.role is not None  # Others have no allocation of their own.
    return node.role


def _undominated(options: Sequence[Option]) -> list[Option]:
    """Leave out what another one beats in every respect.

    They lie alike, so that copies take the same: the step of a plan can only be shorter
    with the better one, and it fits wherever the other does.
    """
    costs = np.array([option._costs for option in options])
    is_no_more = (costs[:, None] <= costs[None]).all(2)
    is_less = (costs[:, None] < costs[None]).any(2)
    # Of equal ones the first stays.
    first = np.arange(len(options))[:, None] < np.arange(len(options))
    is_beaten = (is_no_more & (is_less | first)).any(0)
    return [o for o, beaten in zip(options, is_beaten, strict=True) if not beaten]
