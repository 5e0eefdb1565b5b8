"""Routes: what moves where in one reallocation. No arrays and no devices here.

A layout cuts each dimension of an array into equal parts, and a tile is one part in
every dimension. The route between two layouts is an interval sweep per dimension:

    source        |     0     |     1     |     2     |        3 parts
    destination   |        0        |        1        |        2 parts
    pieces        |  0→0      | 1→0 | 1→1 |  2→1      |

The pieces of an array are the product of those of its dimensions, so their number
depends on the two layouts and not on the number of layers or the size of the array.
Each piece then goes from a device that holds its source tile to every device that
needs its destination tile: from the device itself where it can, else from the holders
in equal shares.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import NamedSharding, Sharding

Box = tuple[tuple[int, int], ...]
"""A block of an array: (start, stop) of every dimension."""

Kind = Literal["none", "jit", "put", "slice"]

KINDS: tuple[Kind, ...] = ("none", "jit", "put", "slice")
"""The ways an array can go, cheapest first.

none   it already lies as wanted
jit    same devices in the same order: one jitted identity, the compiler's collectives
put    other devices, every shard as it is: native device-to-device copies
slice  anything else: pieces are cut, copied and joined

On the same devices the compiler is left the cases that it does with slices, gathers
and all-to-alls (`_is_direct`). In others it may build the whole array on every device
first ("involuntary full rematerialization": 12 of the 90 pairs of strategies on 8
devices, d2f2t2 to t8 among them, with 6 times the memory of a shard); pieces never do.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How an array lies on devices: a sharding as plain numbers.

    Attributes:
        devices: Device ids in mesh order, the last mesh axis fastest.
        mesh_shape: Size of every mesh axis.
        spec: For each leading dimension, the mesh axes that cut it, major first.
    """

    devices: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    spec: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check that the mesh counts its devices."""
        if math.prod(self.mesh_shape) != len(self.devices):
            raise ValueError(
                f"A mesh of shape {self.mesh_shape} has {math.prod(self.mesh_shape)}"
                f" places and {len(self.devices)} devices. Name one device per place."
            )

    @classmethod
    def of(cls, sharding: Sharding) -> "Layout":
        """Read a layout off a sharding.

        Raises:
            TypeError: a sharding over several devices that is no `NamedSharding`.
        """
        return _layout_of(sharding)

    def tiles(self, shape: Sequence[int]) -> tuple[tuple[int, ...], np.ndarray]:
        """Return the parts of every dimension, and the tile of every device.

        Args:
            shape: Of the array.

        Returns:
            The number of parts per dimension, and integers [devices, dimensions] that
            say which part each device holds.

        Raises:
            ValueError: a dimension that its parts do not divide.
        """
        if len(self.spec) > len(shape):
            raise ValueError(
                f"The spec {self.spec} names {len(self.spec)} dimensions and the array"
                f" has shape {tuple(shape)}. Give a sharding of at most its rank."
            )
        coordinates = np.indices(self.mesh_shape).reshape(len(self.mesh_shape), -1)
        tiles = np.zeros((len(self.devices), len(shape)), np.int64)
        parts = [1] * len(shape)
        for dimension, axes in enumerate(self.spec):
            for axis in axes:
                parts[dimension] *= self.mesh_shape[axis]
                tiles[:, dimension] *= self.mesh_shape[axis]
                tiles[:, dimension] += coordinates[axis]
        for size, count in zip(shape, parts, strict=True):
            if size % count:
                raise ValueError(
                    f"An array of shape {tuple(shape)} does not divide into"
                    f" {'×'.join(map(str, parts))} parts. Choose a sharding whose parts"
                    " are equal, or pad the array."
                )
        return tuple(parts), tiles

    def boxes(self, shape: Sequence[int]) -> dict[int, Box]:
        """Return the block that each device holds."""
        parts, tiles = self.tiles(shape)
        sizes = [size // count for size, count in zip(shape, parts, strict=True)]
        return {
            device: tuple(
                (index * size, (index + 1) * size)
                for index, size in zip(tile, sizes, strict=True)
            )
            for device, tile in zip(self.devices, tiles.tolist(), strict=True)
        }


@functools.lru_cache(maxsize=8192)
def _layout_of(sharding: Sharding) -> Layout:
    if sharding.num_devices == 1:
        (device,) = sharding.device_set
        return Layout(devices=(device.id,), mesh_shape=(1,))
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"Found an array with sharding {sharding}. Arrays on several devices need a"
            " NamedSharding: give its producer explicit out_shardings."
        )
    axes = {name: index for index, name in enumerate(sharding.mesh.axis_names)}
    spec = []
    for entry in sharding.spec:
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        spec.append(tuple(axes[name] for name in names))
    return Layout(
        devices=tuple(device.id for device in np.asarray(sharding.mesh.devices).flat),
        mesh_shape=tuple(sharding.mesh.axis_sizes),
        spec=tuple(spec),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """The pieces of one array on their way from one layout to another.

    Totals are counted over pieces and tiles, which are few; `moves`, the pieces device
    by device, are worked out when first asked for.

    Attributes:
        kind: Which way the array goes.
        boxes: The pieces, integers [pieces, dimensions, 2]: start and stop.
        piece_bytes: The bytes of every piece.
        source_tiles: The source tile of every piece.
        destination_tiles: The destination tile of every piece.
        source_holders: Device ids [source tiles, copies].
        destination_holders: Device ids [destination tiles, copies].
    """

    kind: Kind
    boxes: np.ndarray
    piece_bytes: np.ndarray
    source_tiles: np.ndarray
    destination_tiles: np.ndarray
    source_holders: np.ndarray
    destination_holders: np.ndarray

    @property
    def bytes_moved(self) -> int:
        """The bytes that cross from one device to another: the least that can."""
        return int((self._remote_copies * self.piece_bytes).sum())

    @property
    def max_sent_bytes(self) -> int:
        """The most that one device sends, when the copies of a tile share the work."""
        per_tile = _sum_by(
            self.source_tiles,
            self._remote_copies * self.piece_bytes,
            len(self.source_holders),
        )
        return -(-int(per_tile.max(initial=0)) // self.source_holders.shape[1])

    @property
    def max_received_bytes(self) -> int:
        """The most that one device receives."""
        tile_bytes = int(self.piece_bytes.sum()) // len(self.destination_holders)
        return int((tile_bytes - self._local_bytes).max(initial=0))

    @property
    def moves(self) -> Iterator[tuple[int, int, Box]]:
        """Every piece, as (source device, destination device, box).

        Pieces that stay on their device are among them.
        """
        boxes = [tuple(map(tuple, box)) for box in self.boxes.tolist()]
        sources, destinations, pieces = self.device_moves
        return zip(
            sources.tolist(),
            destinations.tolist(),
            (boxes[piece] for piece in pieces.tolist()),
            strict=True,
        )

    @functools.cached_property
    def device_moves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The moves as three arrays: source device, destination device, piece."""
        copies = self.destination_holders.shape[1]
        pieces = np.repeat(np.arange(len(self.boxes)), copies)
        destinations = self.destination_holders[self.destination_tiles].reshape(-1)
        tiles = self.source_tiles[pieces]
        held = _lookup(self.source_holders.reshape(-1), destinations)
        is_local = (held >= 0) & (held // self.source_holders.shape[1] == tiles)
        sources = destinations.copy()

        # What has to travel, source tile by source tile, is dealt to the holders of
        # the tile by its place in the running sum of bytes: equal shares, to a piece.
        remote = np.flatnonzero(~is_local)
        remote = remote[np.argsort(tiles[remote], kind="stable")]
        tiles, sizes = tiles[remote], self.piece_bytes[pieces[remote]]
        totals = _sum_by(tiles, sizes, len(self.source_holders))
        before = np.cumsum(sizes) - sizes - (np.cumsum(totals) - totals)[tiles]
        holder = before * self.source_holders.shape[1] // np.maximum(totals[tiles], 1)
        sources[remote] = self.source_holders[tiles, holder]
        return sources, destinations, pieces

    @functools.cached_property
    def _local_pieces(self) -> np.ndarray:
        """For every destination place, the piece its device has already, or -1."""
        copies = self.destination_holders.shape[1]
        held = _lookup(
            self.source_holders.reshape(-1), self.destination_holders.reshape(-1)
        )
        tiles = np.where(held < 0, -1, held // self.source_holders.shape[1])
        wanted = np.arange(self.destination_holders.size) // copies
        width = len(self.destination_holders)
        keys = self.source_tiles * width + self.destination_tiles
        return _lookup(keys, np.where(tiles < 0, -1, tiles * width + wanted))

    @property
    def _local_bytes(self) -> np.ndarray:
        """For every destination place, the bytes its device has already."""
        # Place -1 reads the zero at the end.
        return np.append(self.piece_bytes, 0)[self._local_pieces]

    @functools.cached_property
    def _remote_copies(self) -> np.ndarray:
        """For every piece, the devices that need it and do not have it."""
        local = self._local_pieces
        has = np.bincount(local[local >= 0], minlength=len(self.boxes))
        return self.destination_holders.shape[1] - has


@functools.lru_cache(maxsize=8192)
def route(
    source: Layout, destination: Layout, shape: tuple[int, ...], dtype: Any
) -> Route:
    """Work out the route of one class of arrays, equal in shape, type and layouts.

    Args:
        source: Where the array lies.
        destination: Where it shall lie.
        shape: Of the whole array.
        dtype: Its type on the way.

    Raises:
        ValueError: a layout that does not divide the shape into equal parts.
    """
    source_parts, source_tiles = source.tiles(shape)
    destination_parts, destination_tiles = destination.tiles(shape)
    sweeps = [
        _sweep(*sizes)
        for sizes in zip(shape, source_parts, destination_parts, strict=True)
    ]
    # The product of the dimensions: row n of `chosen` has one interval of each.
    counts = [len(sweep) for sweep in sweeps]
    chosen = np.indices(counts).reshape(len(counts), math.prod(counts))
    boxes = np.zeros((math.prod(counts), len(shape), 2), np.int64)
    tiles = np.zeros((2, len(shape), math.prod(counts)), np.int64)
    for dimension, sweep in enumerate(sweeps):
        boxes[:, dimension] = sweep[chosen[dimension], :2]
        tiles[:, dimension] = sweep[chosen[dimension], 2:].T
    elements = np.prod(boxes[..., 1] - boxes[..., 0], axis=1, dtype=np.int64)
    found = Route(
        kind="slice",
        boxes=boxes,
        piece_bytes=elements * np.dtype(dtype).itemsize,
        source_tiles=_flat_tiles(tiles[0], source_parts),
        destination_tiles=_flat_tiles(tiles[1], destination_parts),
        source_holders=_holders(source, source_tiles, source_parts),
        destination_holders=_holders(destination, destination_tiles, destination_parts),
    )
    is_same_cut = np.array_equal(source_tiles, destination_tiles)
    kind = _kind(source, destination, is_same_cut, found)
    return dataclasses.replace(found, kind=kind)


def _kind(
    source: Layout, destination: Layout, is_same_cut: bool, pieces: Route
) -> Kind:
    if source.devices == destination.devices:
        if is_same_cut:
            return "none"
        return "jit" if _is_direct(pieces) else "slice"
    # Where devices overlap, a native copy may share buffers with its source.
    is_disjoint = set(source.devices).isdisjoint(destination.devices)
    return "put" if is_same_cut and is_disjoint else "slice"


def _is_direct(pieces: Route) -> bool:
    """Tell whether the compiler does it without building whole arrays on the way."""
    total = int(pieces.piece_bytes.sum())
    local = pieces._local_bytes
    num_source, num_destination = (
        len(pieces.source_holders),
        len(pieces.destination_holders),
    )
    return bool(
        # Every device has all it needs: slices.
        (local == total // num_destination).all()
        # Every device keeps all it has: gathers.
        or (local == total // num_source).all()
        # No tile has a copy: all-to-alls and permutations.
        or num_source == num_destination == pieces.source_holders.size
    )


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


def _sum_by(groups: np.ndarray, values: np.ndarray, num_groups: int) -> np.ndarray:
    """Add up integers by group, exactly (bincount's weights are floats)."""
    sums = np.zeros(num_groups, np.int64)
    np.add.at(sums, groups, values)
    return sums


def _lookup(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return where each wanted value stands in the distinct keys, or -1."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys, kind="stable")
    place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    found = order[place]
    return np.where(keys[found] == wanted, found, -1)
