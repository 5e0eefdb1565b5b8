"""The route "slice": pieces are cut at their source, copied, and joined.

    source devices        cut    slices, and the cast where the new type is narrower
    between devices       copy   one batched `device_put` of single-device arrays
    destination devices   join   the buffers received, and slices of the shards that the
                                 device held already, into the new shards

What travels from one device to another at once is a parcel: a block of one array, or
small blocks of several, packed. A shard that travels as it is needs no cut, and one
that arrives as it shall be no join. Nothing made here shares a buffer with its source.

Parcels live beside sources and results, so a tree moves in groups of arrays, and a
large array slab by slab, of which the parcels take so many bytes. `Move` holds the
steps of a group, as `assembly` works them out once, with the programs of `programs`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from realjax.core.arrays import Array
from realjax.realloc import programs


def slice_and_join(
    moves: Sequence["Move"],
    arrays: Sequence[Array],
    *,
    targets: Sequence[Array | None] | None = None,
    eta: Any = None,
) -> dict[int, Array]:
    """Move arrays piece by piece.

    Args:
        moves: From `assembly.plan_moves`.
        arrays: As the requests of the plan describe them.
        targets: What each array is averaged with, if it is.
        eta: Returns the weight of the moved arrays on the devices of a mesh.

    Returns:
        The new arrays, by their number among the requests.
    """
    done: dict[int, Array] = {}
    # Where there is one step in all, nobody counts and nobody waits.
    is_alone = sum(move.steps for move in moves) == 1
    gates = None if is_alone else Gates()
    for move in moves:
        done.update(move.run(arrays, targets, eta, gates))
    return done


class View(NamedTuple):
    """Shards of one array, on the devices of a program, seen as one array."""

    leaf: int
    places: tuple[int, ...]  # of each device, in the mesh of the array
    shape: tuple[int, ...]
    sharding: Sharding

    def of(self, array: Array) -> Array:
        """Return the one array, which shares the buffers of the shards."""
        shards = [shard_of(array, place) for place in self.places]
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, shards
        )


class Arrivals(NamedTuple):
    """Parcels, one for every device of a program, seen as one array."""

    numbers: tuple[int, ...]
    shape: tuple[int, ...]
    sharding: Sharding

    def of(self, parcels: Sequence[Array]) -> Array:
        """Return the one array, which shares the buffers of the parcels."""
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, [parcels[number] for number in self.numbers]
        )


class Cut(NamedTuple):
    """A program that packs parcels; output o of device d has number first + o n + d."""

    function: Any
    mesh: Mesh
    shards: tuple[View, ...]


class Join(NamedTuple):
    """A program that makes new shards."""

    function: Any
    begin: Any  # makes what a stepped join writes into; None for one step
    mesh: Mesh
    shards: tuple[View, ...]
    received: tuple["Arrivals", ...]
    targets: tuple[View, ...]  # what is averaged with
    makes: tuple[int, ...]  # arrays
    devices: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Move:
    """The steps of a group of arrays.

    Attributes:
        steps: How often cuts, copies and joins run.
        cuts: What source devices pack; their buffers are numbered.
        sends: Parcels by number: (None, buffer), or (array, place of the shard) for a
            shard that travels as it is.
        homes: Where each parcel goes.
        whole: (array, device) of the new shards that are a parcel as it came.
        joins: What destination devices make.
        stays: Array, device and place of the shards that are shared with the source.
        results: Array, shape, sharding and devices of what is made.
    """

    steps: int
    cuts: tuple[Cut, ...]
    sends: tuple[tuple[int | None, int], ...]
    homes: list[SingleDeviceSharding]
    whole: dict[tuple[int, int], int]
    joins: tuple[Join, ...]
    stays: tuple[tuple[int, int, int], ...]
    results: tuple[tuple[int, tuple[int, ...], Sharding, tuple[int, ...]], ...]

    def run(
        self,
        arrays: Sequence[Array],
        targets: Sequence[Any] | None,
        eta: Any,
        gates: "Gates | None",
    ) -> Iterator[tuple[int, Array]]:
        """Issue all steps; give out the new arrays with their numbers.

        Args:
            arrays: See `slice_and_join`.
            targets: The same.
            eta: The same.
            gates: What keeps this step behind the one before; None for an only step.
        """
        sources = [[view.of(arrays[view.leaf]) for view in c.shards] for c in self.cuts]
        kept = [[view.of(arrays[view.leaf]) for view in j.shards] for j in self.joins]
        weights = [eta(join.mesh) if eta else None for join in self.joins]
        made: list[list[Array]] = [[] for _ in self.joins]
        at: list[Any] = [None] * len(self.cuts)
        counts: list[Any] = [None] * len(self.joins)
        if gates is not None:
            at = [gates.zero(cut.mesh) for cut in self.cuts]
            counts = [gates.zero(join.mesh) for join in self.joins]
        for number, join in enumerate(self.joins):
            if targets is not None:
                made[number] = [view.of(targets[view.leaf]) for view in join.targets]
            if join.begin is not None:
                made[number], _ = join.begin(made[number], counts[number])
        for step in range(self.steps):
            tokens: dict[int, Array] = {}
            parcels = self._send(arrays, sources, at, gates)
            for number, join in enumerate(self.joins):
                made[number], counts[number], _ = join.function(
                    made[number],
                    kept[number] + [view.of(parcels) for view in join.received],
                    counts[number],
                    weights[number],
                )
                if gates is not None:
                    for place, device in enumerate(join.devices):
                        tokens[device] = counts[number].addressable_data(place)
            if gates is not None:
                gates.close(tokens)
            if step + 1 < self.steps:
                del parcels
        shards = {key: parcels[number] for key, number in self.whole.items()}
        for leaf, device, place in self.stays:
            shards[leaf, device] = shard_of(arrays[leaf], place)
        for join, arrays_made in zip(self.joins, made, strict=True):
            for leaf, array in zip(join.makes, arrays_made, strict=True):
                for place, device in enumerate(join.devices):
                    shards[leaf, device] = shard_of(array, place)
        for leaf, shape, sharding, devices in self.results:
            parts = [shards[leaf, device] for device in devices]
            yield (
                leaf,
                jax.make_array_from_single_device_arrays(shape, sharding, parts),
            )

    def _send(
        self,
        arrays: Sequence[Array],
        sources: list[list[Array]],
        at: list[Any],
        gates: "Gates | None",
    ) -> list[Array]:
        """Cut one step's parcels, and copy them to where they go."""
        buffers: list[Array] = []
        for number, cut in enumerate(self.cuts):
            gate = gates.of(cut.mesh) if gates is not None else None
            packed, at[number], _ = cut.function(sources[number], at[number], gate)
            for buffer in packed:
                buffers += [shard_of(buffer, place) for place in range(cut.mesh.size)]
        parcels = [
            buffers[place] if leaf is None else shard_of(arrays[leaf], place)
            for leaf, place in self.sends
        ]
        return jax.device_put(parcels, self.homes, may_alias=False)


