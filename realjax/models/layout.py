"""How a stored tensor holds one of our parameters: transposed, heads merged, unstacked.

Published checkpoints store a matrix per layer as [outputs, inputs] with the heads
merged; ours is stacked over layers, [layer, inputs, outputs], heads apart. The
difference is only an order and a merging of dimensions, so any part of ours is a part
of theirs:

    ours    [L, D, H, K][l, 0:8, 2:4, :]
    theirs  [H x K, D]  [2K:4K, 0:8]      of the tensor of layer l
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Box = tuple[slice, ...]


class Stored(NamedTuple):
    """Name and layout of a stored tensor.

    Attributes:
        name: with "{layer}" in it when there is one tensor per layer.
        groups: for each stored dimension, the dimensions of ours (of one layer's part
            if there is one tensor per layer) merged in it, major first. Query kernels
            are ((1, 2), (0,)): [D, H, K] stored as [H x K, D].
    """

    name: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def is_stacked(self) -> bool:
        """There is one tensor per layer."""
        return "{layer}" in self.name

    def names(self, num_layers: int) -> list[str]:
        """Names of all stored tensors."""
        if not self.is_stacked:
            return [self.name]
        return [self.name.format(layer=layer) for layer in range(num_layers)]


def stored_shape(stored: Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the stored tensor of a parameter (of a layer) of `shape`."""
    return tuple(math.prod(shape[d] for d in group) for group in stored.groups)


def to_stored(stored: Stored, array: np.ndarray) -> np.ndarray:
    """Lay out a parameter (of a layer) as the stored tensor."""
    order = [d for group in stored.groups for d in group]
    merged = array.transpose(order).reshape(stored_shape(stored, array.shape))
    return np.ascontiguousarray(merged)


def read_box(
    stored: Stored,
    shape: tuple[int, ...],
    box: Box,
    read: Callable[[Box], np.ndarray],
) -> np.ndarray:
    """Read a part of a parameter (of a layer) from the part that holds it.

    Args:
        stored: layout of the tensor.
        shape: of the whole parameter (of a layer).
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
    part = read(tuple(stored_box)).reshape(read_shape)[tuple(cuts)]
    order = [d for group in stored.groups for d in group]
    return part.transpose(np.argsort(order))
