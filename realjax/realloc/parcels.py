"""Parcels: what a device sends to the same others at once, over several processes.

    process 0                     process 1
    device 0   pack ──across──> device 4 ──within──> device 5   one parcel, relayed
                └───within──> device 1                           and given at home

All pieces that a device has for the same devices, in one type, are one parcel. It
crosses once to every process that needs it, to one device there, which gives it to its
neighbours; `hops` chooses who. Then every destination device joins what came with what
it held. `parcel_plans` works out the `Steps`, `crossing` does them.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from realjax.core.arrays import Array
from realjax.realloc.hops import ON_DEVICE
from realjax.realloc.layouts import Box, Layout
from realjax.realloc.processes import hosts, is_counted_by_all
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
            return size_of(self.pieces[0][1])
        return (sum(math.prod(size_of(box)) for _, box in self.pieces),)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each piece begins in the flat parcel."""
        sizes = [math.prod(size_of(box)) for _, box in self.pieces]
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


def ways(found: Route) -> Iterator[tuple[int, int, Targets | None]]:
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


def ends_here(source: int, destination: int) -> bool:
    """Tell whether this process takes part in copies between two devices."""
    me = jax.process_index()
    ends = {hosts().of_device(source), hosts().of_device(destination)}
    return is_counted_by_all() or me in ends


def route_between(request: Request) -> Route:
    """Return the route of a request, with processes for hosts."""
    return route(
        Layout.of(request.source),
        Layout.of(request.destination),
        request.shape,
        request.wire_dtype,
        hosts(),
    )


def size_of(box: Box) -> tuple[int, ...]:
    """Return the shape of a block."""
    return tuple(stop - start for start, stop in box)
