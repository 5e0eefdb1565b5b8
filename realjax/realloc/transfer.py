"""Reallocation: arrays from the layout they have to the layout they shall have.

Every array takes the cheapest of four routes (`routes.KINDS`), none of which passes
through host memory, and all of which give the same bits:

    none   equal layouts                    copied in place, or shared on request
    jit    same devices, direct collectives one jitted identity with new shardings
    put    other devices, shards alike      one native `jax.device_put`
    slice  anything else                    `pieces`: cut, copy, join

`jax.device_put` alone would do the last, and most of the second, through the host.

Results share no buffer with their sources unless `alias=True` says they may, so a
train step can donate the parameters that a generator was given. `plans` sorts the
arrays of a tree by route and keeps what it found out; `mixing` averages on the way.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from realjax.core.arrays import Array, PyTree
from realjax.realloc.crossing import upload
from realjax.realloc.links import check_moved
from realjax.realloc.plans import UnfitArray, make_plan
from realjax.realloc.requests import Request
from realjax.realloc.traffic import Traffic


def reallocate(
    tree: PyTree,
    shardings: PyTree,
    *,
    dtype: Any = None,
    traffic: Traffic | None = None,
    alias: bool = False,
    chunk_bytes: int | None = None,
    verify: bool = False,
) -> PyTree:
    """Return the same arrays in other layouts, bit for bit.

    Args:
        tree: Arrays in device memory.
        shardings: The shardings they shall have; a prefix of the tree will do.
        dtype: Floating arrays are cast to it, before they travel where it is narrower.
        traffic: Counts what moves; added to.
        alias: Where nothing changes, share buffers with the source instead of copying:
            all of an array, or those of devices that keep what they have.
        chunk_bytes: The memory that pieces may take beside sources and results; None
            takes a sixth of the tree, 8 MiB at least. Arrays move in groups of so
            many bytes, and larger ones in slabs.
        verify: Compare sums of what was sent and what came, and wait for the outcome.

    Raises:
        ValueError: shardings of another structure, arrays in host memory, or
            dimensions that do not divide.
        CorruptedCopyError: with `verify`, an array arrived changed.
    """
    leaves, structure = jax.tree.flatten(tree)
    check_arrays(leaves, tree)
    destinations = _destinations(shardings, tree, structure)
    new_dtype = None if dtype is None else np.dtype(dtype)
    requests = tuple(
        Request(x.sharding, place, x.shape, x.dtype, _cast_dtype(x.dtype, new_dtype))
        for x, place in zip(leaves, destinations, strict=True)
    )
    with naming(tree):
        plan = make_plan(
            requests, is_shared=alias, is_donated=False, chunk_bytes=chunk_bytes
        )
    if traffic is not None:
        traffic.merge(plan.traffic)
    moved = jax.tree.unflatten(structure, plan.run(leaves))
    if verify:
        check_moved(tree, moved)
    return moved


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
    if not all(sharding.is_fully_addressable for sharding in shardings):
        pairs = zip(arrays, shardings, strict=True)
        return [upload(array, sharding) for array, sharding in pairs]
    # A CPU device takes a buffer that begins at a multiple of 64 bytes for its own,
    # `may_alias=False` or not: it gets one that nobody else has.
    copies = [np.array(array) for array in arrays]
    return jax.device_put(copies, list(shardings), may_alias=False)


def _destinations(shardings: PyTree, tree: PyTree, structure: Any) -> list[Sharding]:
    if isinstance(shardings, Sharding):
        return [shardings] * structure.num_leaves
    leaves, found = jax.tree.flatten(shardings)
    if found == structure:
        return leaves
    try:
        return jax.tree.leaves(jax.tree.broadcast(shardings, tree))
    except ValueError as error:
        raise ValueError(
            f"The shardings do not match the arrays: {error}. Give one sharding for"
            " every array, or one for a whole branch."
        ) from None


@functools.lru_cache(maxsize=256)
def _cast_dtype(dtype: np.dtype, new_dtype: np.dtype | None) -> np.dtype:
    if new_dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return new_dtype


def check_arrays(leaves: Sequence[Any], tree: PyTree) -> None:
    """Check that the leaves of a tree are arrays of this process, and alive.

    Raises:
        ValueError: one is not.
    """
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.Array):
            raise ValueError(
                f"{name_of(tree, number)} is a {type(leaf).__name__}. Parameters are"
                " put on devices when they are made or loaded; `move_array` uploads a"
                " NumPy array."
            )
        if leaf.is_deleted():
            raise ValueError(
                f"{name_of(tree, number)} was donated or deleted. Reallocate the array"
                " that the donating function returned."
            )


def name_of(tree: PyTree, number: int) -> str:
    """Return what messages call a leaf of a tree."""
    path, _ = jax.tree_util.tree_leaves_with_path(tree)[number]
    return f"Array {jax.tree_util.keystr(path) or 'given'}"


@contextlib.contextmanager
def naming(tree: PyTree) -> Iterator[None]:
    """Put the name of an array before what is wrong with it."""
    try:
        yield
    except UnfitArray as error:
        raise ValueError(f"{name_of(tree, error.number)}: {error}") from None
