"""How a tree goes in pieces: what each device sends at once, and what that becomes.

A parcel is a block of one array, or small blocks of several, packed. Arrays that need
few bytes for their parcels move together, and one that needs many moves in slabs:

    parcel_bytes    |-------|
    arrays          a b c  d           two groups: a, b, c together, then d alone
                    - - -  -----------
    moves           (a b c) (d0) (d1)  d in two slabs, by one program called twice
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from realjax.realloc import programs
from realjax.realloc.layouts import Box, Layout
from realjax.realloc.pieces import Arrivals, Cut, Join, Move, View
from realjax.realloc.programs import Output, Part, Slab, Table
from realjax.realloc.requests import Request

PACKED_BYTES = 1 << 20
"""Smaller blocks that go from one device to another share a parcel."""

MAX_STEPS = 256
"""The most slabs of one array: every step costs time in Python."""


Sizes = tuple[tuple[int, tuple[int, ...]], ...]
"""Arrays, and the sizes of their blocks: what parcels of one program have in common."""


class Parcel(NamedTuple):
    """What one device sends at once, to one or more others."""

    source: int
    items: tuple[tuple[int, Box], ...]  # (array, block)


class _Work(NamedTuple):
    """What devices that share a join have in common.

    Attributes:
        makes: The arrays that get new shards.
        kept: The blocks that are there already.
        came: The parcels that arrive.
    """

    makes: tuple[int, ...]
    kept: Sizes
    came: tuple[Sizes, ...]


def plan_moves(
    requests: Sequence[Request],
    *,
    parcel_bytes: int,
    is_shared: bool = False,
    is_donated: bool = False,
) -> tuple[Move, ...]:
    """Work out the moves of some arrays: groups of small ones, slabs of large ones.

    Args:
        requests: What to do with each array.
        parcel_bytes: What the buffers of one step may take, at their sources and at
            their destinations together.
        is_shared: Shards that stay as and where they are are not copied.
        is_donated: What arrays are averaged with is written in place.
    """
    permissions = is_shared, is_donated
    moves, group, size = [], [], 0

    def close() -> None:
        if group:
            moves.append(_Planner(requests, tuple(group), None, *permissions).move())
            group.clear()

    for leaf, request in enumerate(requests):
        needed = _buffer_bytes(request, is_in_slabs=False)
        if needed > parcel_bytes:
            # In slabs, everything that travels is packed and joined.
            all_bytes = _buffer_bytes(request, is_in_slabs=True)
            slab = _slab(request, -(-all_bytes // parcel_bytes))
            if slab is not None:
                moves.append(_Planner(requests, (leaf,), slab, *permissions).move())
                continue
        if size + needed > parcel_bytes:
            close()
            size = 0
        group.append(leaf)
        size += needed
    close()
    return tuple(moves)


def _buffer_bytes(request: Request, *, is_in_slabs: bool) -> int:
    """Count what is packed at sources, and received to be joined at destinations."""
    held = Layout.of(request.source).boxes(request.shape)
    wanted = Layout.of(request.destination).boxes(request.shape)
    is_cast = request.wire_dtype != request.dtype
    is_finished = request.wire_dtype == request.new_dtype and not request.is_mixed
    packed, received = set(), 0
    for source, destination, box in request.route.moves:
        if source == destination:
            continue
        if is_in_slabs or is_cast or box != held[source]:
            packed.add((source, box))
        if is_in_slabs or not is_finished or box != wanted[destination]:
            received += _num_elements(box)
    elements = sum(_num_elements(box) for _, box in packed) + received
    return elements * request.wire_dtype.itemsize


def _slab(request: Request, steps: int) -> Slab | None:
    """Choose the dimension whose pieces all divide into about so many slabs.

    An early dimension is preferred: its slabs are longer stretches of memory.
    """
    if steps <= 1 or not request.shape:
        return None
    steps = min(steps, MAX_STEPS)
    boxes = request.route.boxes
    common = np.gcd.reduce(boxes[..., 1] - boxes[..., 0], axis=0).tolist()
    best = None
    for axis, size in enumerate(common):
        divisors = [n for n in range(2, min(size, 2 * steps) + 1) if size % n == 0]
        if not divisors:
            continue
        found = min(divisors, key=lambda n: (n < steps, abs(n - steps)))
        slab = Slab(axis, found)
        if found >= steps:
            return slab
        if best is None or found > best.steps:
            best = slab
    return best


class _Planner:
    """Works out the steps of one group of arrays."""

    def __init__(
        self,
        requests: Sequence[Request],
        leaves: tuple[int, ...],
        slab: Slab | None,
        is_shared: bool,
        is_donated: bool,
    ):
        self.requests, self.leaves = requests, leaves
        self.slab, self.is_shared, self.is_donated = slab, is_shared, is_donated
        self.is_mixed = requests[leaves[0]].is_mixed
        self.held, self.wanted, self.places = {}, {}, {}
        devices: dict[int, Any] = {}
        for leaf in leaves:
            request = requests[leaf]
            layouts = Layout.of(request.source), Layout.of(request.destination)
            self.held[leaf], self.wanted[leaf] = (
                layout.boxes(request.shape) for layout in layouts
            )
            self.places[leaf] = [
                {device: place for place, device in enumerate(layout.devices)}
                for layout in layouts
            ]
            for sharding in (request.source, request.destination):
                devices.update((d.id, d) for d in sharding.device_set)
        # By id: a set has another order in every process, and a program whose devices
        # are in another order is not found in the compilation cache.
        self.devices = dict(sorted(devices.items()))
        self.order = {device: place for place, device in enumerate(self.devices)}
        # Of each device: the blocks it has already, and what it receives to be joined.
        self.own: dict[int, dict[int, Box]] = collections.defaultdict(dict)
        self.received: dict[int, list[Parcel]] = collections.defaultdict(list)
        for leaf in leaves:
            for source, destination, box in requests[leaf].route.moves:
                if source == destination:
                    self.own[destination][leaf] = box

    def move(self) -> Move:
        """Return the steps."""
        parcels = self._parcels()
        cuts, buffers = self._cuts(parcels)
        sends, homes, numbers = [], [], {}
        for parcel, destinations in parcels.items():
            for destination in destinations:
                numbers[parcel, destination] = len(sends)
                homes.append(SingleDeviceSharding(self.devices[destination]))
                if parcel in buffers:
                    sends.append((None, buffers[parcel]))
                else:
                    leaf = parcel.items[0][0]
                    sends.append((leaf, self.places[leaf][0][parcel.source]))
        whole, joins = self._joins(parcels, numbers)
        return Move(
            steps=self.slab.steps if self.slab else 1,
            cuts=cuts,
            sends=tuple(sends),
            homes=homes,
            whole=whole,
            joins=joins,
            stays=tuple(
                (leaf, device, place)
                for leaf in self.leaves
                for device, place in self.places[leaf][0].items()
                if self._stays(leaf, device)
            ),
            results=tuple(
                (
                    leaf,
                    self.requests[leaf].shape,
                    self.requests[leaf].destination,
                    tuple(self.places[leaf][1]),
                )
                for leaf in self.leaves
            ),
        )

    def _parcels(self) -> dict[Parcel, list[int]]:
        """What travels, and to which devices."""
        sent = collections.defaultdict(list)
        for leaf in self.leaves:
            request = self.requests[leaf]
            itemsize = request.wire_dtype.itemsize
            for source, destination, box in request.route.moves:
                if source != destination:
                    is_small = _num_elements(box) * itemsize < PACKED_BYTES
                    shared = request.wire_dtype if is_small else leaf
                    sent[source, destination, shared].append((leaf, box))
        parcels = collections.defaultdict(list)
        for (source, destination, _), items in sent.items():
            parcels[Parcel(source, tuple(items))].append(destination)
        return parcels

    def _stays(self, leaf: int, device: int) -> bool:
        """Tell whether a shard is shared instead of copied."""
        request = self.requests[leaf]
        return (
            self.is_shared
            and not request.is_mixed
            and request.dtype == request.new_dtype
            and self.wanted[leaf].get(device) == self.held[leaf].get(device)
        )

    def _is_shard(self, parcel: Parcel) -> bool:
        """Tell whether a parcel is a shard as it is."""
        if self.slab is not None or len(parcel.items) > 1:
            return False
        leaf, box = next(iter(parcel.items))
        request = self.requests[leaf]
        return (
            box == self.held[leaf][parcel.source]
            and request.wire_dtype == request.dtype
        )

    def _is_new_shard(self, parcel: Parcel, destination: int) -> bool:
        """Tell whether a parcel arrives as it shall be."""
        if self.slab is not None or len(parcel.items) > 1 or self.is_mixed:
            return False
        leaf, box = next(iter(parcel.items))
        request = self.requests[leaf]
        return (
            box == self.wanted[leaf][destination]
            and request.wire_dtype == request.new_dtype
        )

    def _cuts(
        self, parcels: dict[Parcel, list[int]]
    ) -> tuple[tuple[Cut, ...], dict[Parcel, int]]:
        """Group the devices that pack equal sizes; number what they pack."""
        by_source = collections.defaultdict(list)
        for parcel in parcels:
            if not self._is_shard(parcel):
                by_source[parcel.source].append(parcel)
        groups = collections.defaultdict(list)
        for source, own in by_source.items():
            own.sort(key=lambda parcel: (_sizes(parcel), parcel.items))
            groups[tuple(map(_sizes, own))].append(source)
        cuts, buffers, first = [], {}, 0
        for signature, devices in groups.items():
            devices.sort(key=self.order.__getitem__)
            mesh = self._mesh(devices)
            leaves = sorted({leaf for sizes in signature for leaf, _ in sizes})
            views = tuple(self._view(mesh, devices, leaf, 0) for leaf in leaves)
            outputs = tuple(
                Output(
                    sizes[0][1],
                    self.requests[sizes[0][0]].wire_dtype,
                    tuple(
                        Part(leaves.index(leaf), size, None, True, self.slab)
                        for leaf, size in sizes
                    ),
                )
                for sizes in signature
            )
            table = tuple(
                programs.start_numbers(
                    [
                        _corner(box, self.held[leaf][device])
                        for parcel in by_source[device]
                        for leaf, box in parcel.items
                    ]
                )
                for device in devices
            )
            ndims = tuple(len(view.shape) for view in views)
            function = programs.cut_program(mesh, ndims, outputs, table)
            cuts.append(Cut(function, mesh, views))
            for place, device in enumerate(devices):
                for number, parcel in enumerate(by_source[device]):
                    buffers[parcel] = first + number * len(devices) + place
            first += len(signature) * len(devices)
        return tuple(cuts), buffers

    def _joins(
        self,
        parcels: dict[Parcel, list[int]],
        numbers: dict[tuple[Parcel, int], int],
    ) -> tuple[dict[tuple[int, int], int], tuple[Join, ...]]:
        """Tell new shards that are parcels from those to be made; group the latter."""
        whole: dict[tuple[int, int], int] = {}
        for parcel, destinations in parcels.items():
            for destination in destinations:
                if self._is_new_shard(parcel, destination):
                    leaf = parcel.items[0][0]
                    whole[leaf, destination] = numbers[parcel, destination]
                else:
                    self.received[destination].append(parcel)
        groups: dict[_Work, list[int]] = collections.defaultdict(list)
        for device in self.devices:
            makes = tuple(
                leaf
                for leaf in self.leaves
                if device in self.wanted[leaf]
                and (leaf, device) not in whole
                and not self._stays(leaf, device)
            )
            if makes:
                received = self.received[device]
                received.sort(key=lambda parcel: (_sizes(parcel), parcel))
                kept = self.own[device]
                work = _Work(
                    makes,
                    tuple((leaf, _size(kept[leaf])) for leaf in makes if leaf in kept),
                    tuple(map(_sizes, received)),
                )
                groups[work].append(device)
        return whole, tuple(
            self._join(work, devices, numbers) for work, devices in groups.items()
        )

    def _join(
        self, work: _Work, devices: list[int], numbers: dict[tuple[Parcel, int], int]
    ) -> Join:
        mesh = self._mesh(devices)
        outputs, table = self._outputs(work, devices)
        views = tuple(self._view(mesh, devices, leaf, 0) for leaf, _ in work.kept)
        arrivals = []
        for number, sizes in enumerate(work.came):
            shape = self._parcel_shape(sizes)
            arrivals.append(
                Arrivals(
                    tuple(numbers[self.received[d][number], d] for d in devices),
                    programs.seen_as_one(mesh, shape),
                    programs.over(mesh, len(shape)),
                )
            )
        ndims = tuple(len(view.shape) for view in views)
        ndims += tuple(len(arrival.shape) for arrival in arrivals)
        # What is averaged with is copied before it is written, unless it is given away.
        is_given = self.is_mixed and self.is_donated
        begin = None
        if self.slab is not None and not is_given:
            shapes = tuple((output.shape, output.dtype) for output in outputs)
            begin = programs.begin_program(mesh, shapes, is_copy=self.is_mixed)
        function = programs.join_program(
            mesh,
            ndims,
            outputs,
            table,
            is_written=self.is_mixed or self.slab is not None,
            is_donated=is_given or self.slab is not None,
        )
        targets = work.makes if self.is_mixed else ()
        return Join(
            function=function,
            begin=begin,
            mesh=mesh,
            shards=views,
            received=tuple(arrivals),
            targets=tuple(self._view(mesh, devices, leaf, 1) for leaf in targets),
            makes=work.makes,
            devices=tuple(devices),
        )

    def _outputs(
        self, work: _Work, devices: list[int]
    ) -> tuple[tuple[Output, ...], Table]:
        """The new shards of a join, and where each device reads and writes blocks."""
        parts: dict[int, list[Part]] = {leaf: [] for leaf in work.makes}
        starts: dict[int, list[list]] = {
            leaf: [[] for _ in devices] for leaf in work.makes
        }
        for number, (leaf, size) in enumerate(work.kept):
            parts[leaf].append(Part(number, size, None, True, self.slab))
            for row, device in zip(starts[leaf], devices, strict=True):
                box = self.own[device][leaf]
                row.append(_corner(box, self.held[leaf][device]))
                row.append(_corner(box, self.wanted[leaf][device]))
        for number, sizes in enumerate(work.came):
            offset = 0
            for item, (leaf, size) in enumerate(sizes):
                at = offset if len(sizes) > 1 else None
                place = len(work.kept) + number
                parts[leaf].append(Part(place, size, at, False, self.slab))
                offset += math.prod(size)
                for row, device in zip(starts[leaf], devices, strict=True):
                    box = self.received[device][number].items[item][1]
                    row.append(_corner(box, self.wanted[leaf][device]))
        outputs = tuple(
            Output(
                _size(self.wanted[leaf][devices[0]]),
                self.requests[leaf].new_dtype,
                tuple(parts[leaf]),
            )
            for leaf in work.makes
        )
        table = tuple(
            programs.start_numbers(
                [start for leaf in work.makes for start in starts[leaf][place]]
            )
            for place in range(len(devices))
        )
        return outputs, table

    def _mesh(self, devices: Sequence[int]) -> Mesh:
        return Mesh(np.array([self.devices[d] for d in devices]), (programs.AXIS,))

    def _view(self, mesh: Mesh, devices: Sequence[int], leaf: int, side: int) -> View:
        """See the shards an array has (side 0) or shall have (1) as one array."""
        boxes = (self.held, self.wanted)[side][leaf]
        size = _size(boxes[devices[0]])
        return View(
            leaf=leaf,
            places=tuple(self.places[leaf][side][device] for device in devices),
            shape=programs.seen_as_one(mesh, size),
            sharding=programs.over(mesh, len(size)),
        )

    def _parcel_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape of one step's parcel."""
        if len(sizes) > 1:
            return (sum(math.prod(size) for _, size in sizes),)
        return Part(0, next(iter(sizes))[1], None, False, self.slab).slab_size


def _sizes(parcel: Parcel) -> Sizes:
    """What parcels of one program have in common: arrays, and sizes of blocks."""
    return tuple((leaf, _size(box)) for leaf, box in parcel.items)


def _corner(box: Box, outer: Box) -> tuple[int, ...]:
    """Count where a box begins from the corner of the one around it."""
    return tuple(low - start for (low, _), (start, _) in zip(box, outer, strict=True))


def _size(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _num_elements(box: Box) -> int:
    return math.prod(_size(box))
