"""Checks of copies: of links between devices at the start, of arrays after a move.

A broken link between two devices can deliver zeros and report success. Sums tell:
every element counts with an odd weight that depends on its place in the whole array,

    sum = Σ weight(place) bits(element)   modulo 2^32, twice, with unlike weights

so the sum of an array is the same however the array lies on devices, exactly, and one
changed element always changes it; zeros, swaps and shifts do but once in 2^64.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from realjax.core.arrays import Array, PyTree, UInt
from realjax.realloc.layouts import Layout
from realjax.realloc.parcels import route_between
from realjax.realloc.plans import make_plan
from realjax.realloc.processes import (
    handle,
    home,
    is_counted_by_all,
    is_ours,
    process_of,
)
from realjax.realloc.requests import Request

LINK_BYTES = 1 << 20
"""What is sent over every link to check it."""


class CorruptedCopyError(RuntimeError):
    """What arrived is not what was sent."""


def links_used(tree: PyTree, shardings: PyTree) -> set[tuple[int, int]]:
    """Return the pairs of devices, by id, between which a reallocation copies.

    Args:
        tree: Arrays, or their shapes, types and shardings.
        shardings: The shardings they shall have; a prefix of the tree will do.
    """
    leaves = jax.tree.leaves(tree)
    destinations = jax.tree.leaves(jax.tree.broadcast(shardings, tree))
    found: set[tuple[int, int]] = set()
    for leaf, place in zip(leaves, destinations, strict=True):
        request = Request(leaf.sharding, place, leaf.shape, leaf.dtype, leaf.dtype)
        sources, targets, _ = route_between(request).link_bytes()
        found.update(zip(sources.tolist(), targets.tolist(), strict=True))
    return found


def check_links(
    pairs: Iterable[tuple[int, int]], *, num_bytes: int = LINK_BYTES
) -> None:
    """Copy random data over links, all at once, and compare sums where it arrives.

    Every process calls it with the same pairs; it checks those that end at its devices.

    Args:
        pairs: Ids of source and destination device.
        num_bytes: How much is sent over each.

    Raises:
        CorruptedCopyError: names the links that deliver something else.
    """
    links = [pair for pair in sorted(set(pairs)) if pair[0] != pair[1]]
    arrived = _send_noise(links, num_bytes // 4)
    by_device = collections.defaultdict(list)
    for number in arrived:
        by_device[links[number][1]].append(number)
    sums = {
        device: _compare_function(device, tuple(numbers), num_bytes // 4)(
            [arrived[number] for number in numbers]
        )
        for device, numbers in by_device.items()
    }
    broken = []
    for device, numbers in by_device.items():
        found, wanted = map(np.asarray, sums[device])
        is_right = (found == wanted).all(axis=1)
        broken += [links[n] for n, ok in zip(numbers, is_right, strict=True) if not ok]
    if broken:
        names = ", ".join(f"{source} -> {target}" for source, target in sorted(broken))
        raise CorruptedCopyError(
            f"Copies between devices arrive changed over {len(broken)} of {len(links)}"
            f" links: {names}. Take these devices out of the allocations, or turn off"
            " direct copies between them (NCCL_P2P_DISABLE=1)."
        )


def checksum(tree: PyTree, *, dtype: Any = None) -> PyTree:
    """Return the sum of every array of a tree, the same for all its layouts.

    Every process that holds a part of an array calls it; the others get None.

    Args:
        tree: Arrays.
        dtype: Sum them as they are once cast to it, floating ones that is.

    Returns:
        Two numbers for every array, uint32.

    Raises:
        CorruptedCopyError: copies of one block differ.
    """
    leaves, structure = jax.tree.flatten(tree)
    sums = _gathered(_shard_sums(leaves, dtype), [leaf.sharding for leaf in leaves])
    totals = [
        None if table is None else _total(leaf, table)
        for leaf, table in zip(leaves, sums, strict=True)
    ]
    return structure.unflatten(totals)


def check_moved(source: PyTree, moved: PyTree) -> None:
    """Compare arrays with what they were made of by a reallocation.

    Every process calls it, as it calls the reallocation, and waits for the outcome: it
    is for runs that look for an error.

    Raises:
        CorruptedCopyError: names the array that arrived changed.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(moved)]
    befores, afters = jax.tree.leaves(source), jax.tree.leaves(moved)
    places = [after.sharding for after in afters]
    sent = [
        _shard_sums([before], after.dtype)[0]
        for before, after in zip(befores, afters, strict=True)
    ]
    wanted, found = _gathered(sent, places), _gathered(_shard_sums(afters), places)
    for path, before, after, was, now in zip(
        paths, befores, afters, wanted, found, strict=True
    ):
        if was is None or now is None:
            continue
        name = f"Array {jax.tree_util.keystr(path) or 'given'}"
        try:
            is_right = np.array_equal(_total(before, was), _total(after, now))
        except CorruptedCopyError as error:
            raise CorruptedCopyError(f"{name}: {error}") from None
        if not is_right:
            raise CorruptedCopyError(
                f"{name} arrived changed on devices"
                f" {sorted(Layout.of(after.sharding).devices)}. Check the links from"
                f" {sorted(Layout.of(before.sharding).devices)} to them: `check_links`."
            )


