"""Reallocation between devices of several processes.

Every process runs the same program and asks for the same moves in the same order. It
cuts, sends, receives and joins what concerns its own devices (`parcels` says what);
arrays that lie elsewhere are handles: they have a shape, a type and a sharding, and no
shard. Parcels cross by one `device_put` per pair of devices, in sorted order.

On GPUs that is a send and a receive of NCCL, which only the two processes issue. CPUs
have sockets, where JAX tells copies apart by how many a process has issued so far:
there every process issues all of them, those of others on handles.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from realjax.core.arrays import Array
from realjax.realloc.layouts import Layout
from realjax.realloc.parcel_plans import plan_chunks
from realjax.realloc.parcels import Steps
from realjax.realloc.processes import handle, home, is_counted_by_all, processes_of
from realjax.realloc.requests import Request


def where(request: Request) -> Literal["here", "across", "elsewhere"]:
    """Tell whether a move is of this process alone, of several, or of another."""
    processes = processes_of(request.source, request.destination)
    if len(processes) > 1:
        return "across"
    return "here" if processes == {jax.process_index()} else "elsewhere"


def upload(array: np.ndarray, sharding: Sharding) -> Array:
    """Put an array of the host on devices: each process its own shards.

    So a process needs right numbers only where its own devices have them. Later
    writes to the array do not show.
    """
    if not sharding.addressable_devices:
        return handle(array.shape, array.dtype, sharding)
    # A copy of each shard: a CPU device may take a buffer for its own.
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.array(array[index]), dtype=array.dtype
    )


def replicated(array: Array, mesh: Mesh) -> Array:
    """Return copies of an array of this process on all devices of a mesh.

    Every process that has some of them gives an equal array.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    places = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    copies = jax.device_put([array] * len(places), places, may_alias=False)
    return jax.make_array_from_single_device_arrays(
        array.shape, sharding, copies, dtype=array.dtype
    )


def renamed(array: Array, sharding: Sharding) -> Array:
    """Return the array itself, under the name that its sharding has over there."""
    shards = {shard.device.id: shard.data for shard in array.addressable_shards}
    return _from_shards(array.shape, array.dtype, sharding, shards)


def cross(
    requests: Sequence[Request],
    arrays: Sequence[Array],
    *,
    chunk_bytes: int,
    targets: Sequence[Array] | None = None,
    weight: Callable[[Mesh], Array] | None = None,
    is_donated: bool = False,
) -> list[Array]:
    """Move arrays between devices of any processes, piece by piece.

    Every process calls it, for the same requests in the same order, and waits in it
    for all chunks but the last.

    Args:
        requests: What to do with each array.
        arrays: In the same order, as the requests describe them; handles, where they
            lie in other processes.
        chunk_bytes: About how much of them is on its way at once.
        targets: What each array is averaged with, where its request says so.
        weight: Returns the weight of the arrays in the averages, on a mesh.
        is_donated: The targets are written in place.

    Returns:
        The arrays in their new layouts; handles, where this process has no part.
    """
    held = [_shards(array) for array in arrays]
    kept = [_shards(target) for target in targets or ()]
    made: dict[tuple[int, int], Array] = {}
    if targets is not None and is_donated:
        made.update(
            ((leaf, device), shard)
            for leaf, request in enumerate(requests)
            if request.is_mixed
            for device, shard in kept[leaf].items()
        )
    parcels: dict[tuple[int, int], Array] = {}
    for steps in plan_chunks(tuple(requests), chunk_bytes, is_donated):
        # A place for what comes is taken when it is asked for: so one chunk is asked
        # for when the one before is there, and two live beside sources and results.
        jax.block_until_ready(list(parcels.values()))
        parcels = _send(steps, held)
        _join(steps, parcels, held, kept, made, weight)
    return [
        _from_shards(
            request.shape,
            request.new_dtype,
            request.destination,
            {device: shard for (of, device), shard in made.items() if of == leaf},
        )
        for leaf, request in enumerate(requests)
    ]


_Shards = dict[int, Array]


def _join(
    steps: Steps,
    parcels: dict[tuple[int, int], Array],
    held: Sequence[_Shards],
    kept: Sequence[_Shards],
    made: dict[tuple[int, int], Array],
    weight: Callable[[Mesh], Array] | None,
) -> None:
    """Put new shards, or more of them, into `made`."""
    for leaf, device, number in steps.whole:
        made[leaf, device] = parcels[number, device]
    for call in steps.joins:
        joined = call.function(
            [held[leaf][call.device] for leaf in call.leaves],
            [parcels[number, call.device] for number in call.parcels],
            [made[leaf, call.device] for leaf in call.continues],
            [kept[leaf][call.device] for leaf in call.averages],
            None if weight is None else weight(_mesh_of(call.device)),
        )
        for leaf, array in zip(call.makes, joined, strict=True):
            made[leaf, call.device] = array


def _send(steps: Steps, held: Sequence[_Shards]) -> dict[tuple[int, int], Array]:
    """Pack, send and relay; return the parcels that are here, by (number, device)."""
    at: dict[tuple[int, int], Array] = {}
    for number, leaf in steps.shards:
        source = steps.parcels[number].source
        at[number, source] = held[leaf][source]
    for call in steps.packs:
        packed = call.function([held[leaf][call.device] for leaf in call.leaves])
        for number, parcel in zip(call.parcels, packed, strict=True):
            at[number, call.device] = parcel
    # A socket reads what it sends when the other end asks for it, and may find that a
    # train step has taken the shard as its own: it gets a copy that nobody takes.
    lent = {number for number, _ in steps.shards} if is_counted_by_all() else set()
    for source, destination, numbers in steps.links:
        sent = [
            (jnp.copy(at[number, source]) if number in lent else at[number, source])
            if (number, source) in at
            else handle(
                steps.parcels[number].shape, steps.parcels[number].dtype, home(source)
            )
            for number in numbers
        ]
        came = jax.device_put(sent, [home(destination)] * len(sent))
        if home(destination).is_fully_addressable:
            for number, parcel in zip(numbers, came, strict=True):
                at[number, destination] = parcel
    # Relays take what has just come across.
    copied = jax.device_put(
        [at[number, source] for number, source, _ in steps.copies],
        [home(destination) for _, _, destination in steps.copies],
        may_alias=False,
    )
    for (number, _, destination), parcel in zip(steps.copies, copied, strict=True):
        at[number, destination] = parcel
    return at


def _shards(array: Array) -> _Shards:
    return {shard.device.id: shard.data for shard in array.addressable_shards}


def _from_shards(
    shape: tuple[int, ...], dtype: Any, sharding: Sharding, shards: _Shards
) -> Array:
    """Make an array of the shards that this process has of it."""
    return jax.make_array_from_single_device_arrays(
        shape,
        sharding,
        [shards[d] for d in Layout.of(sharding).devices if d in shards],
        dtype=dtype,
    )


@functools.cache
def _mesh_of(device: int) -> Mesh:
    return Mesh(np.array(list(home(device).device_set)), ("device",))
