"""Stored tensors made from parameters on devices, one at a time, by all processes.

    parameter [layer, ...]      of any sharding, over the devices of any processes
      └ item of one layer       gathered: from this process's shards if it has all of
                                them, else by all processes together
          └ stored tensor       laid out, without padding, joined with its other parts

Processes come to the same items in the same order, since gathering is a collective.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from realjax.core.arrays import Array, PyTree
from realjax.models import layout
from realjax.models.layout import Stored

BARRIER_SECONDS = 3600
"""How long a process waits for the others; they may be writing a large model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A parameter, or an item of a stacked one, that a stored tensor is made of.

    Attributes:
        tensor: its layout.
        array: the parameter, padding included.
        index: of the item in the parameter's stacked dimensions.
        shape: of the item without padding.
    """

    tensor: Stored
    array: Any
    index: tuple[int, ...]
    shape: tuple[int, ...]


def stored_sources(
    leaves: Sequence[tuple[Stored, Any, tuple[int, ...]]],
) -> dict[str, list[Source]]:
    """Return what every stored tensor is made of, by its name, in order.

    Args:
        leaves: layout, array, and shape without padding of every parameter.
    """
    sources: dict[str, list[Source]] = {}
    groups: dict[str, list] = {}
    for leaf in leaves:
        groups.setdefault(leaf[0].name, []).append(leaf)
    for group in groups.values():
        lead = group[0][0].num_stacked
        for index in np.ndindex(group[0][2][:lead]):
            sources[group[0][0].item_name(index)] = [
                Source(tensor=tensor, array=array, index=index, shape=shape[lead:])
                for tensor, array, shape in group
            ]
    return sources


def gather(
    sources: Sequence[Source], dtype: np.dtype, *, is_wanted: bool = True
) -> np.ndarray | None:
    """Make a stored tensor on the host.

    Args:
        sources: all its parts.
        dtype: of the result.
        is_wanted: whether this process needs it; where it does not, it takes part in
            what others need of its devices, and gets None.
    """
    parts: dict[int, np.ndarray] = {}
    for source in sources:
        item = _item(source, is_wanted)
        if item is not None:
            stored = layout.to_stored(source.tensor, item.astype(dtype, copy=False))
            parts[source.tensor.part[1] if source.tensor.part else 0] = stored
    return layout.join_parts(parts, sources[0].tensor) if is_wanted else None


def processes_of(tree: PyTree) -> list[int]:
    """Return the processes whose devices hold a tree; all, for arrays on the host.

    Raises:
        ValueError: if they hold different parts of it.
    """
    found = {
        frozenset(device.process_index for device in leaf.sharding.device_set)
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    }
    if len(found) > 1:
        raise ValueError(
            f"The parameters lie on the devices of different processes: {found}. Save"
            " parameters of one allocation."
        )
    return sorted(found.pop()) if found else list(range(jax.process_count()))


def wait_for_all(name: str) -> None:
    """Wait until every process of the run has come here; nothing is computed.

    Args:
        name: of this place; a process at another place is an error.

    Raises:
        jax.errors.JaxRuntimeError: if a process does not come.
    """
    if jax.process_count() == 1:
        return
    # jax names no public barrier but a collective, which would need devices that may
    # be busy and that some processes do not have.
    from jax._src import distributed

    client: Any = distributed.global_state.client
    client.wait_at_barrier(name, timeout_in_ms=1000 * BARRIER_SECONDS)


def _item(source: Source, is_wanted: bool) -> np.ndarray | None:
    """Gather an item; its padding is cut off."""
    array, cut = source.array, tuple(map(slice, source.shape))
    if not isinstance(array, jax.Array):
        return np.asarray(array)[source.index][cut] if is_wanted else None
    if array.is_fully_addressable:
        return _from_shards(array, source.index)[cut] if is_wanted else None
    if not array.sharding.addressable_devices:
        return None
    index = np.asarray(source.index, np.int32)
    whole = _replicated_item(array, index, len(source.index), array.sharding)
    return np.asarray(whole.addressable_data(0))[cut] if is_wanted else None


def _from_shards(array: Array, index: tuple[int, ...]) -> np.ndarray:
    """Put an item together from shards of this process."""
    lead = len(index)
    item: np.ndarray | None = None
    seen = set()
    for shard in array.addressable_shards:
        bounds = [
            s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)
        ]
        stacked, inner = bounds[:lead], tuple(bounds[lead:])
        holds = all(a <= i < b for i, (a, b) in zip(index, stacked, strict=True))
        if not holds or inner in seen:
            continue
        seen.add(inner)
        local = tuple(i - a for i, (a, _) in zip(index, stacked, strict=True))
        part = _to_host(shard.data, local)
        if part.shape == array.shape[lead:]:
            return part
        if item is None:
            item = np.empty(array.shape[lead:], array.dtype)
        item[tuple(slice(*bound) for bound in inner)] = part
    assert item is not None  # Some shard holds every index.
    return item


def _to_host(data: Array, index: tuple[int, ...]) -> np.ndarray:
    """Copy an item of a shard to the host, or look at it where it is there already."""
    if data.sharding.is_fully_addressable and _is_host(data):
        return np.asarray(data)[index]
    # Of a new array: an array keeps the host copy that was once made of it.
    return np.asarray(_local_item(data, np.asarray(index, np.int32), len(index)))


def _is_host(data: Array) -> bool:
    return all(device.platform == "cpu" for device in data.sharding.device_set)


def _take(array: Array, index: Array, num_stacked: int) -> Array:
    for dimension in range(num_stacked):
        array = jax.lax.dynamic_index_in_dim(array, index[dimension], keepdims=False)
    return jnp.copy(array)


_local_item = functools.partial(jax.jit, static_argnums=2)(_take)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _replicated_item(
    array: Array, index: Array, num_stacked: int, sharding: NamedSharding
) -> Array:
    """Bring an item to every device."""
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    item = _take(array, index, num_stacked)
    return jax.lax.with_sharding_constraint(item, everywhere)
