"""Hops: every piece of a route from a device to a device, and who shares the work.

    host 0        host 1                    a tile lies on devices 0 and 1, and
    0 ──────across──────> 4 ──relay──> 5    4, 5, 2 and 3 need it
    1 ──within──> 2
    0 ──within──> 3                         0 keeps its own: on_device

A piece enters a host at most once. Where the host has it, nothing crosses; else one of
the devices that need it there receives it and relays it to the others. Whatever a group
of devices can do alike (the holders of a tile send it across; those on one host give it
within; the devices of a host that need a tile receive it) they do in equal shares.
Tiles do not overlap, so no two groups load one device with the same kind of work, and
the shares are the least-loaded choice.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np

from realjax.realloc.grouping import deal, lookup, spread, sum_by

Phase = Literal["on_device", "across", "within"]

PHASES: tuple[Phase, ...] = ("on_device", "across", "within")
"""What a hop passes: nothing, the links between hosts, or those inside a host."""

ON_DEVICE, ACROSS, WITHIN = range(len(PHASES))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Hops:
    """Parallel arrays: hop n brings `pieces[n]` to `destinations[n]`.

    There is one hop for every piece that a device needs, ordered by piece, and within
    a piece in mesh order of the destinations; so each destination byte comes once. The
    order and the choice of sources are the same in every process.

    Relays wait for the hop across that brought the piece to their source. All other
    hops read what lay there at the start.

    Attributes:
        sources: Device ids.
        destinations: Device ids.
        pieces: Indices into the boxes of the route.
        phases: Indices into `PHASES`.
        is_relay: The source has the piece only by an `across` hop to it.
    """

    sources: np.ndarray
    destinations: np.ndarray
    pieces: np.ndarray
    phases: np.ndarray
    is_relay: np.ndarray

    def __len__(self) -> int:
        """Count the hops."""
        return len(self.pieces)

    def of(self, phase: Phase) -> "Hops":
        """Return the hops of one phase."""
        return self.where(self.phases == PHASES.index(phase))

    def where(self, chosen: np.ndarray) -> "Hops":
        """Return the hops that a mask, or an array of indices, chooses."""
        columns = [getattr(self, f.name)[chosen] for f in dataclasses.fields(self)]
        names = [field.name for field in dataclasses.fields(self)]
        return Hops(**dict(zip(names, columns, strict=True)))

    def by_link(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Group by link: (source, destination, pieces), sorted by source, destination.

        The pieces of a link come by rising number.
        """
        order = np.lexsort((self.pieces, self.destinations, self.sources))
        sources, destinations = self.sources[order], self.destinations[order]
        is_new = (np.diff(sources) != 0) | (np.diff(destinations) != 0)
        starts = np.flatnonzero(np.append(len(order) > 0, is_new))
        for start, pieces in zip(
            starts, np.split(self.pieces[order], starts[1:]), strict=False
        ):
            yield int(sources[start]), int(destinations[start]), pieces


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """The devices of each tile, in groups that share a tile and a host.

    A place is a position in `devices`; the places of one tile follow each other.

    Attributes:
        devices: Ids, by tile, then host, then mesh order.
        places: Of the devices listed tile by tile in mesh order, where each stands.
        tiles: The tile of every group.
        hosts: The host of every group.
        starts: The first place of every group.
        sizes: How many places every group has.
        first_groups: The first group of every tile, and the number of groups.
    """

    devices: np.ndarray
    places: np.ndarray
    tiles: np.ndarray
    hosts: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    first_groups: np.ndarray

    @classmethod
    def of(cls, holders: np.ndarray, hosts: np.ndarray) -> "Copies":
        """Group devices.

        Args:
            holders: Device ids [tiles, copies].
            hosts: Their hosts [tiles, copies].
        """
        num_tiles, num_copies = holders.shape
        tiles = np.repeat(np.arange(num_tiles), num_copies)
        places = np.lexsort((hosts.reshape(-1), tiles))
        sorted_hosts = hosts.reshape(-1)[places]
        is_first = np.ones(len(places), bool)
        is_first[1:] = (np.diff(sorted_hosts) != 0) | (np.diff(tiles) != 0)
        starts = np.flatnonzero(is_first)
        return cls(
            devices=holders.reshape(-1)[places],
            places=places,
            tiles=tiles[starts],
            hosts=sorted_hosts[starts],
            starts=starts,
            sizes=np.diff(starts, append=len(places)),
            first_groups=np.searchsorted(tiles[starts], np.arange(num_tiles + 1)),
        )

    @functools.cached_property
    def group_of_place(self) -> np.ndarray:
        """The group of every place."""
        return np.repeat(np.arange(len(self.starts)), self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Meeting:
    """Where the pieces of a route are before they are asked for.

    Attributes:
        piece_bytes: The bytes of every piece.
        source_tiles: The source tile of every piece.
        destination_tiles: The destination tile of every piece.
        sources: Who holds the source tiles.
        destinations: Who needs the destination tiles.
    """

    piece_bytes: np.ndarray
    source_tiles: np.ndarray
    destination_tiles: np.ndarray
    sources: Copies
    destinations: Copies

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """A number for the pair of tiles of every piece; no two pieces share one."""
        return self._key(self.source_tiles, self.destination_tiles)

    @functools.cached_property
    def local_pieces(self) -> np.ndarray:
        """For every place of the destinations, the piece it has already, or -1."""
        held = lookup(self.sources.devices, self.destinations.devices)
        tiles = self.sources.tiles[self.sources.group_of_place[held]]
        wanted = self.destinations.tiles[self.destinations.group_of_place]
        return lookup(self.keys, np.where(held < 0, -1, self._key(tiles, wanted)))

    @functools.cached_property
    def local_bytes(self) -> np.ndarray:
        """For every place of the destinations, the bytes it has already."""
        # Place -1 reads the zero at the end.
        return np.append(self.piece_bytes, 0)[self.local_pieces]

    @functools.cached_property
    def num_groups(self) -> np.ndarray:
        """For every piece, the groups (so the hosts) that need it."""
        return np.diff(self.destinations.first_groups)[self.destination_tiles]

    @functools.cached_property
    def on_host(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces that a host both needs and has: three parallel arrays.

        Returns:
            The piece, the group that needs it and the group of its holders, sorted by
            holders, then piece.
        """
        sources, destinations = self.sources, self.destinations
        by_host = np.argsort(sources.hosts, kind="stable")
        first = np.searchsorted(sources.hosts[by_host], destinations.hosts, "left")
        after = np.searchsorted(sources.hosts[by_host], destinations.hosts, "right")
        # Either ask every needing group about the tiles of its host, or every piece
        # about the hosts of its destination tile: whichever asks less.
        if (after - first).sum() <= self.num_groups.sum():
            needers, at = spread(first, after - first)
            holders = by_host[at]
            key = self._key(sources.tiles[holders], destinations.tiles[needers])
            pieces = lookup(self.keys, key)
        else:
            pieces, needers = spread(
                destinations.first_groups[self.destination_tiles], self.num_groups
            )
            num_hosts = max(sources.hosts.max(), destinations.hosts.max()) + 1
            holders = lookup(
                sources.tiles * num_hosts + sources.hosts,
                self.source_tiles[pieces] * num_hosts + destinations.hosts[needers],
            )
            pieces = np.where(holders < 0, -1, pieces)
        found = np.flatnonzero(pieces >= 0)
        found = found[np.lexsort((pieces[found], holders[found]))]
        return pieces[found], needers[found], holders[found]

    @functools.cached_property
    def num_crossings(self) -> np.ndarray:
        """For every piece, the hosts that need it and have it not."""
        pieces, _, _ = self.on_host
        return self.num_groups - np.bincount(pieces, minlength=len(self.piece_bytes))

    def _key(
        self, source_tiles: np.ndarray, destination_tiles: np.ndarray
    ) -> np.ndarray:
        num_tiles = len(self.destinations.first_groups) - 1
        return source_tiles * num_tiles + destination_tiles

    def crossings(self) -> tuple[np.ndarray, np.ndarray]:
        """The pieces that a host needs and has not: pieces, and groups that need them.

        Sorted by source tile, then piece, then host.
        """
        order = np.argsort(self.source_tiles, kind="stable")
        counts = self.num_groups[order]
        first = self.destinations.first_groups[self.destination_tiles]
        at, needers = spread(first[order], counts)
        is_missing = np.ones(len(at), bool)
        pieces, needing, _ = self.on_host
        begins = np.zeros(len(order), np.int64)
        begins[order] = np.cumsum(counts) - counts
        is_missing[begins[pieces] + needing - first[pieces]] = False
        return order[at[is_missing]], needers[is_missing]


# Where hops stand in the order of `Hops`, by piece and place of the destination.
_Slots = Callable[[np.ndarray, np.ndarray], np.ndarray]


def choose_hops(meeting: Meeting) -> Hops:
    """Choose the source of every piece that a device needs."""
    destinations = meeting.destinations
    num_copies = len(destinations.devices) // (len(destinations.first_groups) - 1)
    # The destinations in mesh order, and the grid [pieces, copies] of the hops.
    mesh_order = np.empty_like(destinations.devices)
    mesh_order[destinations.places] = destinations.devices
    grid = mesh_order.reshape(-1, num_copies)[meeting.destination_tiles]
    sources = grid.reshape(-1).copy()
    phases = np.full(len(sources), ON_DEVICE, np.int8)
    is_relay = np.zeros(len(sources), bool)

    def slots(pieces: np.ndarray, places: np.ndarray) -> np.ndarray:
        return pieces * num_copies + destinations.places[places] % num_copies

    slot, source = _within(meeting, slots)
    sources[slot], phases[slot] = source, WITHIN
    slot, source, relay_slot, relay = _across(meeting, slots)
    sources[slot], phases[slot] = source, ACROSS
    sources[relay_slot], phases[relay_slot] = relay, WITHIN
    is_relay[relay_slot] = True
    return Hops(
        sources=sources,
        destinations=grid.reshape(-1),
        pieces=np.repeat(np.arange(len(grid)), num_copies),
        phases=phases,
        is_relay=is_relay,
    )


def _within(meeting: Meeting, slots: _Slots) -> tuple[np.ndarray, np.ndarray]:
    """Give what a host has to its devices, from the holders there."""
    destinations, sources = meeting.destinations, meeting.sources
    pieces, needers, holders = meeting.on_host
    at, places = spread(destinations.starts[needers], destinations.sizes[needers])
    is_remote = meeting.local_pieces[places] != pieces[at]
    at, places = at[is_remote], places[is_remote]
    shares = deal(holders[at], meeting.piece_bytes[pieces[at]], sources.sizes)
    givers = sources.devices[sources.starts[holders[at]] + shares]
    return slots(pieces[at], places), givers


def _across(
    meeting: Meeting, slots: _Slots
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Send what a host lacks to one of its devices, and relay it to the others."""
    destinations, sources = meeting.destinations, meeting.sources
    pieces, needers = meeting.crossings()
    tiles, sizes = meeting.source_tiles[pieces], meeting.piece_bytes[pieces]
    num_tiles = len(sources.first_groups) - 1
    num_copies = len(sources.devices) // num_tiles
    shares = deal(tiles, sizes, np.full(num_tiles, num_copies))
    senders = sources.devices[tiles * num_copies + shares]

    receivers = destinations.starts[needers]
    if destinations.sizes.max(initial=1) > 1:
        order = np.lexsort((pieces, needers))
        shares = deal(needers[order], sizes[order], destinations.sizes)
        receivers[order] += shares
    at, places = spread(destinations.starts[needers], destinations.sizes[needers])
    is_relayed = places != receivers[at]
    at, places = at[is_relayed], places[is_relayed]
    return (
        slots(pieces, receivers),
        senders,
        slots(pieces[at], places),
        destinations.devices[receivers[at]],
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loads:
    """What every device of a route sends and receives, in bytes.

    These are equal shares, rounded up, and cost no list of hops. But hops deal whole
    pieces: a device may send or receive up to a piece more in each role, and a relay
    send that piece to every other device of its group.

    Attributes:
        devices: Ids, rising; the other arrays are parallel.
        sent_across: To other hosts.
        received_across: From other hosts.
        sent_within: To devices of its host.
        received_within: From devices of its host.
    """

    devices: np.ndarray
    sent_across: np.ndarray
    received_across: np.ndarray
    sent_within: np.ndarray
    received_within: np.ndarray

    @property
    def sent(self) -> np.ndarray:
        """Bytes that leave each device."""
        return self.sent_across + self.sent_within

    @property
    def received(self) -> np.ndarray:
        """Bytes that arrive at each device."""
        return self.received_across + self.received_within


def share_loads(meeting: Meeting) -> Loads:
    """Share the bytes of every group among its devices."""
    sources, destinations = meeting.sources, meeting.destinations
    sizes = meeting.piece_bytes
    pieces, needers, holders = meeting.on_host
    num_tiles = len(sources.first_groups) - 1
    num_needers, num_holders = len(destinations.starts), len(sources.starts)

    # Sources: what their tile sends across, and what they give within.
    crossing = meeting.num_crossings * sizes
    sent_across = sum_by(meeting.source_tiles, crossing, num_tiles)
    sent_across = -(-sent_across // (len(sources.devices) // num_tiles))
    given = sum_by(holders, sizes[pieces] * destinations.sizes[needers], num_holders)
    held = lookup(sources.devices, destinations.devices)
    own = sources.group_of_place[held[held >= 0]]
    given -= sum_by(own, meeting.local_bytes[held >= 0], num_holders)
    sent_within = -(-given // sources.sizes)

    # Destinations: what enters their host, and what they get or relay there.
    tile_bytes = int(sizes.sum()) // (len(destinations.first_groups) - 1)
    entering = tile_bytes - sum_by(needers, sizes[pieces], num_needers)
    received_across = -(-entering // destinations.sizes)
    received_within = tile_bytes - (entering // destinations.sizes)
    relayed = -(-entering * (destinations.sizes - 1) // destinations.sizes)

    devices = np.union1d(sources.devices, destinations.devices)
    found = Loads(
        devices=devices,
        sent_across=np.zeros(len(devices), np.int64),
        received_across=np.zeros(len(devices), np.int64),
        sent_within=np.zeros(len(devices), np.int64),
        received_within=np.zeros(len(devices), np.int64),
    )
    at, group = np.searchsorted(devices, sources.devices), sources.group_of_place
    found.sent_across[at] = sent_across[sources.tiles[group]]
    found.sent_within[at] = sent_within[group]
    at = np.searchsorted(devices, destinations.devices)
    group = destinations.group_of_place
    found.received_across[at] = received_across[group]
    found.received_within[at] = received_within[group] - meeting.local_bytes
    found.sent_within[at] += relayed[group]
    return found
