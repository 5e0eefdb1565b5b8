"""Arrays made on their devices piece by piece, so that host memory holds one piece.

An array is read by what each device of this process will hold of it. A large one is
made of zeros on the devices first, and filled by chunks: the same part of every
device's shard at a time, written in place.

    device 0  [ . . . . ]        device 1  [ . . . . ]
                ^ chunk 0                    ^ chunk 0      read, copied, written
                  ^ chunk 1                    ^ chunk 1

Parts that lie side by side in the array are read together, and each once.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from realjax.core.arrays import Array
from realjax.models.layout import Box

CHUNK_BYTES = 16 * 2**20
"""Of an array that are read at a time, for all devices of a process together."""

Bounds = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """What is known of an array that is to be read.

    Attributes:
        shape: of the whole array.
        dtype: it shall have.
        read: reads a part; every slice has a start and a stop.
        read_dtype: of what `read` gives; cast on the devices.
        order: its dimensions, as they lie in memory in what `read` gives. Devices put
            them in order, as they do that faster.
        cuts: dimensions to cut chunks along, first those that cost least to cut.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Box], np.ndarray]
    read_dtype: np.dtype
    order: tuple[int, ...]
    cuts: tuple[int, ...] = ()


def stream(
    reader: Reader, sharding: Sharding, *, chunk_bytes: int = CHUNK_BYTES
) -> Array:
    """Make an array of the parts that are read.

    All processes whose devices are in the sharding must call this; each reads what its
    own devices hold.

    Args:
        reader: of the array.
        sharding: of the array.
        chunk_bytes: of a chunk, for all devices of a process together.
    """
    shape, dtype = reader.shape, reader.dtype
    if not sharding.addressable_devices:
        return jax.make_array_from_single_device_arrays(
            shape, sharding, [], dtype=dtype
        )
    shard_shape = sharding.shard_shape(shape)
    num_elements = chunk_bytes // (_most_local_devices(sharding) * dtype.itemsize)
    chunk_shape = cut_shape(shard_shape, reader.cuts, num_elements)
    if chunk_shape == shard_shape or not _can_fill(sharding):
        as_it_is = dataclasses.replace(reader, order=tuple(range(len(shape))))
        whole = _Chunks(as_it_is, sharding, shard_shape, shard_shape)
        return whole.place((0,) * len(shape), dtype)
    chunks = _Chunks(reader, sharding, shard_shape, chunk_shape)
    array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    for start in chunks.starts():
        chunk = chunks.place(start, reader.read_dtype)
        first = np.asarray(start, np.int32)
        array = _fill(array, chunk, first, reader.order, sharding)
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


class _Chunks:
    """The same part of every shard, as an array of its own."""

    def __init__(
        self,
        reader: Reader,
        sharding: Sharding,
        shard_shape: tuple[int, ...],
        chunk_shape: tuple[int, ...],
    ):
        self.reader, self.shard_shape = reader, shard_shape
        self.chunk_shape = chunk_shape
        self.sharding = _permuted(sharding, reader.order)
        shape = [
            n // shard * size
            for n, shard, size in zip(
                reader.shape, shard_shape, chunk_shape, strict=True
            )
        ]
        self.shape = tuple(shape[dimension] for dimension in reader.order)

    def starts(self) -> list[tuple[int, ...]]:
        """Where chunks start in a shard; the last of a row is moved back to fit."""
        axes = [
            [min(start, n - size) for start in range(0, n, size)]
            for n, size in zip(self.shard_shape, self.chunk_shape, strict=True)
        ]
        return list(itertools.product(*axes))

    def place(self, start: tuple[int, ...], dtype: np.dtype) -> Array:
        """Read the chunks at a place of the shards, and put each on its device."""
        indices = self.sharding.addressable_devices_indices_map(self.shape).values()
        wanted = [self._bounds(index, start) for index in indices if index is not None]
        parts = read_parts(wanted, self.reader.read)

        def take(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # Only arrays without a shape have no index.
            part = parts[self._bounds(index, start)].transpose(self.reader.order)
            return np.ascontiguousarray(part, dtype)

        return jax.make_array_from_callback(self.shape, self.sharding, take, dtype)

    def _bounds(self, index: tuple[slice, ...], start: tuple[int, ...]) -> Bounds:
        """Return the part of the whole array for a device, by its place in chunks."""
        bounds = [(0, 0)] * len(start)
        for dimension, part in zip(self.reader.order, index, strict=True):
            size = self.chunk_shape[dimension]
            number = (part.start or 0) // size
            first = number * self.shard_shape[dimension] + start[dimension]
            bounds[dimension] = (first, first + size)
        return tuple(bounds)


def _permuted(sharding: Sharding, order: tuple[int, ...]) -> Sharding:
    """Return the sharding of an array whose dimensions are in another order."""
    if not isinstance(sharding, NamedSharding) or order == tuple(range(len(order))):
        return sharding
    return NamedSharding(sharding.mesh, _permuted_spec(sharding.spec, order))


def _permuted_spec(spec: PartitionSpec, order: tuple[int, ...]) -> PartitionSpec:
    entries = [*spec, *[None] * (len(order) - len(spec))]
    return PartitionSpec(*(entries[dimension] for dimension in order))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _fill(
    array: Array,
    chunk: Array,
    start: Array,
    order: tuple[int, ...],
    sharding: Sharding,
) -> Array:
    """Write every shard's chunk into the shard."""

    def write(shard: Array, part: Array, start: Array) -> Array:
        part = part.transpose(np.argsort(order)).astype(shard.dtype)
        return jax.lax.dynamic_update_slice(shard, part, tuple(start))

    if not isinstance(sharding, NamedSharding):
        return write(array, chunk, start)
    return jax.shard_map(
        write,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, _permuted_spec(sharding.spec, order), PartitionSpec()),
        out_specs=sharding.spec,
        check_vma=False,
    )(array, chunk, start)
