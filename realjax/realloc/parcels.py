"""Parcels: what a device sends to the same others at once, over several processes.

    process 0                     process 1
    device 0   pack ──across──> device 4 ──within──> device 5   one parcel, relayed
                └───within──> device 1                           and given at home

All pieces that a device has for the same devices, in one type, are one parcel. It
crosses once to every process that needs it, to one device there, which gives it to its
neighbours; `hops` chooses who. Then every destination device joins what came with what
it held. Here is worked out, for this process and one chunk of a tree, what is packed,
sent and joined (`Steps`); `crossing` does it.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from pallas_kernels.interval_copy import Block, pack, unpack
from realjax.core.arrays import Array
from realjax.realloc.hops import ON_DEVICE
from realjax.realloc.layouts import Box, Layout
from realjax.realloc.processes import (
    home,
    hosts,
    is_counted_by_all,
    is_ours,
    process_of,
)
from realjax.realloc.requests import Request
from realjax.realloc.routes import Route, route

Targets = tuple[tuple[int, tuple[int, ...]], ...]
"""Where a parcel goes: (device, the devices it is relayed to from there)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Portion:
    """A part of one array that is moved at a time: all, or a share of every piece.

    Attributes:
        leaf: Which array.
        part: Which share.
        num_parts: Of so many.
    """

    leaf: int
    part: int = 0
    num_parts: int = 1

    def of(self, box: Box) -> Box | None:
        """Return the share of a piece, cut along its longest dimension, if any."""
        if self.num_parts == 1:
            return box
        sizes = [stop - start for start, stop in box]
        axis = int(np.argmax(sizes))
        start = box[axis][0] + sizes[axis] * self.part // self.num_parts
        stop = box[axis][0] + sizes[axis] * (self.part + 1) // self.num_parts
        if start == stop:
            return None
        return (*box[:axis], (start, stop), *box[axis + 1 :])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parcel:
    """Pieces of one type that go from one device to the same others.

    Attributes:
        source: The device they come from.
        dtype: They travel as.
        targets: Where they go.
        pieces: (array, box) of each.
        is_shard: It is a shard as it lies there, and needs no packing.
    """

    source: int
    dtype: np.dtype
    targets: Targets
    pieces: tuple[tuple[int, Box], ...]
    is_shard: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """A single piece keeps its shape; several lie flat."""
        if len(self.pieces) == 1:
            return _size(self.pieces[0][1])
        return (sum(int(np.prod(_size(box))) for _, box in self.pieces),)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each piece begins in the flat parcel."""
        sizes = [int(np.prod(_size(box))) for _, box in self.pieces]
        return tuple(np.cumsum([0, *sizes[:-1]]).tolist())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A compiled function of one device of this process.

    Attributes:
        device: Its id.
        function: Takes shards, and for a join parcels and unfinished new shards.
        leaves: The arrays whose shards on the device it takes.
        parcels: The numbers of the parcels it makes, or takes.
        makes: The arrays whose new shards it makes.
        continues: Those of them that are written into: an earlier chunk began them,
            or the target of an average is given up.
        averages: Those of them that begin as an average with a target that is kept.
    """

    device: int
    function: Callable[..., list[Array]]
    leaves: tuple[int, ...]
    parcels: tuple[int, ...]
    makes: tuple[int, ...] = ()
    continues: tuple[int, ...] = ()
    averages: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """What this process does for one chunk.

    Attributes:
        parcels: Those that it sends, gets or, where all must, only counts.
        shards: (parcel, array) of the parcels that are shards of this process.
        packs: What source devices pack.
        links: (source, destination, parcels) across processes, sorted.
        copies: (parcel, source, destination) within this process.
        whole: (array, device, parcel) of new shards that are a parcel as it came.
        joins: What destination devices make.
    """

    parcels: tuple[Parcel, ...]
    shards: tuple[tuple[int, int], ...]
    packs: tuple[Call, ...]
    links: tuple[tuple[int, int, tuple[int, ...]], ...]
    copies: tuple[tuple[int, int, int], ...]
    whole: tuple[tuple[int, int, int], ...]
    joins: tuple[Call, ...]