class Gates:
    """Keeps every step behind the one before, so that few parcels are there at once.

    Devices run whatever has its inputs, and memory is taken when a program or a copy is
    issued. So a cut takes a token as well, which the join before it gave out. On a CPU
    memory that is not touched costs nothing, and Python may issue all steps ahead; on
    other devices it waits for the last one.
    """

    def __init__(self):
        """Nothing was joined yet."""
        self._last: dict[int, Array] = {}
        self._zeros: dict[Mesh, Array] = {}

    def zero(self, mesh: Mesh) -> Array:
        """Return step 0 on the devices of a program; nothing is uploaded."""
        # Once for all moves: a device has room for 32 programs that wait, and Python
        # is held up by the next one.
        if mesh not in self._zeros:
            self._zeros[mesh] = _zero_function(mesh)()
        return self._zeros[mesh]

    def close(self, tokens: dict[int, Array]) -> None:
        """Take over what the joins of a step gave out, by device."""
        self._last = tokens or self._last

    def of(self, mesh: Mesh) -> Array | None:
        """Return what a cut waits for: its own device's join, or else another one's."""
        devices = list(mesh.devices.flat)
        if devices[0].platform != "cpu":
            jax.block_until_ready(self._last)
        if not self._last:
            return None
        others = list(self._last.values())
        tokens = [
            self._last.get(device.id, others[place % len(others)])
            for place, device in enumerate(devices)
        ]
        homes = [SingleDeviceSharding(device) for device in devices]
        return jax.make_array_from_single_device_arrays(
            (mesh.size,), programs.over(mesh, 1), jax.device_put(tokens, homes)
        )


@functools.lru_cache(maxsize=1024)
def _zero_function(mesh: Mesh) -> Any:
    sharding = programs.over(mesh, 1)
    return jax.jit(lambda: jnp.zeros(mesh.size, jnp.int32), out_shardings=sharding)


def shard_of(array: Array, place: int) -> Array:
    """Return what an array holds on the device at a place of its mesh.

    `addressable_data` alone is the fast way, and gives any copy of a replicated array.
    """
    if array.is_fully_replicated:
        return array.addressable_shards[place].data
    return array.addressable_data(place)
