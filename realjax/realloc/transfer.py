"""Reallocation: arrays from the layout they have to the layout they shall have.

Every array takes the cheapest of four routes (`routes.KINDS`), none of which passes
through host memory, and all of which give the same bits:

    none   equal layouts                    copied in place, or shared on request
    jit    same devices, direct collectives one jitted identity with new shardings
    put    other devices, shards alike      one native `jax.device_put`
    slice  anything else                    `pieces`: cut, copy, join

`jax.device_put` alone would do the last, and most of the second, through the host.

Results share no buffer with their sources unless `alias=True` says they may, so a
train step can donate the parameters that a generator was given.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from realjax.core.arrays import Array, PyTree
from realjax.realloc.pieces import Request, slice_and_join
from realjax.realloc.routes import KINDS, Kind

CHUNK_BYTES = 256 << 20
"""How much is on its way at once: pieces of a chunk live beside its arrays."""


@dataclasses.dataclass(kw_only=True)
class Traffic:
    """Counts what reallocations moved.

    Attributes:
        leaves: Arrays, by kind of route.
        bytes: Their bytes (whole arrays, in the type they travel in), by kind.
        sent_bytes: Bytes that went from device to device by put and slice.
        collective_bytes: Bytes that the collectives of jit had to move at least.
        uploaded_bytes: Bytes of host arrays that were put on devices.
    """

    leaves: dict[Kind, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(KINDS, 0)
    )
    bytes: dict[Kind, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(KINDS, 0)
    )
    sent_bytes: int = 0
    collective_bytes: int = 0
    uploaded_bytes: int = 0

    def merge(self, other: "Traffic") -> None:
        """Add another's counts to these."""
        for kind in KINDS:
            self.leaves[kind] += other.leaves[kind]
            self.bytes[kind] += other.bytes[kind]
        self.sent_bytes += other.sent_bytes
        self.collective_bytes += other.collective_bytes
        self.uploaded_bytes += other.uploaded_bytes

    def as_dict(self, prefix: str = "realloc/") -> dict[str, int]:
        """Return the counts as metrics, as in `realloc/bytes_slice`."""
        return {
            **{f"{prefix}leaves_{kind}": self.leaves[kind] for kind in KINDS},
            **{f"{prefix}bytes_{kind}": self.bytes[kind] for kind in KINDS},
            f"{prefix}sent_bytes": self.sent_bytes,
            f"{prefix}collective_bytes": self.collective_bytes,
            f"{prefix}uploaded_bytes": self.uploaded_bytes,
        }

    def _count(self, request: Request) -> None:
        kind = request.route.kind
        self.leaves[kind] += 1
        self.bytes[kind] += request.wire_bytes
        if kind == "jit":
            self.collective_bytes += request.route.bytes_moved
        else:
            self.sent_bytes += request.route.bytes_moved


def reallocate(
    tree: PyTree,
    shardings: PyTree,
    *,
    dtype: Any = None,
    traffic: Traffic | None = None,
    alias: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> PyTree:
    """Return the same arrays in other layouts, bit for bit.

    Args:
        tree: Arrays in device memory.
        shardings: The shardings they shall have; a prefix of the tree will do.
        dtype: Floating arrays are cast to it, before they travel where it is narrower.
        traffic: Counts what moves; added to.
        alias: Where nothing changes, return the array itself instead of a copy.
        chunk_bytes: Arrays are moved in groups of about so many bytes (one at least),
            which bounds the memory that pieces take beside sources and results.

    Raises:
        ValueError: shardings of another structure, arrays in host memory or of other
            processes, or dimensions that do not divide.
    """
    leaves, structure = jax.tree.flatten(tree)
    requests = [
        _request(path, leaf, sharding, dtype)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(tree),
            _destinations(shardings, tree),
            strict=True,
        )
    ]
    moved = _move(requests, leaves, traffic, alias, chunk_bytes)
    return jax.tree.unflatten(structure, moved)


