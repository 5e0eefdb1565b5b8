"""Routes: what moves where in one reallocation. No arrays and no devices here.

The route between two layouts is an interval sweep per dimension:

    source        |     0     |     1     |     2     |        3 parts
    destination   |        0        |        1        |        2 parts
    pieces        |  0→0      | 1→0 | 1→1 |  2→1      |

The pieces of an array are the product of those of its dimensions, so their number
depends on the two layouts and not on the number of layers or the size of the array.
Each piece then goes from a device that holds its source tile to every device that
needs its destination tile: from the device itself where it can, else from a holder on
its host, else across hosts, once a host (`hops`).

Totals are counted over tiles and hosts; a route between thousands of devices is priced
without listing its hops.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from realjax.realloc.grouping import sum_by
from realjax.realloc.hops import (
    ACROSS,
    PHASES,
    WITHIN,
    Copies,
    Hops,
    Loads,
    Meeting,
    Phase,
    choose_hops,
    share_loads,
)
from realjax.realloc.hosts import Hosts
from realjax.realloc.layouts import Box, Layout

Kind = Literal["none", "jit", "put", "slice"]

KINDS: tuple[Kind, ...] = ("none", "jit", "put", "slice")
"""The ways an array can go, cheapest first.

none   it already lies as wanted
jit    same devices in the same order: one jitted identity, the compiler's collectives
put    other devices, every shard as it is: native device-to-device copies
slice  anything else: pieces are cut, copied and joined

