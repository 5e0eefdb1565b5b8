"""Stored tensors made from parameters on devices, one at a time, by all processes.

    parameter [layer, ...]      of any sharding, over the devices of any processes
      └ item of one layer       gathered: from this process's shards if it has all of
                                them, else by all processes together
          └ stored tensor       laid out, without padding, joined with its other parts

Processes come to the same items in the same order, since gathering is a collective of
the devices that hold the parameter, and of no others.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from realjax.core.arrays import Array, PyTree
from realjax.models import layout
from realjax.models.layout import Stored

SMALL_BYTES = 16 * 2**20
"""Of a parameter that is copied to the host whole, which compiles nothing."""


@runtime_checkable
class Agreement(Protocol):
    """How the processes of a run wait for each other, and fail as one.

    `realjax.runtime.agreement` has it; here are no processes but the own one.
    """

    def gather[T](self, act: Callable[[], T]) -> list[T]:
        """Act in every process; return what each found."""
        ...

    def together[T](self, act: Callable[[], T]) -> T:
        """Act in every process; return what this one found."""
        ...


class Alone:
    """The agreement of one process with itself."""

    def gather[T](self, act: Callable[[], T]) -> list[T]:
        """Act; return what was found."""
        return [act()]

    def together[T](self, act: Callable[[], T]) -> T:
        """Act; return what was found."""
        return act()


def alone() -> Agreement:
    """Return the agreement of a run of one process.

    Raises:
        ValueError: there are several.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes save together, and there is no"
            " `agreement` for them to wait for each other. Give each a"
            " `realjax.runtime.agreement.Agreement`."
        )
    return Alone()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Merged:
    """A projection with its adapter added, item by item: kernel + scale × A B.

    It stands in a tree where the sum would, which nobody holds whole.

    Attributes:
        kernel: [layer, inputs…, outputs…], on any devices.
        first: A, [layer, inputs…, rank].
        second: B, [layer, rank, outputs…].
        scale: of their product.
    """

    kernel: Array
    first: Array
    second: Array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.kernel.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A parameter, or an item of a stacked one, that a stored tensor is made of.

    Attributes:
        tensor: its layout.
        array: the parameter, padding included; or a `Merged` in its place.
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
        item = _item(source, dtype, is_wanted)
        if item is not None:
            stored = layout.to_stored(source.tensor, item)
            parts[source.tensor.part[1] if source.tensor.part else 0] = stored
    return layout.join_parts(parts, sources[0].tensor) if is_wanted else None


def writers(tree: PyTree, agreement: Agreement) -> list[int]:
    """Return the processes that can write a tree: those whose devices hold it.

    All of them, where each has a copy of its own, on the host or on its devices.

    Raises:
        ValueError: if they hold different parts of it, or do not mean the same arrays.
    """
    leaves = jax.tree.leaves(tree)
    views = agreement.gather(lambda: [_holders(leaf) for leaf in leaves])
    found = set()
    for seen in zip(*views, strict=True):
        is_own = all(holders in ([], [p]) for p, holders in enumerate(seen))
        is_shared = all(holders == seen[0] for holders in seen)
        if is_shared and seen[0]:
            found.add(tuple(seen[0]))
        elif not is_own:
            raise ValueError(
                "The processes do not save the same arrays: one lies in the processes"
                f" {', '.join(map(str, seen))}, as each of them sees it. Give all of"
                " them the same parameters, or their handles."
            )
    if len(found) > 1:
        raise ValueError(
            "The parameters lie on the devices of different processes:"
            f" {', '.join(map(str, sorted(found)))}. Save parameters of one allocation."
        )
    return list(found.pop()) if found else list(range(len(views)))


def _holders(leaf: Any) -> list[int]:
    leaf = leaf.kernel if isinstance(leaf, Merged) else leaf
    if not isinstance(leaf, jax.Array):
        return []
    return sorted({device.process_index for device in leaf.sharding.device_set})


def _item(source: Source, dtype: np.dtype, is_wanted: bool) -> np.ndarray | None:
    """Gather an item; its padding is cut off."""
    array, cut = source.array, tuple(map(slice, source.shape))
    parts, scale = (array,), 0.0
    if isinstance(array, Merged):
        parts, scale = (array.kernel, array.first, array.second), array.scale
        array = array.kernel
    is_ours = not isinstance(array, jax.Array) or array.is_fully_addressable
    if is_ours and not is_wanted:
        return None
    is_small = is_ours and array.nbytes <= SMALL_BYTES and len(parts) == 1
    if not isinstance(array, jax.Array) or is_small:
        return np.asarray(array)[source.index][cut].astype(dtype, copy=False)
    if not array.sharding.addressable_devices:
        return None
    order = source.tensor.order
    item = _item_on_devices(
        parts,
        np.asarray(source.index, np.int32),
        scale,
        order,
        dtype,
        _item_sharding(array, order, is_replicated=not is_ours),
    )
    if not is_wanted:
        # Items would pile up on these devices, far ahead of the process that writes.
        jax.block_until_ready(item)
        return None
    host = np.asarray(item if is_ours else item.addressable_data(0))
    return host.transpose(np.argsort(order))[cut]


def _item_sharding(
    array: Array, order: tuple[int, ...], *, is_replicated: bool
) -> Sharding | None:
    """Return how an item lies on the devices: as in the array, or whole on each."""
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    lead = array.ndim - len(order)
    inner = [None if is_replicated else spec[lead + dimension] for dimension in order]
    return NamedSharding(sharding.mesh, PartitionSpec(*inner))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _item_on_devices(
    parts: tuple[Array, ...],
    index: Array,
    scale: float,
    order: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None,
) -> Array:
    """Take an item of the stack, lay it out and cast it: devices do that faster."""
    for place in index:
        parts = tuple(
            jax.lax.dynamic_index_in_dim(part, place, keepdims=False) for part in parts
        )
    array, *adapter = parts
    if adapter:
        first, second = (part.astype(jnp.float32) for part in adapter)
        update = jnp.tensordot(first, second, 1, precision=jax.lax.Precision.HIGHEST)
        array = array.astype(jnp.float32) + scale * update
    # A copy, even if there is nothing to do: an array keeps the host copy that was
    # once made of it, and this one is soon gone.
    item = jnp.copy(array.transpose(order).astype(dtype))
    if sharding is None:
        return item
    return jax.lax.with_sharding_constraint(item, sharding)
