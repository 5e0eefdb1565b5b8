"""The route "slice": pieces are cut at their source, copied, and joined.

    source devices        cut    one compiled function a device: slices, and the cast
                                 where the new type is narrower
    between devices       copy   one batched `device_put` of single-device arrays
    destination devices   join   one compiled function a device: the pieces received
                                 and slices of the shards it held already

Pieces that stay on their device are sliced inside the join, so nothing made here
shares a buffer with its source. The steps of a group of arrays are worked out and
compiled once, and kept.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from realjax.core.arrays import Array
from realjax.realloc.routes import Box, Layout, Route, route


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One array's move: where from, where to, and as what type.

    Attributes:
        source: The sharding it has.
        destination: The sharding it shall have.
        shape: Of the whole array.
        dtype: The type it has.
        new_dtype: The type it shall have.
    """

    source: Sharding
    destination: Sharding
    shape: tuple[int, ...]
    dtype: np.dtype
    new_dtype: np.dtype

    @property
    def wire_dtype(self) -> np.dtype:
        """The type on the way: the narrower of the two."""
        is_narrowed = self.new_dtype.itemsize < self.dtype.itemsize
        return self.new_dtype if is_narrowed else self.dtype

    @property
    def wire_bytes(self) -> int:
        """The bytes of the whole array on its way."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.wire_dtype.itemsize

    @property
    def route(self) -> Route:
        """What moves where."""
        return route(
            Layout.of(self.source),
            Layout.of(self.destination),
            self.shape,
            self.wire_dtype,
        )


def slice_and_join(requests: Sequence[Request], arrays: Sequence[Array]) -> list[Array]:
    """Move arrays piece by piece.

    Args:
        requests: What to do with each array.
        arrays: In the same order, as the requests describe them.
    """
    steps = _steps(tuple(requests))
    shards = [{s.device.id: s.data for s in x.addressable_shards} for x in arrays]

    buffers = []
    for cut in steps.cuts:
        buffers += cut.function([shards[leaf][cut.device] for leaf in cut.leaves], [])
    pieces = jax.device_put(
        [buffers[n] if leaf is None else shards[leaf][n] for leaf, n in steps.sends],
        list(steps.targets),
        may_alias=False,
    )
    # A new shard is a piece as it came, or what a join makes of several.
    new_shards = {place: pieces[number] for place, number in steps.whole.items()}
    for join in steps.joins:
        made = join.function(
            [shards[leaf][join.device] for leaf in join.leaves],
            [pieces[number] for number in join.pieces],
        )
        new_shards.update(zip(join.makes, made, strict=True))
    return [
        jax.make_array_from_single_device_arrays(
            request.shape,
            request.destination,
            [new_shards[leaf, device] for device in steps.devices[leaf]],
        )
        for leaf, request in enumerate(requests)
    ]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A block of one input, and where it starts in the output."""

    input: int
    box: Box | None  # None takes all of the input
    start: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Output:
    """An array that a cut or a join makes of blocks of its inputs."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[_Part, ...]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A compiled function of one device, and what it takes and makes.

    Attributes:
        device: The id of the device.
        function: Takes the shards, then the pieces, and returns the outputs.
        leaves: The arrays whose shards on this device it takes.
        pieces: The numbers of the received pieces it takes.
        makes: (array, device) of the new shards, for a join.
    """

    device: int
    function: Callable[[list, list], list]
    leaves: tuple[int, ...]
    pieces: tuple[int, ...] = ()
    makes: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Everything that a group of arrays needs, worked out once.

    Attributes:
        cuts: What source devices make; their outputs are numbered as buffers.
        sends: Pieces by number: (None, buffer), or (array, source device) for a shard
            that travels as it is.
        targets: Where each piece goes.
        whole: (array, device) of the new shards that are one piece as it came.
        joins: What destination devices make.
        devices: The destination devices of each array, in mesh order.
    """

    cuts: tuple[_Call, ...]
    sends: tuple[tuple[int | None, int], ...]
    targets: tuple[SingleDeviceSharding, ...]
    whole: dict[tuple[int, int], int]
    joins: tuple[_Call, ...]
    devices: tuple[tuple[int, ...], ...]


@functools.lru_cache(maxsize=512)
def _steps(requests: tuple[Request, ...]) -> _Steps:
    homes = {
        device.id: SingleDeviceSharding(device)
        for request in requests
        for sharding in (request.source, request.destination)
        for device in sharding.device_set
    }
    cut_outputs: dict[int, dict[tuple[int, Box], None]] = collections.defaultdict(dict)
    travels: dict[tuple[int, int, int, Box], None] = {}
    arrivals = collections.defaultdict(list)
    for leaf, request in enumerate(requests):
        held = Layout.of(request.source).boxes(request.shape)
        is_cast = request.wire_dtype != request.dtype
        for source, destination, box in request.route.moves:
            arrivals[destination, leaf].append((source, box))
            if source == destination:
                continue
            travels[leaf, source, destination, box] = None
            if is_cast or box != held[source]:
                cut_outputs[source][leaf, box] = None

    buffers = {
        (source, leaf, box): number
        for number, (source, leaf, box) in enumerate(
            (source, *key) for source, keys in cut_outputs.items() for key in keys
        )
    }
    sends = tuple(
        (None, buffers[source, leaf, box])
        if (source, leaf, box) in buffers
        else (leaf, source)
        for leaf, source, _, box in travels
    )
    numbers = {key: number for number, key in enumerate(travels)}
    whole, joins = _joins(requests, arrivals, numbers, homes)
    return _Steps(
        cuts=tuple(
            _cut(requests, source, tuple(keys), homes)
            for source, keys in cut_outputs.items()
        ),
        sends=sends,
        targets=tuple(homes[destination] for _, _, destination, _ in travels),
        whole=whole,
        joins=joins,
        devices=tuple(Layout.of(request.destination).devices for request in requests),
    )


def _cut(
    requests: tuple[Request, ...],
    device: int,
    keys: tuple[tuple[int, Box], ...],
    homes: dict[int, SingleDeviceSharding],
) -> _Call:
    """Slice, and narrow, what one source device sends."""
    leaves = tuple(dict.fromkeys(leaf for leaf, _ in keys))
    outputs = []
    for leaf, box in keys:
        request = requests[leaf]
        held = Layout.of(request.source).boxes(request.shape)[device]
        part = _Part(leaves.index(leaf), _inner(box, held), (0,) * len(box))
        outputs.append(_Output(_size(box), request.wire_dtype, (part,)))
    return _Call(device, _compile(tuple(outputs), homes[device]), leaves)


def _joins(
    requests: tuple[Request, ...],
    arrivals: dict[tuple[int, int], list[tuple[int, Box]]],
    numbers: dict[tuple[int, int, int, Box], int],
    homes: dict[int, SingleDeviceSharding],
) -> tuple[dict[tuple[int, int], int], tuple[_Call, ...]]:
    """Tell the new shards that are one piece as it came from those to be made."""
    whole: dict[tuple[int, int], int] = {}
    to_make: dict[int, list[int]] = collections.defaultdict(list)
    for leaf, request in enumerate(requests):
        for device in Layout.of(request.destination).devices:
            came = arrivals[device, leaf]
            is_cast = request.new_dtype != request.wire_dtype
            if len(came) == 1 and came[0][0] != device and not is_cast:
                source, box = came[0]
                whole[leaf, device] = numbers[leaf, source, device, box]
            else:
                to_make[device].append(leaf)
    joins = tuple(
        _join(requests, device, tuple(leaves), arrivals, numbers, homes)
        for device, leaves in to_make.items()
    )
    return whole, joins


def _join(
    requests: tuple[Request, ...],
    device: int,
    leaves: tuple[int, ...],
    arrivals: dict[tuple[int, int], list[tuple[int, Box]]],
    numbers: dict[tuple[int, int, int, Box], int],
    homes: dict[int, SingleDeviceSharding],
) -> _Call:
    """Make the new shards of one destination device."""
    local = tuple(
        leaf for leaf in leaves if any(s == device for s, _ in arrivals[device, leaf])
    )
    pieces: list[int] = []
    outputs = []
    for leaf in leaves:
        request = requests[leaf]
        wanted = Layout.of(request.destination).boxes(request.shape)[device]
        parts = []
        for source, box in sorted(arrivals[device, leaf], key=lambda came: came[1]):
            start = tuple(low for low, _ in _within(box, wanted))
            if source == device:
                held = Layout.of(request.source).boxes(request.shape)[source]
                parts.append(_Part(local.index(leaf), _inner(box, held), start))
            else:
                parts.append(_Part(len(local) + len(pieces), None, start))
                pieces.append(numbers[leaf, source, device, box])
        outputs.append(_Output(_size(wanted), request.new_dtype, tuple(parts)))
    return _Call(
        device,
        _compile(tuple(outputs), homes[device]),
        local,
        tuple(pieces),
        tuple((leaf, device) for leaf in leaves),
    )


def _compile(
    outputs: tuple[_Output, ...], home: SingleDeviceSharding
) -> Callable[[list, list], list]:
    """Return the function of one device; bounds are static, so nothing is uploaded."""

    def make_all(shards: list[Array], pieces: list[Array]) -> list[Array]:
        return [_make(output, [*shards, *pieces]) for output in outputs]

    return jax.jit(make_all, out_shardings=home)


def _make(output: _Output, inputs: list[Array]) -> Array:
    blocks = [_block(part, inputs).astype(output.dtype) for part in output.parts]
    if len(blocks) == 1:
        # A copy, because a jitted function may return an argument as it is.
        return jnp.copy(blocks[0])
    starts = [part.start for part in output.parts]
    cut = [
        axis for axis, at in enumerate(zip(*starts, strict=True)) if len(set(at)) > 1
    ]
    if len(cut) == 1:
        return jnp.concatenate(blocks, axis=cut[0])
    whole = jnp.zeros(output.shape, output.dtype)
    for block, start in zip(blocks, starts, strict=True):
        whole = jax.lax.dynamic_update_slice(whole, block, start)
    return whole


def _block(part: _Part, inputs: list[Array]) -> Array:
    array = inputs[part.input]
    if part.box is None:
        return array
    starts, stops = zip(*part.box, strict=True)
    return jax.lax.slice(array, starts, stops)


def _within(box: Box, outer: Box) -> Box:
    """Count a box from the corner of the one around it."""
    pairs = zip(box, outer, strict=True)
    return tuple((start - low, stop - low) for (start, stop), (low, _) in pairs)


def _inner(box: Box, outer: Box) -> Box | None:
    """Tell which block of an input to take; None for all of it."""
    return None if box == outer else _within(box, outer)


def _size(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)
