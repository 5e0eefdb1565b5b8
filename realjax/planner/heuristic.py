"""Plans by rule of thumb: ReaL's two templates, for any graph, model and machine.

    "sequential"    every call on all devices, tensor over a node, stages over nodes
    "divided"       generation with much data parallelism on all devices, calls that
                    train beside each other on parts of them, and so for those that
                    infer values or scores; log-probabilities on all devices

The first is what ReaL's paper compares with; the second what its release takes where
nothing is searched. They go by the kinds of calls and know no algorithm. Where a call
cannot have what its template wants (stages while it generates, a strategy that does not
divide its model, devices that are no aligned range), it takes the nearest option, and
the template says so.

Sources: Mei et al., https://arxiv.org/abs/2406.14088, and the release of ReaL. There
the devices of two calls that train are in proportion to their models; here they are
halves, as ranges of devices are powers of two.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from realjax.functions.function import Generate, Infer, Train
from realjax.parallel.allocation import Allocation
from realjax.planner.simulate import price
from realjax.planner.space import Space
from realjax.planner.strategies import AXES, Range

_OTHER_DEVICES = 1000
"""Steps between strategies that other devices than those wanted count for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """A plan by rule of thumb.

    Attributes:
        name: "sequential" or "divided".
        plan: the number of each call's option.
        seconds: of a step, under the model.
        memory_bytes: the most on any device.
        is_fitting: whether that is no more than a device has.
        notes: which calls took something else than the template wants.
    """

    name: str
    plan: tuple[int, ...]
    seconds: float
    memory_bytes: float
    is_fitting: bool
    notes: tuple[str, ...]


def template_plan(space: Space) -> tuple[tuple[int, ...], float] | None:
    """Return the faster one of the templates that fit the memory; None if none does.

    Args:
        space: of all plans.

    Returns:
        The number of each call's option, and the seconds of a step.
    """
    fitting = [found for found in templates(space) if found.is_fitting]
    if not fitting:
        return None
    best = min(fitting, key=lambda found: found.seconds)
    return best.plan, best.seconds


def templates(space: Space) -> list[Template]:
    """Return both templates as plans.

    A plan that does not fit is tried again with the options of the same strategies that
    take the least memory, then with fsdp in the place of data where calls train, then
    everywhere.

    Args:
        space: of all plans.
    """
    machine = _Machine(space)
    wishes = {"sequential": machine.sequential(), "divided": machine.divided()}
    return [_nearest_plan(space, name, wish) for name, wish in wishes.items()]


