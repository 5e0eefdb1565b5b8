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
    for move in moves:
        done.update(move.run(arrays, targets, eta))
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
    # Numbers of the parcels each device receives, and how they are seen as one array.
    received: tuple[tuple[tuple[int, ...], tuple[int, ...], Sharding], ...]
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
        results: Array, shape, sharding and devices of what is made.
    """

    steps: int
    cuts: tuple[Cut, ...]
    sends: tuple[tuple[int | None, int], ...]
    homes: list[SingleDeviceSharding]
    whole: dict[tuple[int, int], int]
    joins: tuple[Join, ...]
    results: tuple[tuple[int, tuple[int, ...], Sharding, tuple[int, ...]], ...]

    def run(
        self, arrays: Sequence[Array], targets: Sequence[Any] | None, eta: Any
    ) -> Iterator[tuple[int, Array]]:
        """Issue all steps; give out the new arrays with their numbers."""
        sources = [[view.of(arrays[view.leaf]) for view in c.shards] for c in self.cuts]
        kept = [[view.of(arrays[view.leaf]) for view in j.shards] for j in self.joins]
        weights = [eta(join.mesh) if eta else None for join in self.joins]
        made: list[list[Array]] = [[] for _ in self.joins]
        counts: list[Any] = [None] * len(self.joins)
        for number, join in enumerate(self.joins):
            if targets is not None:
                made[number] = [view.of(targets[view.leaf]) for view in join.targets]
            if join.begin is not None:
                made[number], counts[number] = join.begin(made[number])
            elif self.steps > 1:
                counts[number] = _zero(join.mesh)
        at = [_zero(cut.mesh) if self.steps > 1 else None for cut in self.cuts]
        parcels: list[Array] = []
        for _ in range(self.steps):
            buffers: list[Array] = []
            for number, cut in enumerate(self.cuts):
                packed, at[number] = cut.function(sources[number], at[number])
                for buffer in packed:
                    buffers += [shard_of(buffer, n) for n in range(cut.mesh.size)]
            parcels = jax.device_put(
                [
                    buffers[place] if leaf is None else shard_of(arrays[leaf], place)
                    for leaf, place in self.sends
                ],
                self.homes,
                may_alias=False,
            )
            del buffers
            for number, join in enumerate(self.joins):
                received = [
                    jax.make_array_from_single_device_arrays(
                        shape, sharding, [parcels[parcel] for parcel in numbers]
                    )
                    for numbers, shape, sharding in join.received
                ]
                made[number], counts[number] = join.function(
                    made[number],
                    kept[number] + received,
                    counts[number],
                    weights[number],
                )
        shards = {key: parcels[number] for key, number in self.whole.items()}
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


@functools.lru_cache(maxsize=1024)
def _zero_function(mesh: Mesh) -> Any:
    return jax.jit(lambda: jnp.int32(0), out_shardings=programs.over(mesh, 0))


def _zero(mesh: Mesh) -> Array:
    """Return step 0 on the devices of a program; nothing is uploaded."""
    return _zero_function(mesh)()


def shard_of(array: Array, place: int) -> Array:
    """Return what an array holds on the device at a place of its mesh.

    `addressable_data` alone is the fast way, and gives any copy of a replicated array.
    """
    if array.is_fully_replicated:
        return array.addressable_shards[place].data
    return array.addressable_data(place)