def _send_noise(links: Sequence[tuple[int, int]], num_words: int) -> dict[int, Array]:
    """Send to every link's end noise of its own; return what comes to this process."""
    by_device = collections.defaultdict(list)
    for number, (source, _) in enumerate(links):
        if is_ours(source):
            by_device[source].append(number)
    sent = {}
    for source, numbers in by_device.items():
        noise = _noise_function(source, tuple(numbers), num_words)()
        sent.update(zip(numbers, noise, strict=True))
    arrived, inside = {}, []
    for number, (source, target) in enumerate(links):
        if process_of(source) == process_of(target):
            inside += [number] if is_ours(source) else []
        elif is_ours(source) or is_ours(target) or is_counted_by_all():
            data = sent.get(number)
            if data is None:
                data = handle((num_words,), np.uint32, home(source))
            (copy,) = jax.device_put([data], [home(target)])
            if is_ours(target):
                arrived[number] = copy
    copies = jax.device_put(
        [sent[number] for number in inside],
        [home(links[number][1]) for number in inside],
        may_alias=False,
    )
    return arrived | dict(zip(inside, copies, strict=True))


@functools.lru_cache(maxsize=256)
def _noise_function(
    device: int, numbers: tuple[int, ...], num_words: int
) -> Callable[[], list[Array]]:
    return jax.jit(
        lambda: [_noise(number, num_words) for number in numbers],
        out_shardings=home(device),
    )


@functools.lru_cache(maxsize=256)
def _compare_function(
    device: int, numbers: tuple[int, ...], num_words: int
) -> Callable[[list[Array]], tuple[Array, Array]]:
    """Return what sums the noise that came, and the same noise made on the spot."""

    def compare(arrived: list[Array]) -> tuple[Array, Array]:
        fresh = [_noise(number, num_words) for number in numbers]
        place = jnp.arange(num_words, dtype=jnp.uint32)
        found = jnp.stack([_sums(words, place) for words in arrived])
        return found, jnp.stack([_sums(words, place) for words in fresh])

    return jax.jit(compare, out_shardings=home(device))


def _noise(number: int, num_words: int) -> Array:
    """Return random words of a link."""
    seed = np.uint32((number + 1) * 0x9E3779B9 & 0xFFFFFFFF)
    return _scattered(jnp.arange(num_words, dtype=jnp.uint32) ^ seed)


