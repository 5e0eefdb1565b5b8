"""What one process packs, sends and joins when arrays cross processes: `plan_chunks`.

Where there is a choice, it depends only on what all processes know: so the parcels of a
link are the same at both of its ends.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from pallas_kernels.interval_copy import Block, pack, unpack
from realjax.core.arrays import Array
from realjax.realloc.layouts import Box, Layout
from realjax.realloc.parcels import (
    Call,
    Parcel,
    Portion,
    Steps,
    ends_here,
    route_between,
    size_of,
    ways,
)
from realjax.realloc.processes import home, is_ours, process_of
from realjax.realloc.requests import Request


@functools.lru_cache(maxsize=512)
def plan_chunks(
    requests: tuple[Request, ...], chunk_bytes: int, is_donated: bool
) -> tuple[Steps, ...]:
    """Work out the steps of this process, chunk by chunk; kept.

    Args:
        requests: What to do with each array; the same in every process.
        chunk_bytes: About how much of them is on its way at once.
        is_donated: What arrays are averaged with is written in place.
    """
    chunks: list[list[Portion]] = []
    size = 0
    for leaf, request in enumerate(requests):
        num_parts = -(-request.wire_bytes // max(chunk_bytes, 1)) or 1
        # A part has a share of every piece, so no more parts than a piece is long.
        num_parts = min(num_parts, _longest_side(request))
        if num_parts > 1:
            parts = [
                Portion(leaf=leaf, part=part, num_parts=num_parts)
                for part in range(num_parts)
            ]
            chunks += [[part] for part in parts]
            size = chunk_bytes
        elif chunks and size + request.wire_bytes <= chunk_bytes:
            chunks[-1].append(Portion(leaf=leaf))
            size += request.wire_bytes
        else:
            chunks.append([Portion(leaf=leaf)])
            size = request.wire_bytes
    return tuple(_Planner(requests, chunk, is_donated).steps() for chunk in chunks)


def _longest_side(request: Request) -> int:
    """Return the length of the shortest piece along its longest dimension."""
    boxes = route_between(request).boxes
    if not boxes.size:
        return 1
    return int((boxes[..., 1] - boxes[..., 0]).max(axis=1).min())


class _Planner:
    """Works out the steps of this process for one chunk."""

    def __init__(
        self,
        requests: tuple[Request, ...],
        portions: Sequence[Portion],
        is_donated: bool,
    ):
        self.requests, self.portions = requests, portions
        self.is_donated = is_donated
        self.parcels: list[Parcel] = []
        # What comes to each new shard: boxes from its own device, and parcels.
        self.stays: dict[tuple[int, int], list[Box]] = collections.defaultdict(list)
        self.arrives: dict[tuple[int, int], list[tuple[int, int]]] = (
            collections.defaultdict(list)
        )

    def steps(self) -> Steps:
        """Sort pieces into parcels, and say what is done with each."""
        self._make_parcels()
        shards, packs = self._packs()
        links: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        copies: list[tuple[int, int, int]] = []
        for number, parcel in enumerate(self.parcels):
            for device, relays in parcel.targets:
                if process_of(device) != process_of(parcel.source):
                    if ends_here(parcel.source, device):
                        links[parcel.source, device].append(number)
                elif is_ours(device):
                    copies.append((number, parcel.source, device))
                if is_ours(device):
                    copies += [(number, device, relay) for relay in relays]
        whole, joins = self._joins()
        return Steps(
            parcels=tuple(self.parcels),
            shards=shards,
            packs=packs,
            links=tuple((*link, tuple(links[link])) for link in sorted(links)),
            copies=tuple(copies),
            whole=whole,
            joins=joins,
        )

    def _make_parcels(self) -> None:
        groups: dict[Any, list[tuple[int, Box]]] = {}
        for portion in self.portions:
            request = self.requests[portion.leaf]
            found = route_between(request)
            held = Layout.of(request.source).boxes(request.shape)
            wanted = Layout.of(request.destination).boxes(request.shape)
            for source, piece, targets in ways(found):
                box = portion.of(found.box(piece))
                if box is None:
                    continue
                if targets is None:
                    self.stays[portion.leaf, source].append(box)
                    continue
                # A shard that travels or arrives as it is needs no packing or joining.
                is_whole = box in (held[source], wanted[targets[0][0]])
                alone = (portion.leaf, box) if is_whole else None
                group = (source, request.wire_dtype, targets, alone)
                groups.setdefault(group, []).append((portion.leaf, box))
        for (source, dtype, targets, _), pieces in groups.items():
            leaf, box = pieces[0]
            request = self.requests[leaf]
            held = Layout.of(request.source).boxes(request.shape)[source]
            is_shard = len(pieces) == 1 and box == held and request.dtype == dtype
            parcel = Parcel(
                source=source,
                dtype=dtype,
                targets=targets,
                pieces=tuple(pieces),
                is_shard=is_shard,
            )
            for device, relays in targets:
                for destination in (device, *relays):
                    for place, (leaf, _) in enumerate(pieces):
                        came = (len(self.parcels), place)
                        self.arrives[leaf, destination].append(came)
            self.parcels.append(parcel)

    def _packs(self) -> tuple[tuple[tuple[int, int], ...], tuple[Call, ...]]:
        shards, packing = [], collections.defaultdict(list)
        for number, parcel in enumerate(self.parcels):
            if not is_ours(parcel.source):
                continue
            if parcel.is_shard:
                shards.append((number, parcel.pieces[0][0]))
            else:
                packing[parcel.source].append(number)
        return tuple(shards), tuple(
            self._pack(device, numbers) for device, numbers in packing.items()
        )

    def _pack(self, device: int, numbers: list[int]) -> Call:
        """Cut what one source device sends, narrowed where it travels narrower."""
        parcels = [self.parcels[number] for number in numbers]
        leaves = tuple(dict.fromkeys(leaf for p in parcels for leaf, _ in p.pieces))
        packed = tuple(
            (
                tuple(
                    _slice_of(leaves.index(leaf), box, self._held(leaf, device))
                    for leaf, box in parcel.pieces
                ),
                parcel.dtype,
            )
            for parcel in parcels
        )

        def pack_all(shards: list[Array]) -> list[Array]:
            return [pack(shards, blocks, dtype=dtype) for blocks, dtype in packed]

        return Call(
            device=device,
            function=jax.jit(pack_all, out_shardings=home(device)),
            leaves=leaves,
            parcels=tuple(numbers),
        )

    def _joins(self) -> tuple[tuple[tuple[int, int, int], ...], tuple[Call, ...]]:
        """Tell the new shards that are a parcel as it came from those to be made."""
        whole, making = [], collections.defaultdict(list)
        for portion in self.portions:
            request = self.requests[portion.leaf]
            is_changed = request.wire_dtype != request.new_dtype or request.is_mixed
            for device in Layout.of(request.destination).devices:
                if not is_ours(device):
                    continue
                came = self.arrives.get((portion.leaf, device), [])
                is_alone = len(came) == 1 and not self.stays[portion.leaf, device]
                number = came[0][0] if came else 0
                if (
                    is_alone
                    and not is_changed
                    and portion.num_parts == 1
                    and len(self.parcels[number].pieces) == 1
                ):
                    whole.append((portion.leaf, device, number))
                else:
                    making[device].append(portion)
        return tuple(whole), tuple(
            self._join(device, portions) for device, portions in making.items()
        )

    def _join(self, device: int, portions: Sequence[Portion]) -> Call:
        """Put the pieces of one destination device to their places."""
        keys = [(portion.leaf, device) for portion in portions]
        local = tuple(leaf for leaf, _ in keys if self.stays[leaf, device])
        numbers = tuple(
            dict.fromkeys(n for key in keys for n, _ in self.arrives.get(key, []))
        )
        makes = []
        for leaf, _ in keys:
            corner = [start for start, _ in self._wanted(leaf, device)]
            blocks, places = [], []
            for box in self.stays[leaf, device]:
                held = self._held(leaf, device)
                blocks.append(_slice_of(local.index(leaf), box, held))
                places.append(_corner(box, corner))
            for number, place in self.arrives.get((leaf, device), []):
                parcel = self.parcels[number]
                input = len(local) + numbers.index(number)
                box = parcel.pieces[place][1]
                is_flat = len(parcel.pieces) > 1
                offset = parcel.offsets[place] if is_flat else None
                blocks.append(Block(input=input, size=size_of(box), offset=offset))
                places.append(_corner(box, corner))
            makes.append((blocks, places, size_of(self._wanted(leaf, device))))
        return self._join_call(device, portions, makes, local, numbers)

    def _join_call(
        self,
        device: int,
        portions: Sequence[Portion],
        makes: Sequence[tuple[Sequence[Block], Sequence[Any], tuple[int, ...]]],
        local: tuple[int, ...],
        numbers: tuple[int, ...],
    ) -> Call:
        origins = []
        for portion in portions:
            is_mixed = self.requests[portion.leaf].is_mixed
            if portion.part or (is_mixed and self.is_donated):
                origins.append("begun")
            elif is_mixed:
                origins.append("target")
            else:
                origins.append("empty" if portion.num_parts > 1 else "none")
        pairs = list(zip(portions, origins, strict=True))
        return Call(
            device=device,
            function=_join_function(
                makes,
                [self.requests[portion.leaf] for portion in portions],
                origins,
                home(device),
            ),
            leaves=local,
            parcels=numbers,
            makes=tuple(portion.leaf for portion in portions),
            continues=tuple(p.leaf for p, origin in pairs if origin == "begun"),
            averages=tuple(p.leaf for p, origin in pairs if origin == "target"),
        )

    def _held(self, leaf: int, device: int) -> Box:
        request = self.requests[leaf]
        return Layout.of(request.source).boxes(request.shape)[device]

    def _wanted(self, leaf: int, device: int) -> Box:
        request = self.requests[leaf]
        return Layout.of(request.destination).boxes(request.shape)[device]


def _join_function(
    makes: Sequence[tuple[Sequence[Block], Sequence[Any], tuple[int, ...]]],
    requests: Sequence[Request],
    origins: Sequence[str],
    place: SingleDeviceSharding,
) -> Callable[..., list[Array]]:
    def join_all(
        shards: list[Array],
        parcels: list[Array],
        begun: list[Array],
        targets: list[Array],
        eta: Any,
    ) -> list[Array]:
        inputs, joined = [*shards, *parcels], []
        given = {"begun": iter(begun), "target": iter(targets)}
        for (blocks, places, shape), request, origin in zip(
            makes, requests, origins, strict=True
        ):
            dtype, into = request.new_dtype, None
            if origin == "empty":
                into = jax.lax.empty(shape, dtype)
            elif origin in given:
                into = next(given[origin])
            weight = eta if request.is_mixed else None
            joined.append(
                unpack(
                    inputs,
                    blocks,
                    places,
                    shape=shape,
                    dtype=dtype,
                    into=into,
                    eta=weight,
                )
            )
        return joined

    # What an earlier chunk began is ours alone, and is written in place.
    return jax.jit(join_all, donate_argnums=2, out_shardings=place)


def _slice_of(input: int, box: Box, held: Box) -> Block:
    return Block(
        input=input, size=size_of(box), start=_corner(box, [low for low, _ in held])
    )


def _corner(box: Box, origin: Sequence[int]) -> tuple[int, ...]:
    """Return where a box begins, counted from another corner."""
    pairs = zip(box, origin, strict=True)
    return tuple(start - low for (start, _), low in pairs)