def move_array(
    array: Array | np.ndarray,
    sharding: Sharding,
    *,
    traffic: Traffic | None = None,
    alias: bool = False,
) -> Array:
    """Return one array in another layout; a NumPy array is uploaded."""
    if isinstance(array, np.ndarray):
        return _upload([array], [sharding], traffic)[0]
    return reallocate(array, sharding, traffic=traffic, alias=alias)


def move_batch(
    arrays: Mapping[str, Array | np.ndarray | None],
    shardings: Mapping[str, Sharding] | Callable[[Any], Sharding],
    *,
    traffic: Traffic | None = None,
    alias: bool = False,
) -> dict[str, Array | None]:
    """Return the arrays of a batch in other layouts.

    Args:
        arrays: By key; NumPy arrays are uploaded, once each, and None stays None.
        shardings: By key, or a function of the array.
        traffic: Counts what moves; added to.
        alias: Where nothing changes, return the array itself instead of a copy.

    Raises:
        ValueError: a key without a sharding, or as `reallocate`.
    """
    if isinstance(shardings, Mapping) and not arrays.keys() <= shardings.keys():
        raise ValueError(
            f"No sharding for {sorted(arrays.keys() - shardings.keys())}. Give one for"
            f" every key of the batch: {sorted(arrays)}."
        )
    wanted = {
        key: shardings(x) if callable(shardings) else shardings[key]
        for key, x in arrays.items()
        if x is not None
    }
    on_host = {k: x for k, x in arrays.items() if isinstance(x, np.ndarray)}
    uploaded = _upload(
        list(on_host.values()), [wanted[key] for key in on_host], traffic
    )
    on_device = {k: x for k, x in arrays.items() if isinstance(x, jax.Array)}
    moved = reallocate(
        on_device,
        {key: wanted[key] for key in on_device},
        traffic=traffic,
        alias=alias,
    )
    done = {**dict(zip(on_host, uploaded, strict=True)), **moved}
    return {key: done.get(key) for key in arrays}


def _upload(
    arrays: Sequence[np.ndarray],
    shardings: Sequence[Sharding],
    traffic: Traffic | None,
) -> list[Array]:
    """Put host arrays on devices; later writes to them do not show."""
    if traffic is not None:
        traffic.uploaded_bytes += sum(array.nbytes for array in arrays)
    # A CPU device takes a buffer that begins at a multiple of 64 bytes for its own,
    # `may_alias=False` or not: it gets one that nobody else has.
    copies = [np.array(array) for array in arrays]
    return jax.device_put(copies, list(shardings), may_alias=False)


def _destinations(shardings: PyTree, tree: PyTree) -> list[Sharding]:
    try:
        return jax.tree.leaves(jax.tree.broadcast(shardings, tree))
    except ValueError as error:
        raise ValueError(
            f"The shardings do not match the arrays: {error}. Give one sharding for"
            " every array, or one for a whole branch."
        ) from None


def _request(path: Any, leaf: Any, sharding: Sharding, dtype: Any) -> Request:
    name = f"Array {jax.tree_util.keystr(path) or 'given'}"
    if not isinstance(leaf, jax.Array):
        raise ValueError(
            f"{name} is a {type(leaf).__name__}. Parameters are put on devices when"
            " they are made or loaded; `move_array` uploads a NumPy array."
        )
    if leaf.is_deleted():
        raise ValueError(
            f"{name} was donated or deleted. Reallocate the array that the donating"
            " function returned."
        )
    if not (leaf.is_fully_addressable and sharding.is_fully_addressable):
        raise ValueError(
            f"{name} lies or shall lie on devices of other processes, and reallocation"
            " works within one process. Give it an allocation of local devices."
        )
    for found in (leaf.sharding, sharding):
        device = next(iter(found.device_set))
        if found.memory_kind not in (None, device.default_memory().kind):
            raise ValueError(
                f"{name}: memory kind {found.memory_kind!r}; reallocation works in"
                " device memory. Bring the array back with `to_device` first."
            )
    is_cast = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
    return Request(
        source=leaf.sharding,
        destination=sharding,
        shape=leaf.shape,
        dtype=leaf.dtype,
        new_dtype=np.dtype(dtype) if is_cast else leaf.dtype,
    )


