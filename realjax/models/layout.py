"""How stored tensors hold one of our parameters: transposed, merged, unstacked, fused.

Published checkpoints store a matrix per layer (and expert) as [outputs, inputs] with
the heads merged; ours is stacked over layers, [layer, inputs, outputs], heads apart.
The difference is only an order and a merging of dimensions, so any part of ours is a
part of theirs:

    ours    [L, D, H, K][l, 0:8, 2:4, :]
    theirs  [H x K, D]  [2K:4K, 0:8]      of the tensor of layer l

One stored tensor may hold several parameters side by side, as GPT-2's c_attn holds
query, key and value; each is then an equal block of one of its dimensions:

    ours    [L, D, H, K] keys             block 1 of 3 along dimension 1
    theirs  [D, 3 x H x K][:, HK:2HK]     of the tensor of layer l
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

Box = tuple[slice, ...]


class Stored(NamedTuple):
    """Name and layout of the stored tensors of a parameter.

    Attributes:
        name: with "{layer}" in it when there is one tensor per layer, and "{expert}"
            when there is one per expert of every layer. Those are the first dimensions
            of ours, in this order; what is left is an item, held by one tensor.
        groups: for each stored dimension, the dimensions of ours (of an item) merged in
            it, major first. Query kernels are ((1, 2), (0,)): [D, H, K] stored as
            [H x K, D].
        part: (dimension, index, count) when the tensor holds several parameters: its
            `dimension` is `count` equal blocks, and ours is the `index`-th.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    part: tuple[int, int, int] | None = None

    @property
    def is_stacked(self) -> bool:
        """There is one tensor per layer, at least."""
        return self.num_stacked > 0

    @property
    def num_stacked(self) -> int:
        """Dimensions of ours that the name stands for."""
        return ("{layer}" in self.name) + ("{expert}" in self.name)

    @property
    def order(self) -> tuple[int, ...]:
        """Dimensions of an item in the order in which they are stored."""
        return tuple(dimension for group in self.groups for dimension in group)

    def item_name(self, index: Sequence[int]) -> str:
        """Name of the tensor at an index of the first `num_stacked` dimensions."""
        places = [place for place in ("layer", "expert") if f"{{{place}}}" in self.name]
        return self.name.format(**dict(zip(places, index, strict=True)))

    def names(self, shape: Sequence[int]) -> list[str]:
        """Names of all stored tensors of a parameter of `shape`, layer by layer.

        Without a "{layer}" there is one, whatever the shape.
        """
        sizes = map(range, shape[: self.num_stacked])
        return [self.item_name(index) for index in itertools.product(*sizes)]


def stored_shape(stored: Stored, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the stored tensor of an item of `shape`, other parts too."""
    sizes = _part_shape(stored, shape)
    if stored.part is not None:
        dimension, _, count = stored.part
        sizes[dimension] *= count
    return tuple(sizes)


def to_stored(stored: Stored, array: np.ndarray) -> np.ndarray:
    """Lay out an item as the stored tensor, or as its part of it."""
    merged = array.transpose(stored.order).reshape(_part_shape(stored, array.shape))
    return np.ascontiguousarray(merged)


def join_parts(parts: Mapping[int, np.ndarray], stored: Stored) -> np.ndarray:
    """Put the parts of a stored tensor, by their index, side by side.

    Raises:
        ValueError: if one is missing.
    """
    if stored.part is None:
        return parts[0]
    dimension, _, count = stored.part
    if missing := [index for index in range(count) if index not in parts]:
        raise ValueError(
            f"The stored tensor {stored.name!r} is {count} parameters side by side, and"
            f" no parameter is its part {missing[0]}. Name each part in the family's"
            " stored_tensors."
        )
    return np.concatenate([parts[index] for index in range(count)], axis=dimension)


def read_box(
    stored: Stored,
    shape: Sequence[int],
    box: Box,
    read: Callable[[Box], np.ndarray],
) -> np.ndarray:
    """Read a part of an item from the part of the stored tensor that holds it.

    Args:
        stored: layout of the tensor.
        shape: of the whole item.
        box: the part wanted, in our dimensions.
        read: reads a part of the stored tensor. When a minor dimension of a merged one
            is cut, more than the part wanted is read.

    Returns:
        The part wanted, in our layout.
    """
    bounds = [s.indices(n)[:2] for s, n in zip(box, shape, strict=True)]
    stored_box, read_shape, cuts = [], [], []
    for group in stored.groups:
        minor_size = math.prod(shape[d] for d in group[1:])
        start, stop = bounds[group[0]]
        stored_box.append(slice(start * minor_size, stop * minor_size))
        read_shape += [stop - start, *(shape[d] for d in group[1:])]
        cuts += [slice(None), *(slice(*bounds[d]) for d in group[1:])]
    if stored.part is not None:
        dimension, index, _ = stored.part
        first = index * _part_shape(stored, shape)[dimension]
        cut = stored_box[dimension]
        stored_box[dimension] = slice(first + cut.start, first + cut.stop)
    part = read(tuple(stored_box)).reshape(read_shape)[tuple(cuts)]
    return part.transpose(np.argsort(stored.order))


def read_parameter(
    stored: Stored,
    shape: Sequence[int],
    box: Box,
    read: Callable[[str, Box], np.ndarray],
    dtype: DTypeLike,
) -> np.ndarray:
    """Read a part of a parameter from all the stored tensors it is in.

    Args:
        stored: layout of the tensors.
        shape: of the whole parameter as it is stored, without padding.
        box: the part wanted, with a start and a stop in every dimension; what lies
            past `shape` is padding.
        read: reads a part of the tensor of a name.
        dtype: of the result.

    Returns:
        The part wanted, with zeros where there is padding; in memory its dimensions
        are in the order in which they are stored.
    """
    inside = [slice(s.start, min(s.stop, n)) for s, n in zip(box, shape, strict=True)]
    lead = stored.num_stacked
    order = [*range(lead), *(lead + dimension for dimension in stored.order)]
    sizes = [box[dimension].stop - box[dimension].start for dimension in order]
    is_padded = inside != list(box)
    whole = np.zeros(sizes, dtype) if is_padded else np.empty(sizes, dtype)
    result = whole.transpose(np.argsort(order))
    if any(s.stop <= s.start for s in inside):
        return result
    filled = tuple(slice(0, s.stop - s.start) for s in inside[lead:])
    for index in itertools.product(*(range(s.start, s.stop) for s in inside[:lead])):
        name = stored.item_name(index)
        read_item = lambda part, name=name: read(name, part)
        item = read_box(stored, shape[lead:], tuple(inside[lead:]), read_item)
        place = [i - s.start for i, s in zip(index, inside[:lead], strict=True)]
        result[(*place, *filled)] = item
    return result


def _part_shape(stored: Stored, shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[d] for d in group) for group in stored.groups]
