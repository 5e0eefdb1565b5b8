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

import numpy as np

from realjax.functions.function import LANGUAGE_OUTPUTS, Generate, Infer, Train
from realjax.parallel.allocation import Allocation
from realjax.planner.options import CallOptions
from realjax.planner.space import Space
from realjax.planner.strategies import AXES, Range
from realjax.planner.variants import best_variants


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

    What allocations leave open is chosen by `best_variants`. A plan that does not fit
    is tried again with fsdp in the place of data where calls train, then everywhere.

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
        self.num_devices = space.cluster.num_devices
        self.of_node = space.cluster.devices_per_node

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
            elif (
                isinstance(function, Infer) and function.output not in LANGUAGE_OUTPUTS
            ):
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
    found = best_variants(
        space,
        [
            [
                _nearest_options(options, wish[call])
                for call, options in zip(space.names, space.options, strict=True)
            ]
            for wish in (wanted, {**wanted, **trained}, cut)
        ],
    )
    # The first that fits; if none does, the one that takes least.
    fits, memory = found.fits, found.memory_bytes
    number = int(fits.argmax() if fits.any() else np.argmin(memory))
    notes = []
    for call, taken in space.chosen(found.plans[number]).items():
        wish = wanted[call]
        if (taken.strategy, taken.devices) != (wish.strategy, wish.devices):
            notes.append(f"{call} takes {taken}; the template wants {wish}")
    return Template(
        name=name,
        plan=found.plans[number],
        seconds=float(found.seconds[number]),
        memory_bytes=float(memory[number]),
        is_fitting=bool(fits[number]),
        notes=tuple(notes),
    )


def _with_fsdp(allocation: Allocation) -> Allocation:
    fsdp = allocation.fsdp * allocation.data
    return dataclasses.replace(allocation, data=1, fsdp=fsdp)


def _nearest_options(options: CallOptions, wanted: Allocation) -> list[int]:
    """Return the numbers of the options with the allocation nearest to one.

    Args:
        options: of the call.
        wanted: devices and strategy.
    """
    first, stop = wanted.devices[0], wanted.devices[-1] + 1

    def away(place: Range) -> tuple[bool, int, int]:
        """Order ranges: those around the wanted one first, the smallest before all."""
        is_around = place[0] <= first and stop <= place[0] + place[1]
        return not is_around, abs(place[1] - wanted.size), abs(place[0] - first)

    places = [place for place in options.places if options.shapes[place[1]]]
    numbers = options.numbers(min(places, key=away))
    nearest = min(
        (options[number].allocation for number in numbers),
        # Of those that are as near, the one with the fastest option: it comes first.
        key=lambda allocation: _distance(allocation, wanted),
    )
    return [n for n in numbers if options[n].allocation.strategy == nearest.strategy]


def _distance(allocation: Allocation, wanted: Allocation) -> float:
    """Count the doublings and halvings between two strategies."""
    return sum(
        abs(math.log2(getattr(allocation, axis) / getattr(wanted, axis)))
        for axis in AXES
    )
