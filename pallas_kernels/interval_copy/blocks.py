"""What a block of an array is, for those who copy it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Aligned:
    """A position that is known only when the program runs, and what divides it.

    Wide accesses of memory need that a block begins at a multiple of some number. The
    one who made the table of positions knows; the program that reads it does not.

    Attributes:
        value: The position.
        multiple: It is a multiple of this number; nothing checks.
    """

    value: jax.Array
    multiple: int

    def __add__(self, other: "Index") -> "Aligned":
        """Return the sum, and what divides both."""
        multiple = math.gcd(self.multiple, divisor_of(other))
        number = other.value if isinstance(other, Aligned) else other
        return Aligned(self.value + number, multiple)


Index = int | np.integer | jax.Array | Aligned
"""A position, known when the program is made or only when it runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A block of one of several inputs.

        start    (1, 2)     a corner: the input is an array of the block's rank
        offset   6          a place in a packed buffer, which is flat
        neither             the input is the block

    Attributes:
        input: Which of the inputs.
        size: Of the block, one number a dimension.
        start: Where it begins in an array, one index a dimension.
        offset: Where it begins in a packed buffer.
    """

    input: int
    size: tuple[int, ...]
    start: tuple[Index, ...] | None = None
    offset: int | None = None

    @property
    def num_elements(self) -> int:
        """The elements of the block."""
        return math.prod(self.size)


def static_start(start: Sequence[Index]) -> tuple[int, ...] | None:
    """Return a start that is known when the program is made, None for any other."""
    known = [int(at) for at in start if isinstance(at, int | np.integer)]
    return tuple(known) if len(known) == len(start) else None


def divisor_of(index: Index) -> int:
    """Return what a position is a multiple of, 0 for the position 0."""
    if isinstance(index, Aligned):
        return index.multiple
    return int(index) if isinstance(index, int | np.integer) else 1


def packed_dtype(arrays: Sequence[Any], dtype: Any) -> np.dtype:
    """Return the type of a packed buffer: the one asked for, or that of the arrays.

    Raises:
        ValueError: arrays of several types, and none asked for.
    """
    found = sorted({array.dtype.name for array in arrays})
    if dtype is None and len(found) > 1:
        raise ValueError(
            f"Arrays of {' and '.join(found)} do not fit in one buffer. Pack each type"
            " by itself, or give the `dtype` all are cast to."
        )
    return np.dtype(arrays[0].dtype if dtype is None else dtype)