def _scattered(words: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """Map words one to one to others that look random (MurmurHash3's last step)."""
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def _sums(words: UInt[Array, "..."], place: UInt[Array, "..."]) -> UInt[Array, "2"]:
    """Add up words with two odd weights that their places give."""
    weights = (_scattered(place), _scattered(place ^ np.uint32(0xA5A5A5A5)))
    # Whole numbers add up to the same in any order; uint32 wraps around.
    return jnp.stack(
        [jnp.sum(words * (weight | 1), dtype=jnp.uint32) for weight in weights]
    )


def _words(array: Array) -> list[Array]:
    """Return the bits of an array as words, one array for every word of an element."""
    if array.dtype == jnp.bool_:
        return [array.astype(jnp.uint32)]
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(array, bits)
    if words.ndim == array.ndim:
        return [words.astype(jnp.uint32)]
    return [words[..., number] for number in range(words.shape[-1])]


def _shard_sums(leaves: Sequence[Array], dtype: Any = None) -> list[Array]:
    """Sum every shard where it lies: uint32 [devices, 2] for each array, in place."""
    sums = []
    for leaf in leaves:
        mesh, spec = _mesh_and_spec(leaf.sharding)
        is_cast = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        cast = np.dtype(dtype) if is_cast else leaf.dtype
        if leaf.sharding.addressable_devices:
            function = _shard_sums_function(mesh, spec, leaf.shape, cast)
            sums.append(function(leaf))
        else:
            cut = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            sums.append(handle((mesh.size, 2), np.uint32, cut))
    return sums


@functools.lru_cache(maxsize=1024)
def _shard_sums_function(
    mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[Array], Array]:
    entries = [*spec, *[None] * (len(shape) - len(spec))]

    def sums_of_shard(shard: Array) -> Array:
        shard = shard.astype(dtype)
        place = jnp.zeros(shard.shape, jnp.uint32)
        for dimension, (entry, size) in enumerate(
            zip(entries, shard.shape, strict=True)
        ):
            index = jax.lax.broadcasted_iota(jnp.uint32, shard.shape, dimension)
            if entry is not None:
                part = jax.lax.axis_index(entry).astype(jnp.uint32)
                index = index + part * np.uint32(size & 0xFFFFFFFF)
            # Row-major over the whole array, modulo 2^32.
            place = place * np.uint32(shape[dimension] & 0xFFFFFFFF) + index
        total = jnp.zeros(2, jnp.uint32)
        for number, words in enumerate(_words(shard)):
            total += _sums(words, place + np.uint32(number * 0x9E3779B9 & 0xFFFFFFFF))
        return total[None]

    return jax.jit(
        jax.shard_map(
            sums_of_shard,
            mesh=mesh,
            in_specs=spec,
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,
        )
    )


def _gathered(
    sums: Sequence[Array], places: Sequence[Sharding]
) -> list[np.ndarray | None]:
    """Bring sums to all devices of other arrays, and to the host where those are."""
    destinations = [
        NamedSharding(_mesh_and_spec(place)[0], PartitionSpec()) for place in places
    ]
    requests = tuple(
        Request(table.sharding, place, table.shape, table.dtype, table.dtype)
        for table, place in zip(sums, destinations, strict=True)
    )
    plan = make_plan(requests, is_shared=False, is_donated=False, chunk_bytes=None)
    return [
        np.asarray(table.addressable_data(0)) if table.addressable_shards else None
        for table in plan.run(sums)
    ]


def _total(array: Array, table: UInt[np.ndarray, "devices 2"]) -> np.ndarray:
    """Add up the sums of distinct shards; the copies of each must agree."""
    boxes = Layout.of(array.sharding).boxes(array.shape)
    distinct: dict[Any, tuple[int, np.ndarray]] = {}
    for (device, box), sums in zip(boxes.items(), table, strict=True):
        first, expected = distinct.setdefault(box, (device, sums))
        if not np.array_equal(expected, sums):
            raise CorruptedCopyError(
                f"devices {first} and {device} hold the same block of"
                f" {array.dtype}{list(array.shape)}, and it differs. Check the links"
                " to them: `check_links`."
            )
    total = np.sum([sums for _, sums in distinct.values()], axis=0, dtype=np.uint32)
    return np.asarray(total)


@functools.lru_cache(maxsize=8192)
def _mesh_and_spec(sharding: Sharding) -> tuple[Mesh, PartitionSpec]:
    if isinstance(sharding, NamedSharding):
        return sharding.mesh, sharding.spec  # type: ignore[return-value]
    return Mesh(np.array(list(sharding.device_set)), ("device",)), PartitionSpec()