class _Machine:
    """What templates want, by call."""

    def __init__(self, space: Space):
        self.space = space
        self.num_devices = max(
            option.allocation.devices[-1] + 1
            for options in space.options
            for option in options
        )
        self.of_node = min(int(space.problem.devices_per_node), self.num_devices)

    def sequential(self) -> dict[str, Allocation]:
        """Give every call all devices, tensor over a node and stages over nodes."""
        wanted = self._split((0, self.num_devices), tensor=self.of_node, data=1)
        return dict.fromkeys(self.space.names, wanted)

    def divided(self) -> dict[str, Allocation]:
        """Give each kind of call what suits it."""
        everywhere = (0, self.num_devices)
        calls, by_function = self.space.graph.calls, {}
        for name in self.space.names:
            function = calls[name].function
            if isinstance(function, Generate):
                kind = "generate"
            elif isinstance(function, Train):
                kind = "train"
            elif isinstance(function, Infer) and function.output != "logprobs":
                kind = "infer a number"
            else:
                kind = "other"
            by_function.setdefault(kind, []).append(name)
        num_nodes = self.num_devices // self.of_node
        stage = math.gcd(self.num_devices, max(2, num_nodes))
        wanted = Allocation(data=self.num_devices // stage, stage=stage)
        found = dict.fromkeys(by_function.get("generate", ()), wanted)
        for kind in ("train", "infer a number"):
            places = self._shared(by_function.get(kind, ()), everywhere)
            found |= {name: self._halved(place) for name, place in places.items()}
        everything = self._halved(everywhere)
        return {name: found.get(name, everything) for name in self.space.names}

    def _halved(self, place: Range) -> Allocation:
        """Return data 2, tensor over half a node or half the range, stages between."""
        tensor = max(1, min(place[1], self.of_node) // 2)
        return self._split(place, tensor=tensor, data=2)

    def _split(self, place: Range, *, tensor: int, data: int) -> Allocation:
        start, size = place
        data = min(data, size // tensor)
        tensor = math.gcd(tensor, size // data)
        devices = tuple(range(start, start + size))
        stage = size // (tensor * data)
        return Allocation(data=data, tensor=tensor, stage=stage, devices=devices)

    def _shared(self, names: Sequence[str], place: Range) -> dict[str, Range]:
        """Halve devices until each call has its own, the largest model alone first."""
        start, size = place
        if len(names) < 2 or size % 2:
            return dict.fromkeys(names, place)
        halves: list[list[str]] = [[], []]
        for name in sorted(names, key=self._weight, reverse=True):
            # The lighter half; the first of two that are equal.
            min(halves, key=lambda half: sum(map(self._weight, half))).append(name)
        found: dict[str, Range] = {}
        for index, half in enumerate(halves):
            found |= self._shared(half, (start + index * size // 2, size // 2))
        return found

    def _weight(self, name: str) -> int:
        """Return bytes of a call's parameters."""
        option = self.space.options[self.space.names.index(name)][0]
        return option.bytes.copy * option.allocation.size // option.allocation.data


def _nearest_plan(
    space: Space, name: str, wanted: Mapping[str, Allocation]
) -> Template:
    """Return the plan nearest to what a template wants that fits, or does not."""
    cut = {call: _with_fsdp(allocation) for call, allocation in wanted.items()}
    trained = {call: cut[call] for call in cut if space.graph.calls[call].is_training}
    tries = []
    for wish, is_small in (
        (wanted, False),
        (wanted, True),
        ({**wanted, **trained}, True),
        (cut, True),
    ):
        tries.append(
            [
                _nearest_option(space, index, wish[call], is_small=is_small)
                for index, call in enumerate(space.names)
            ]
        )
    found = price(space.problem, jnp.asarray(tries))
    fits = np.asarray(found.memory_bytes) <= float(space.problem.memory_bytes)
    # The first that fits; if none does, the one that takes least.
    number = int(fits.argmax() if fits.any() else np.argmin(found.memory_bytes))
    plan = tuple(tries[number])
    notes = []
    for call, taken in space.chosen(plan).items():
        wish = wanted[call]
        if (taken.strategy, taken.devices) != (wish.strategy, wish.devices):
            notes.append(f"{call} takes {taken}; the template wants {wish}")
    return Template(
        name=name,
        plan=plan,
        seconds=float(found.seconds[number]),
        memory_bytes=float(found.memory_bytes[number]),
        is_fitting=bool(fits[number]),
        notes=tuple(notes),
    )


def _with_fsdp(allocation: Allocation) -> Allocation:
    fsdp = allocation.fsdp * allocation.data
    return dataclasses.replace(allocation, data=1, fsdp=fsdp)


def _nearest_option(
    space: Space, index: int, wanted: Allocation, *, is_small: bool
) -> int:
    """Return the number of the option nearest to what is wanted; the fastest of those.

    Args:
        space: of all plans.
        index: of the call.
        wanted: devices and strategy.
        is_small: takes the one of least memory instead.
    """
    table = space.problem.options
    memory = np.asarray(table.static_bytes[index] + table.working_bytes[index])
    seconds = np.asarray(table.seconds[index])
    first, second = (memory, seconds) if is_small else (seconds, memory)
    options = space.options[index]
    return min(
        range(len(options)),
        key=lambda number: (
            _distance(options[number].allocation, wanted),
            *(first[number], second[number], number),
        ),
    )


def _distance(allocation: Allocation, wanted: Allocation) -> float:
    """Count doublings and halvings between two allocations; other devices are far."""
    away = float(
        sum(
            abs(math.log2(getattr(allocation, axis) / getattr(wanted, axis)))
            for axis in AXES
        )
    )
    if allocation.devices == wanted.devices:
        return away
    away += _OTHER_DEVICES * (1 + abs(math.log2(allocation.size / wanted.size)))
    # A range around the one that is wanted is nearer than any other.
    first, last = allocation.devices[0], allocation.devices[-1]
    is_around = first <= wanted.devices[0] and wanted.devices[-1] <= last
    return away if is_around else away + _OTHER_DEVICES
