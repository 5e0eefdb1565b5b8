"""Arrays made on their devices piece by piece, so that host memory holds one piece.

An array is read by what each device of this process will hold of it. A large one is
made of zeros on the devices first, and filled by chunks: the same part of every
device's shard at a time, written in place.

    device 0  [ . . . . ]        device 1  [ . . . . ]
                ^ chunk 0                    ^ chunk 0      read, copied, written
                  ^ chunk 1                    ^ chunk 1

Parts that lie side by side in the array are read together, and each once.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from realjax.core.arrays import Array
from realjax.models.layout import Box

CHUNK_BYTES = 32 * 2**20
"""Of an array that are read at a time, for all devices of a process together."""

Bounds = tuple[tuple[int, int], ...]


def stream(
    shape: tuple[int, ...],
    sharding: Sharding,
    read: Callable[[Box], np.ndarray],
    dtype: np.dtype,
    *,
    order: Sequence[int] = (),
    chunk_bytes: int = CHUNK_BYTES,
) -> Array:
    """Make an array of the parts that `read` gives.

    All processes whose devices are in the sharding must call this; each reads what its
    own devices hold.

    Args:
        shape: of the whole array.
        sharding: of the array.
        read: reads a part; every slice has a start and a stop.
        dtype: of the array, and of what is read.
        order: dimensions to cut chunks along, first those that cost least to cut.
        chunk_bytes: of a chunk, for all devices of a process together.
    """
    if not sharding.addressable_devices:
        return jax.make_array_from_single_device_arrays(
            shape, sharding, [], dtype=dtype
        )
    shard_shape = sharding.shard_shape(shape)
    num_elements = chunk_bytes // (_most_local_devices(sharding) * dtype.itemsize)
    chunk_shape = cut_shape(shard_shape, order, num_elements)
    if chunk_shape == shard_shape or not _can_fill(sharding):
        return _place(shape, shard_shape, sharding, read, dtype, shard_shape)
    array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    for start in _starts(shard_shape, chunk_shape):
        chunk = _place(shape, chunk_shape, sharding, read, dtype, shard_shape, start)
        array = _fill(array, chunk, np.asarray(start, np.int32), sharding)
        # Otherwise chunks pile up on the host faster than devices take them.
        jax.block_until_ready(array)
    return array


def cut_shape(
    shape: tuple[int, ...], order: Sequence[int], num_elements: int
) -> tuple[int, ...]:
    """Return the shape of chunks of an array, all equal, that may overlap.

    Args:
        shape: of the array.
        order: dimensions to cut, the next one only when the one before is cut to
            single indices.
        num_elements: most of a chunk, if cutting along `order` suffices for that.
    """
    sizes = list(shape)
    for dimension in order:
        whole = math.prod(sizes)
        if whole <= num_elements:
            break
        most = max(1, num_elements * sizes[dimension] // whole)
        num_chunks = -(-sizes[dimension] // most)
        sizes[dimension] = -(-sizes[dimension] // num_chunks)
    return tuple(sizes)


def read_parts(
    wanted: Sequence[Bounds], read: Callable[[Box], np.ndarray]
) -> dict[Bounds, np.ndarray]:
    """Read parts of an array, those side by side together and equal ones once."""
    parts = {}
    for hull in _hulls(set(wanted)):
        whole = read(tuple(slice(*bound) for bound in hull))
        for bounds in set(wanted):
            pairs = zip(hull, bounds, strict=True)
            if all(h[0] <= b[0] and b[1] <= h[1] for h, b in pairs):
                origin = [start for start, _ in hull]
                parts[bounds] = whole[
                    tuple(
                        slice(start - first, stop - first)
                        for (start, stop), first in zip(bounds, origin, strict=True)
                    )
                ]
    return parts


def _hulls(boxes: set[Bounds]) -> set[Bounds]:
    """Merge boxes that share all bounds but one, and touch there."""
    for dimension in range(len(next(iter(boxes)))):
        rows: dict[Bounds, list[tuple[int, int]]] = {}
        for box in sorted(boxes):
            others = box[:dimension] + box[dimension + 1 :]
            row = rows.setdefault(others, [])
            if row and row[-1][1] == box[dimension][0]:
                row[-1] = (row[-1][0], box[dimension][1])
            else:
                row.append(box[dimension])
        boxes = {
            (*others[:dimension], bound, *others[dimension:])
            for others, row in rows.items()
            for bound in row
        }
    return boxes


def _most_local_devices(sharding: Sharding) -> int:
    """Most devices of one process: chunks must be alike in all of them."""
    owners = [device.process_index for device in sharding.device_set]
    return max(owners.count(owner) for owner in set(owners))


def _can_fill(sharding: Sharding) -> bool:
    """Whether shards can be written in place: in the devices' own memory."""
    device = next(iter(sharding.device_set))
    is_own = sharding.memory_kind in (None, device.default_memory().kind)
    return is_own and (
        isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1
    )


def _starts(
    shard_shape: tuple[int, ...], chunk_shape: tuple[int, ...]
) -> Sequence[tuple[int, ...]]:
    """Where chunks start in a shard; the last of a row is moved back to fit."""
    axes = [
        [min(start, n - size) for start in range(0, n, size)]
        for n, size in zip(shard_shape, chunk_shape, strict=True)
    ]
    return list(itertools.product(*axes))


def _place(
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    sharding: Sharding,
    read: Callable[[Box], np.ndarray],
    dtype: np.dtype,
    shard_shape: tuple[int, ...],
    start: tuple[int, ...] | None = None,
) -> Array:
    """Put the same part of every shard on its device, as one array of its own."""
    start = start or (0,) * len(shape)

    def bounds_of(index: tuple[slice, ...], sizes: tuple[int, ...]) -> Bounds:
        """The part of the whole array for a device, by its place in an array."""
        return tuple(
            (
                s.indices(n)[0] // size * shard + first,
                s.indices(n)[0] // size * shard + first + size,
            )
            for s, n, size, shard, first in zip(
                index, sizes, chunk_shape, shard_shape, start, strict=True
            )
        )

    chunks = tuple(
        n // shard * size
        for n, shard, size in zip(shape, shard_shape, chunk_shape, strict=True)
    )
    indices = sharding.addressable_devices_indices_map(chunks).values()
    parts = read_parts([bounds_of(index, chunks) for index in indices if index], read)
    take: Any = lambda index: parts[bounds_of(index, chunks)]
    return jax.make_array_from_callback(chunks, sharding, take, dtype)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _fill(array: Array, chunk: Array, start: Array, sharding: Sharding) -> Array:
    """Write every shard's chunk into the shard."""

    def write(shard: Array, part: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice(shard, part, tuple(start))

    if not isinstance(sharding, NamedSharding):
        return write(array, chunk, start)
    return jax.shard_map(
        write,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, sharding.spec, PartitionSpec()),
        out_specs=sharding.spec,
        check_vma=False,
    )(array, chunk, start)
