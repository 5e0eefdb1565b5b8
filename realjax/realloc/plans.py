"""What to do with a whole tree: sorted by route, compiled, and kept.

A tree that moves again between the same layouts finds its plan by the shapes, types and
shardings of its arrays, and then costs Python little more than the calls themselves.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from pallas_kernels.interval_copy import average
from realjax.core.arrays import Array
from realjax.realloc.assembly import plan_moves
from realjax.realloc.crossing import cross, renamed, replicated, upload, where
from realjax.realloc.layouts import Layout
from realjax.realloc.parcels import route_between
from realjax.realloc.pieces import Move, slice_and_join
from realjax.realloc.processes import handle
from realjax.realloc.requests import Request
from realjax.realloc.routes import Kind
from realjax.realloc.traffic import Traffic

MIN_CHUNK_BYTES = 8 << 20
"""Less is on its way at once only if asked for: every chunk costs time in Python."""

CHUNKS = 6
"""A tree moves in about so many chunks."""

Weight = Callable[[Mesh], Array]
"""Returns the weight of a mixture, on all devices of a mesh."""


class UnfitArray(ValueError):
    """An array that cannot be moved, by its number in the tree."""

    def __init__(self, number: int, message: str):
        """Keeps the number; whoever knows the name adds it."""
        super().__init__(message)
        self.number = number


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """How the arrays of a tree go, by number.

    Attributes:
        traffic: What moves.
        same: Arrays that are returned as they are.
        renamed: Arrays that keep their buffers under another sharding, and that.
        identities: Arrays, and the compiled function that makes them.
        puts: Arrays that a native copy brings, and their shardings.
        sliced: Arrays that go in pieces.
        moves: How those go.
        crossing: Arrays that go from process to process, and what is asked for them.
        elsewhere: Arrays that this process has no part in, and what is asked for.
        chunk_bytes: How much is on its way at once.
        is_donated: What arrays are averaged with is written in place.
    """

    traffic: Traffic
    same: tuple[int, ...]
    renamed: tuple[tuple[int, Sharding], ...]
    identities: tuple[tuple[tuple[int, ...], "_Identity"], ...]
    puts: tuple[int, ...]
    put_shardings: list[Sharding]
    sliced: tuple[int, ...]
    moves: tuple[Move, ...]
    crossing: dict[int, Request]
    elsewhere: dict[int, Request]
    chunk_bytes: int
    is_donated: bool

    def run(
        self,
        arrays: Sequence[Array],
        targets: Sequence[Array] | None = None,
        weight: Weight | None = None,
    ) -> list[Array]:
        """Send the arrays on their way.

        Args:
            arrays: As planned for.
            targets: What they are averaged with, if they are.
            weight: Of the arrays in the averages.
        """
        moved: list[Any] = [None] * len(arrays)
        for number in self.same:
            moved[number] = arrays[number]
        for number, sharding in self.renamed:
            moved[number] = renamed(arrays[number], sharding)
        for number, request in self.elsewhere.items():
            moved[number] = handle(
                request.shape, request.new_dtype, request.destination
            )
        for numbers, identity in self.identities:
            made = identity(
                [arrays[n] for n in numbers],
                None if targets is None else [targets[n] for n in numbers],
                weight,
            )
            for number, array in zip(numbers, made, strict=True):
                moved[number] = array
        if self.puts:
            copies = jax.device_put(
                [arrays[n] for n in self.puts], self.put_shardings, may_alias=False
            )
            for number, array in zip(self.puts, copies, strict=True):
                moved[number] = array
        if self.sliced:
            made = slice_and_join(
                self.moves,
                [arrays[n] for n in self.sliced],
                targets=None if targets is None else [targets[n] for n in self.sliced],
                eta=weight,
            )
            for number, array in made.items():
                moved[self.sliced[number]] = array
        if self.crossing:
            made = cross(
                tuple(self.crossing.values()),
                [arrays[n] for n in self.crossing],
                chunk_bytes=self.chunk_bytes,
                targets=None
                if targets is None
                else [targets[n] for n in self.crossing],
                weight=weight,
                is_donated=self.is_donated,
            )
            for number, array in zip(self.crossing, made, strict=True):
                moved[number] = array
        return moved


@functools.lru_cache(maxsize=512)
def make_plan(
    requests: tuple[Request, ...],
    *,
    is_shared: bool,
    is_donated: bool,
    chunk_bytes: int | None,
) -> Plan:
    """Work out how arrays go.

    Args:
        requests: What to do with each.
        is_shared: Where nothing changes, buffers are shared instead of copied.
        is_donated: What arrays are averaged with is written in place.
        chunk_bytes: How much may be on its way at once; None takes a sixth of the
            tree.

    Raises:
        UnfitArray: a dimension that its parts do not divide.
    """
    traffic, same, renaming, puts, sliced = Traffic(), [], [], [], []
    crossing: dict[int, Request] = {}
    elsewhere: dict[int, Request] = {}
    identities: dict[Any, list[int]] = {}
    if chunk_bytes is None:
        total = sum(request.wire_bytes for request in requests)
        chunk_bytes = max(MIN_CHUNK_BYTES, total // CHUNKS)
    for number, request in enumerate(requests):
        kind = _kind(number, request)
        if kind == "jit" and request.wire_bytes > chunk_bytes:
            kind = "slice"  # Collectives take two arrays beside the result.
        count_request(traffic, request, kind)
        is_plain = request.dtype == request.new_dtype and not request.is_mixed
        if kind == "none" and is_shared and is_plain:
            if request.source == request.destination:
                same.append(number)
            else:
                renaming.append((number, request.destination))
        elif kind == "none" and request.destination.is_fully_addressable:
            sliced.append(number)  # All blocks are there already.
        elif kind in ("none", "jit") and request.destination.addressable_devices:
            # A jitted identity works on one list of devices.
            devices = Layout.of(request.destination).devices
            identities.setdefault((kind, devices), []).append(number)
        elif kind in ("none", "jit") or where(request) == "elsewhere":
            elsewhere[number] = request
        elif where(request) == "across":
            crossing[number] = request
        elif kind == "put" and is_plain:
            puts.append(number)
        else:
            sliced.append(number)
    return Plan(
        traffic=traffic,
        same=tuple(same),
        renamed=tuple(renaming),
        identities=tuple(
            (chunk, _Identity([requests[n] for n in chunk], is_donated))
            for (kind, _), numbers in identities.items()
            # What a copy makes is all it takes; collectives take twice as much again.
            for chunk in _chunks(
                numbers, requests, chunk_bytes if kind == "jit" else None
            )
        ),
        puts=tuple(puts),
        put_shardings=[requests[n].destination for n in puts],
        sliced=tuple(sliced),
        moves=plan_moves(
            [requests[n] for n in sliced],
            parcel_bytes=chunk_bytes,
            is_shared=is_shared,
            is_donated=is_donated,
        ),
        crossing=crossing,
        elsewhere=elsewhere,
        chunk_bytes=chunk_bytes,
        is_donated=is_donated,
    )


def count_request(traffic: Traffic, request: Request, kind: Kind) -> None:
    """Add what one array's move will count as."""
    traffic.leaves[kind] += 1
    traffic.bytes[kind] += request.wire_bytes
    if kind == "jit":
        traffic.collective_bytes += request.route.bytes_moved
    else:
        traffic.sent_bytes += request.route.bytes_moved
        if where(request) == "across":
            traffic.crossed_bytes += route_between(request).phase_bytes["across"]