def _move(
    requests: Sequence[Request],
    arrays: Sequence[Array],
    traffic: Traffic | None,
    alias: bool,
    chunk_bytes: int,
) -> list[Array]:
    """Sort the arrays by route, and send each group, chunk by chunk, on its way."""
    moved: list[Any] = [None] * len(arrays)
    groups: dict[Any, list[int]] = {}
    for index, request in enumerate(requests):
        kind = request.route.kind
        if traffic is not None:
            traffic._count(request)
        if kind == "none" and alias and request.dtype == request.new_dtype:
            moved[index] = _shared(arrays[index], request.destination)
            continue
        # A jitted identity works on one list of devices.
        devices = (
            tuple(request.destination.device_set) if kind in ("none", "jit") else ()
        )
        groups.setdefault((kind, devices), []).append(index)
    for (kind, _), indices in groups.items():
        send = {"put": _put, "slice": slice_and_join}.get(kind, _identity)
        for chunk in _chunks(indices, requests, chunk_bytes):
            done = send([requests[i] for i in chunk], [arrays[i] for i in chunk])
            for index, array in zip(chunk, done, strict=True):
                moved[index] = array
    return moved


def _chunks(
    indices: Sequence[int], requests: Sequence[Request], chunk_bytes: int
) -> Iterator[list[int]]:
    chunk: list[int] = []
    size = 0
    for index in indices:
        if chunk and size + requests[index].wire_bytes > chunk_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append(index)
        size += requests[index].wire_bytes
    if chunk:
        yield chunk


def _shared(array: Array, sharding: Sharding) -> Array:
    """Return the array itself, under the name that its sharding has over there."""
    if array.sharding == sharding:
        return array
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    order = sharding.devices_indices_map(array.shape)
    return jax.make_array_from_single_device_arrays(
        array.shape, sharding, [shards[device] for device in order]
    )


def _put(requests: Sequence[Request], arrays: Sequence[Array]) -> list[Array]:
    """Copy every shard as it is to its counterpart; cast where fewer bytes travel."""
    narrowed = _cast(
        arrays,
        tuple(request.source for request in requests),
        tuple(request.wire_dtype for request in requests),
    )
    destinations = tuple(request.destination for request in requests)
    copied = jax.device_put(narrowed, list(destinations), may_alias=False)
    return _cast(copied, destinations, tuple(r.new_dtype for r in requests))


def _cast(
    arrays: Sequence[Array],
    shardings: tuple[Sharding, ...],
    dtypes: tuple[np.dtype, ...],
) -> list[Array]:
    """Cast in place, leaving alone the arrays that have their type."""
    cast = list(arrays)
    todo = [i for i, x in enumerate(arrays) if x.dtype != dtypes[i]]
    if todo:
        function = _identity_function(
            tuple(shardings[i] for i in todo), tuple(dtypes[i] for i in todo)
        )
        for index, array in zip(todo, function([cast[i] for i in todo]), strict=True):
            cast[index] = array
    return cast


def _identity(requests: Sequence[Request], arrays: Sequence[Array]) -> list[Array]:
    function = _identity_function(
        tuple(request.destination for request in requests),
        tuple(request.new_dtype for request in requests),
    )
    return function(list(arrays))


@functools.lru_cache(maxsize=512)
def _identity_function(
    shardings: tuple[Sharding, ...], dtypes: tuple[np.dtype, ...]
) -> Callable[[list[Array]], list[Array]]:
    def reallocated(arrays: list[Array]) -> list[Array]:
        # A copy, because a jitted function may return an argument as it is.
        pairs = zip(arrays, dtypes, strict=True)
        return [jnp.copy(array).astype(dtype) for array, dtype in pairs]

    return jax.jit(reallocated, out_shardings=list(shardings))