@functools.lru_cache(maxsize=512)
def plan_chunks(
    requests: tuple[Request, ...], chunk_bytes: int, is_donated: bool
) -> tuple[Steps, ...]:
    """Work out the steps of this process, chunk by chunk; kept.

    Args:
        requests: What to do with each array; the same in every process.
        chunk_bytes: About how much of them is on its way at once.
        is_donated: What arrays are averaged with is written in place.
    """
    chunks: list[list[Portion]] = []
    size = 0
    for leaf, request in enumerate(requests):
        num_parts = -(-request.wire_bytes // max(chunk_bytes, 1)) or 1
        # A part has a share of every piece, so no more parts than a piece is long.
        num_parts = min(num_parts, _longest_side(request))
        if num_parts > 1:
            parts = [
                Portion(leaf=leaf, part=part, num_parts=num_parts)
                for part in range(num_parts)
            ]
            chunks += [[part] for part in parts]
            size = chunk_bytes
        elif chunks and size + request.wire_bytes <= chunk_bytes:
            chunks[-1].append(Portion(leaf=leaf))
            size += request.wire_bytes
        else:
            chunks.append([Portion(leaf=leaf)])
            size = request.wire_bytes
    return tuple(_Planner(requests, chunk, is_donated).steps() for chunk in chunks)


def _longest_side(request: Request) -> int:
    """Return the length of the shortest piece along its longest dimension."""
    boxes = route_between(request).boxes
    if not boxes.size:
        return 1
    return int((boxes[..., 1] - boxes[..., 0]).max(axis=1).min())


class _Planner:
    """Works out the steps of this process for one chunk."""

    def __init__(
        self,
        requests: tuple[Request, ...],
        portions: Sequence[Portion],
        is_donated: bool,
    ):
        self.requests, self.portions = requests, portions
        self.is_donated = is_donated
        self.parcels: list[Parcel] = []
        # What comes to each new shard: boxes from its own device, and parcels.
        self.stays: dict[tuple[int, int], list[Box]] = collections.defaultdict(list)
        self.arrives: dict[tuple[int, int], list[tuple[int, int]]] = (
            collections.defaultdict(list)
        )

    def steps(self) -> Steps:
        """Sort pieces into parcels, and say what is done with each."""
        self._make_parcels()
        shards, packs = self._packs()
        links: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        copies: list[tuple[int, int, int]] = []
        for number, parcel in enumerate(self.parcels):
            for device, relays in parcel.targets:
                if process_of(device) != process_of(parcel.source):
                    links[parcel.source, device].append(number)
                elif is_ours(device):
                    copies.append((number, parcel.source, device))
                if is_ours(device):
                    copies += [(number, device, relay) for relay in relays]
        whole, joins = self._joins()
        return Steps(
            parcels=tuple(self.parcels),
            shards=shards,
            packs=packs,
            links=tuple((*link, tuple(links[link])) for link in sorted(links)),
            copies=tuple(copies),
            whole=whole,
            joins=joins,
        )

    def _make_parcels(self) -> None:
        groups: dict[Any, list[tuple[int, Box]]] = {}
        for portion in self.portions:
            request = self.requests[portion.leaf]
            found = route_between(request)
            held = Layout.of(request.source).boxes(request.shape)
            wanted = Layout.of(request.destination).boxes(request.shape)
            for source, piece, targets in _ways(found):
                box = portion.of(found.box(piece))
                if box is None:
                    continue
                if targets is None:
                    self.stays[portion.leaf, source].append(box)
                    continue
                # A shard that travels or arrives as it is needs no packing or joining.
                is_whole = box in (held[source], wanted[targets[0][0]])
                alone = (portion.leaf, box) if is_whole else None
                group = (source, request.wire_dtype, targets, alone)
                groups.setdefault(group, []).append((portion.leaf, box))
        for (source, dtype, targets, _), pieces in groups.items():
            leaf, box = pieces[0]
            request = self.requests[leaf]
            held = Layout.of(request.source).boxes(request.shape)[source]
            is_shard = len(pieces) == 1 and box == held and request.dtype == dtype
            parcel = Parcel(
                source=source,
                dtype=dtype,
                targets=targets,
                pieces=tuple(pieces),
                is_shard=is_shard,
            )
            for device, relays in targets:
                for destination in (device, *relays):
                    for place, (leaf, _) in enumerate(pieces):
                        came = (len(self.parcels), place)
                        self.arrives[leaf, destination].append(came)
            self.parcels.append(parcel)

    def _packs(self) -> tuple[tuple[tuple[int, int], ...], tuple[Call, ...]]:
        shards, packing = [], collections.defaultdict(list)
        for number, parcel in enumerate(self.parcels):
            if not is_ours(parcel.source):
                continue
            if parcel.is_shard:
                shards.append((number, parcel.pieces[0][0]))
            else:
                packing[parcel.source].append(number)
        return tuple(shards), tuple(
            self._pack(device, numbers) for device, numbers in packing.items()
        )

    def _pack(self, device: int, numbers: list[int]) -> Call:
        """Cut what one source device sends, narrowed where it travels narrower."""
        parcels = [self.parcels[number] for number in numbers]
        leaves = tuple(dict.fromkeys(leaf for p in parcels for leaf, _ in p.pieces))
        packed = tuple(
            (
                tuple(
                    _slice_of(leaves.index(leaf), box, self._held(leaf, device))
                    for leaf, box in parcel.pieces
                ),
                parcel.dtype,
            )
            for parcel in parcels
        )

        def pack_all(shards: list[Array]) -> list[Array]:
            return [pack(shards, blocks, dtype=dtype) for blocks, dtype in packed]

        return Call(
            device=device,
            function=jax.jit(pack_all, out_shardings=home(device)),
            leaves=leaves,
            parcels=tuple(numbers),
        )

    def _joins(self) -> tuple[tuple[tuple[int, int, int], ...], tuple[Call, ...]]:
        """Tell the new shards that are a parcel as it came from those to be made."""
        whole, making = [], collections.defaultdict(list)
        for portion in self.portions:
            request = self.requests[portion.leaf]
            is_changed = request.wire_dtype != request.new_dtype or request.is_mixed
            for device in Layout.of(request.destination).devices:
                if not is_ours(device):
                    continue
                came = self.arrives.get((portion.leaf, device), [])
                is_alone = len(came) == 1 and not self.stays[portion.leaf, device]
                number = came[0][0] if came else 0
                if (
                    is_alone
                    and not is_changed
                    and portion.num_parts == 1
                    and len(self.parcels[number].pieces) == 1
                ):
                    whole.append((portion.leaf, device, number))
                else:
                    making[device].append(portion)
        return tuple(whole), tuple(
            self._join(device, portions) for device, portions in making.items()
        )

    def _join(self, device: int, portions: Sequence[Portion]) -> Call:
        """Put the pieces of one destination device to their places."""
        keys = [(portion.leaf, device) for portion in portions]
        local = tuple(leaf for leaf, _ in keys if self.stays[leaf, device])
        numbers = tuple(
            dict.fromkeys(n for key in keys for n, _ in self.arrives.get(key, []))
        )
        makes = []
        for leaf, _ in keys:
            corner = [start for start, _ in self._wanted(leaf, device)]
            blocks, places = [], []
            for box in self.stays[leaf, device]:
                held = self._held(leaf, device)
                blocks.append(_slice_of(local.index(leaf), box, held))
                places.append(_corner(box, corner))
            for number, place in self.arrives.get((leaf, device), []):
                parcel = self.parcels[number]
                input = len(local) + numbers.index(number)
                box = parcel.pieces[place][1]
                is_flat = len(parcel.pieces) > 1
                offset = parcel.offsets[place] if is_flat else None
                blocks.append(Block(input=input, size=_size(box), offset=offset))
                places.append(_corner(box, corner))
            makes.append((blocks, places, _size(self._wanted(leaf, device))))
        return self._join_call(device, portions, makes, local, numbers)

    def _join_call(
        self,
        device: int,
        portions: Sequence[Portion],
        makes: Sequence[tuple[Sequence[Block], Sequence[Any], tuple[int, ...]]],
        local: tuple[int, ...],
        numbers: tuple[int, ...],
    ) -> Call:
        origins = []
        for portion in portions:
            is_mixed = self.requests[portion.leaf].is_mixed
            if portion.part or (is_mixed and self.is_donated):
                origins.append("begun")
            elif is_mixed:
                origins.append("target")
            else:
                origins.append("empty" if portion.num_parts > 1 else "none")
        pairs = list(zip(portions, origins, strict=True))
        return Call(
            device=device,
            function=_join_function(
                makes,
                [self.requests[portion.leaf] for portion in portions],
                origins,
                home(device),
            ),
            leaves=local,
            parcels=numbers,
            makes=tuple(portion.leaf for portion in portions),
            continues=tuple(p.leaf for p, origin in pairs if origin == "begun"),
            averages=tuple(p.leaf for p, origin in pairs if origin == "target"),
        )

    def _held(self, leaf: int, device: int) -> Box:
        request = self.requests[leaf]
        return Layout.of(request.source).boxes(request.shape)[device]

    def _wanted(self, leaf: int, device: int) -> Box:
        request = self.requests[leaf]
        return Layout.of(request.destination).boxes(request.shape)[device]


def _join_function(
    makes: Sequence[tuple[Sequence[Block], Sequence[Any], tuple[int, ...]]],
    requests: Sequence[Request],
    origins: Sequence[str],
    place: SingleDeviceSharding,
) -> Callable[..., list[Array]]:
    def join_all(
        shards: list[Array],
        parcels: list[Array],
        begun: list[Array],
        targets: list[Array],
        eta: Any,
    ) -> list[Array]:
        inputs, joined = [*shards, *parcels], []
        given = {"begun": iter(begun), "target": iter(targets)}
        for (blocks, places, shape), request, origin in zip(
            makes, requests, origins, strict=True
        ):
            dtype, into = request.new_dtype, None
            if origin == "empty":
                into = jax.lax.empty(shape, dtype)
            elif origin in given:
                into = next(given[origin])
            weight = eta if request.is_mixed else None
            joined.append(
                unpack(
                    inputs,
                    blocks,
                    places,
                    shape=shape,
                    dtype=dtype,
                    into=into,
                    eta=weight,
                )
            )
        return joined

    # What an earlier chunk began is ours alone, and is written in place.
    return jax.jit(join_all, donate_argnums=2, out_shardings=place)


def _ways(found: Route) -> Iterator[tuple[int, int, Targets | None]]:
    """Tell from where each piece goes to which devices, as far as it concerns us.

    Yields:
        The device that has the piece, the piece, and the targets; None for a piece
        that stays on its device.
    """
    hops = found.hops
    if not is_counted_by_all():
        me = jax.process_index()
        ours = hosts().of_devices(hops.sources) == me
        ours |= hosts().of_devices(hops.destinations) == me
        hops = hops.where(np.isin(hops.pieces, hops.pieces[ours]))
    relays: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    targets: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for source, destination, piece, phase, is_relay in zip(
        hops.sources.tolist(),
        hops.destinations.tolist(),
        hops.pieces.tolist(),
        hops.phases.tolist(),
        hops.is_relay.tolist(),
        strict=True,
    ):
        if phase == ON_DEVICE:
            yield source, piece, None
        elif is_relay:
            relays[source, piece].append(destination)
        else:
            targets[source, piece].append(destination)
    for (source, piece), destinations in targets.items():
        yield (
            source,
            piece,
            tuple(
                (device, tuple(sorted(relays.get((device, piece), []))))
                for device in sorted(destinations)
            ),
        )


def route_between(request: Request) -> Route:
    """Return the route of a request, with processes for hosts."""
    return route(
        Layout.of(request.source),
        Layout.of(request.destination),
        request.shape,
        request.wire_dtype,
        hosts(),
    )


def _slice_of(input: int, box: Box, held: Box) -> Block:
    return Block(
        input=input, size=_size(box), start=_corner(box, [low for low, _ in held])
    )


def _corner(box: Box, origin: Sequence[int]) -> tuple[int, ...]:
    """Return where a box begins, counted from another corner."""
    pairs = zip(box, origin, strict=True)
    return tuple(start - low for (start, _), low in pairs)


def _size(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)