On the same devices the compiler is left only the exchange of one dimension for another
(`_is_exchange`). Gathers and slices it does well too, but pieces are no slower there,
and need less memory. In other cases it may build the whole array on every device first
("involuntary full rematerialization": 12 of the 90 pairs of strategies on 8 devices,
d2f2t2 to t8 among them, with 6 times the memory of a shard), and in some it ends the
process: a matrix cut into 2 x 3 whose first dimension shall be cut into 6 fails a check
of XLA's partitioner. Pieces do neither.
"""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """The pieces of one array on their way from one layout to another.

    Attributes:
        source: Where the array lies.
        destination: Where it shall lie.
        shape: Of the whole array.
        hosts: The hosts of the devices; None takes all for neighbours.
        is_same_cut: Every place of the two meshes holds the same tile.
        boxes: The pieces, integers [pieces, dimensions, 2]: start and stop.
        piece_bytes: The bytes of every piece.
        source_tiles: The source tile of every piece.
        destination_tiles: The destination tile of every piece.
        source_holders: Device ids [source tiles, copies].
        destination_holders: Device ids [destination tiles, copies].
    """

    source: Layout
    destination: Layout
    shape: tuple[int, ...]
    hosts: Hosts | None
    is_same_cut: bool
    boxes: np.ndarray
    piece_bytes: np.ndarray
    source_tiles: np.ndarray
    destination_tiles: np.ndarray
    source_holders: np.ndarray
    destination_holders: np.ndarray

    @functools.cached_property
    def kind(self) -> Kind:
        """Which way the array goes."""
        if self.source.devices == self.destination.devices:
            if self.is_same_cut:
                return "none"
            return "jit" if self._is_exchange else "slice"
        # Where devices overlap, a native copy may share buffers with its source.
        is_disjoint = set(self.source.devices).isdisjoint(self.destination.devices)
        is_put = self.is_same_cut and is_disjoint and self._is_put_least
        return "put" if is_put else "slice"

    @property
    def total_bytes(self) -> int:
        """The bytes of the whole array."""
        return int(self.piece_bytes.sum())

    @property
    def bytes_moved(self) -> int:
        """The bytes that cross from one device to another: the least that can."""
        return sum(self.phase_bytes.values()) - self.phase_bytes["on_device"]

    @functools.cached_property
    def phase_bytes(self) -> dict[Phase, int]:
        """The bytes of all hops, by what they pass.

        Those across hosts are the least that can: `least_across_bytes`.
        """
        needed = self.total_bytes * self.destination_holders.shape[1]
        local = int(self._meeting.local_bytes.sum())
        crossings = self._meeting.num_crossings
        across = int((crossings * self.piece_bytes).sum())
        return {
            "on_device": local,
            "across": across,
            "within": needed - local - across,
        }

    @functools.cached_property
    def least_across_bytes(self) -> int:
        """A lower bound: what the hosts need and have not, counted by host."""
        destinations = self._meeting.destinations
        pieces, _, _ = self._meeting.on_host
        tile_bytes = self.total_bytes // len(self.destination_holders)
        needed = len(destinations.starts) * tile_bytes
        return needed - int(self.piece_bytes[pieces].sum())

    @functools.cached_property
    def loads(self) -> Loads:
        """What every device sends and receives, in equal shares."""
        return share_loads(self._meeting)

    @property
    def max_sent_bytes(self) -> int:
        """The most that one device sends, when the copies of a tile share the work."""
        return int(self.loads.sent.max(initial=0))

    @property
    def max_received_bytes(self) -> int:
        """The most that one device receives."""
        return int(self.loads.received.max(initial=0))

    @functools.cached_property
    def hops(self) -> Hops:
        """Every piece on its way to every device that needs it; worked out once."""
        return choose_hops(self._meeting)

    @property
    def device_moves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The hops as three arrays: source device, destination device, piece."""
        return self.hops.sources, self.hops.destinations, self.hops.pieces

    @property
    def moves(self) -> Iterator[tuple[int, int, Box]]:
        """Every piece, as (source device, destination device, box).

        Pieces that stay on their device are among them. With hosts, a source may be a
        relay, which has its piece only once that has arrived: see `hops`.
        """
        sources, destinations, pieces = self.device_moves
        return zip(
            sources.tolist(),
            destinations.tolist(),
            (self.box(piece) for piece in pieces.tolist()),
            strict=True,
        )

    def box(self, piece: int) -> Box:
        """Return the block of the whole array that a piece is."""
        return self._boxes[piece]

    def link_bytes(
        self, phase: Phase | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Add up the bytes of every link between two devices.

        Args:
            phase: "across" or "within"; None takes both.

        Returns:
            Parallel arrays, sorted: source device, destination device, bytes.
        """
        found = self.hops
        wanted = (ACROSS, WITHIN) if phase is None else (PHASES.index(phase),)
        found = found.where(np.isin(found.phases, wanted))
        sizes = self.piece_bytes[found.pieces]
        return _sum_pairs(found.sources, found.destinations, sizes)

    def host_bytes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Add up the bytes between every two hosts, and of each within itself.

        Returns:
            Parallel arrays, sorted: source host, destination host, bytes.
        """
        sources, destinations, sizes = self.link_bytes()
        return _sum_pairs(self.hosts_of(sources), self.hosts_of(destinations), sizes)

    def hosts_of(self, devices: np.ndarray) -> np.ndarray:
        """Return the host of every device: all 0 where no hosts were given."""
        if self.hosts is None:
            return np.zeros_like(devices)
        return self.hosts.of_devices(devices)

    def peak_bytes(
        self, chunk_bytes: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Count the memory of every device while the array moves.

        That is what it held and what it will hold, and the pieces in flight: cut to be
        sent, and arrived but not joined. An array may be moved in chunks; then only
        those of one chunk are in flight.

        Args:
            chunk_bytes: Bytes of the whole array that are moved at a time; None moves
                it at once.

        Returns:
            Device ids, rising, and the bytes on each.
        """
        devices = self.loads.devices
        flying = self.loads.sent + self.loads.received
        if chunk_bytes is not None and chunk_bytes < self.total_bytes:
            flying = -(-flying * chunk_bytes // self.total_bytes)
        held = np.isin(devices, self.source_holders)
        wanted = np.isin(devices, self.destination_holders)
        source_bytes = self.total_bytes // len(self.source_holders)
        destination_bytes = self.total_bytes // len(self.destination_holders)
        return devices, held * source_bytes + wanted * destination_bytes + flying

    @property
    def _is_exchange(self) -> bool:
        """Tell whether it is one all-to-all: a dimension is cut instead of another."""
        cuts = [
            [
                axis
                for axis, count in enumerate(layout.tiles(self.shape)[0])
                if count > 1
            ]
            for layout in (self.source, self.destination)
        ]
        num_tiles = len(self.source_holders), len(self.destination_holders)
        return (
            [len(axes) for axes in cuts] == [1, 1]
            and cuts[0] != cuts[1]
            and num_tiles == (self.source_holders.size,) * 2
        )

    @property
    def _is_put_least(self) -> bool:
        """Tell whether shard by shard nothing enters a host twice, or needlessly."""
        if self.hosts is None:
            return True
        before, after = (
            self.hosts_of(np.asarray(side.devices, np.int64))
            for side in (self.source, self.destination)
        )
        shard_bytes = self.total_bytes // len(self.source_holders)
        return int((before != after).sum()) * shard_bytes == self.phase_bytes["across"]

    @functools.cached_property
    def _boxes(self) -> list[Box]:
        return [tuple(map(tuple, box)) for box in self.boxes.tolist()]

    @functools.cached_property
    def _meeting(self) -> Meeting:
        return Meeting(
            piece_bytes=self.piece_bytes,
            source_tiles=self.source_tiles,
            destination_tiles=self.destination_tiles,
            sources=Copies.of(self.source_holders, self.hosts_of(self.source_holders)),
            destinations=Copies.of(
                self.destination_holders, self.hosts_of(self.destination_holders)
            ),
        )


@functools.lru_cache(maxsize=8192)
def route(
    source: Layout,
    destination: Layout,
    shape: tuple[int, ...],
    dtype: Any,
    hosts: Hosts | None = None,
) -> Route:
    """Work out the route of one class of arrays, equal in shape, type and layouts.

    Args:
        source: Where the array lies.
        destination: Where it shall lie.
        shape: Of the whole array.
        dtype: Its type on the way.
        hosts: Which devices share a host; None takes all for neighbours.

    Raises:
        ValueError: a layout that does not divide the shape into equal parts, or a
            device whose host is not known.
    """
    source_parts, source_tiles = source.tiles(shape)
    destination_parts, destination_tiles = destination.tiles(shape)
    sweeps = [
        _sweep(*sizes)
        for sizes in zip(shape, source_parts, destination_parts, strict=True)
    ]
    # The product of the dimensions, the last fastest.
    counts = [len(sweep) for sweep in sweeps]
    boxes = np.zeros((*counts, len(shape), 2), np.int64)
    elements = np.ones(1, np.int64)
    tiles = np.zeros((2, 1), np.int64)
    for dimension, sweep in enumerate(sweeps):
        others = [1] * (len(shape) - dimension - 1)
        boxes[..., dimension, :] = sweep[:, :2].reshape(-1, *others, 2)
        elements = np.outer(elements, sweep[:, 1] - sweep[:, 0]).reshape(-1)
        parts = np.array([source_parts[dimension], destination_parts[dimension]])
        tiles = tiles[..., None] * parts[:, None, None] + sweep[:, 2:].T[:, None, :]
        tiles = tiles.reshape(2, -1)
    return Route(
        source=source,
        destination=destination,
        shape=tuple(shape),
        hosts=hosts,
        is_same_cut=np.array_equal(source_tiles, destination_tiles),
        boxes=boxes.reshape(len(elements), len(shape), 2),
        piece_bytes=elements * np.dtype(dtype).itemsize,
        source_tiles=tiles[0],
        destination_tiles=tiles[1],
        source_holders=_holders(source, source_tiles, source_parts),
        destination_holders=_holders(destination, destination_tiles, destination_parts),
    )


def _sum_pairs(
    firsts: np.ndarray, seconds: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add up sizes by pair of numbers, sorted by pair."""
    width = int(seconds.max(initial=0)) + 1
    pairs, groups = np.unique(firsts * width + seconds, return_inverse=True)
    return pairs // width, pairs % width, sum_by(groups, sizes, len(pairs))


def _sweep(size: int, source_parts: int, destination_parts: int) -> np.ndarray:
    """Cut one dimension where either layout does.

    Returns:
        Rows of (start, stop, source part, destination part).
    """
    if size == 0:
        return np.zeros((0, 4), np.int64)
    source_size, destination_size = size // source_parts, size // destination_parts
    cuts = np.union1d(
        np.arange(source_parts + 1) * source_size,
        np.arange(destination_parts + 1) * destination_size,
    )
    starts, stops = cuts[:-1], cuts[1:]
    return np.stack(
        [starts, stops, starts // source_size, starts // destination_size], axis=1
    )


def _flat_tiles(tiles: np.ndarray, parts: Sequence[int]) -> np.ndarray:
    """Number tiles [dimensions, any] in row-major order."""
    flat = np.zeros(tiles.shape[1], np.int64)
    for part, count in zip(tiles, parts, strict=True):
        flat = flat * count + part
    return flat


def _holders(layout: Layout, tiles: np.ndarray, parts: Sequence[int]) -> np.ndarray:
    """Return the devices that hold each tile, [tiles, copies], in mesh order."""
    order = np.argsort(_flat_tiles(tiles.T, parts), kind="stable")
    return np.asarray(layout.devices, np.int64)[order].reshape(math.prod(parts), -1)