def _kind(number: int, request: Request) -> Kind:
    for sharding in (request.source, request.destination):
        kind, device = sharding.memory_kind, next(iter(sharding.device_set))
        # Devices that are only described have no memories to name.
        if kind is not None and kind != device.default_memory().kind:
            raise UnfitArray(
                number,
                f"memory kind {kind!r}; reallocation works in device memory. Bring the"
                " array back with `to_device` first.",
            )
    try:
        return request.route.kind
    except ValueError as error:
        raise UnfitArray(number, str(error)) from None


def _chunks(
    numbers: Sequence[int], requests: Sequence[Request], chunk_bytes: int | None
) -> Iterator[tuple[int, ...]]:
    chunk: list[int] = []
    size = 0
    for number in numbers:
        wire_bytes = requests[number].wire_bytes
        if chunk and chunk_bytes is not None and size + wire_bytes > chunk_bytes:
            yield tuple(chunk)
            chunk, size = [], 0
        chunk.append(number)
        size += wire_bytes
    yield tuple(chunk)


class _Identity:
    """A jitted identity with new shardings and types, and a mixture if asked for."""

    def __init__(self, requests: Sequence[Request], is_donated: bool):
        """Compiles nothing yet."""
        destinations = [request.destination for request in requests]
        (self.devices,) = {Layout.of(place).devices for place in destinations}
        self.mesh = _mesh_of(destinations[0])
        dtypes = [request.new_dtype for request in requests]
        is_mixed = requests[0].is_mixed

        def reallocated(
            arrays: list[Array], targets: list[Array] | None, eta: Any
        ) -> list[Array]:
            if not is_mixed or targets is None:
                # A copy, because a jitted function may return an argument as it is.
                pairs = zip(arrays, dtypes, strict=True)
                return [jnp.copy(array).astype(dtype) for array, dtype in pairs]
            moved = jax.lax.with_sharding_constraint(arrays, destinations)
            return [
                average(array, target, eta).astype(target.dtype)
                for array, target in zip(moved, targets, strict=True)
            ]

        self.function = jax.jit(
            reallocated,
            out_shardings=destinations,
            donate_argnums=1 if is_mixed and is_donated else (),
        )

    def __call__(
        self,
        arrays: list[Array],
        targets: list[Array] | None,
        weight: Weight | None,
    ) -> list[Array]:
        eta = None if weight is None else weight(self.mesh)
        return self.function(arrays, targets, eta)


def _mesh_of(sharding: Sharding) -> Mesh:
    """Return a mesh of a sharding's devices, in its order."""
    if isinstance(sharding, NamedSharding):
        return sharding.mesh  # type: ignore[return-value]
    return Mesh(np.array(list(sharding.device_set)), ("device",))


def weight_of(eta: float | Array) -> Weight:
    """Return what puts a weight on the devices of a mesh.

    A number is uploaded, four bytes a device, once for every mesh; an array is copied
    from its device.
    """
    if isinstance(eta, jax.Array):
        return lambda mesh: replicated(eta, mesh)
    return lambda mesh: _uploaded(float(eta), mesh)


@functools.lru_cache(maxsize=256)
def _uploaded(eta: float, mesh: Mesh) -> Array:
    with jax.transfer_guard_host_to_device("allow"):
        return upload(np.asarray(eta, np.float32), NamedSharding(mesh, PartitionSpec()))
