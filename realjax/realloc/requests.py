"""What reallocation is asked to do with one array."""

import math
from typing import NamedTuple

import numpy as np
from jax.sharding import Sharding

from realjax.realloc.routes import Layout, Route, route


class Request(NamedTuple):
    """One array's move: where from, where to, and as what type.

    Attributes:
        source: The sharding it has.
        destination: The sharding it shall have.
        shape: Of the whole array.
        dtype: The type it has.
        new_dtype: The type it shall have.
        is_mixed: It is averaged with what is there.
    """

    source: Sharding
    destination: Sharding
    shape: tuple[int, ...]
    dtype: np.dtype
    new_dtype: np.dtype
    is_mixed: bool = False

    @property
    def wire_dtype(self) -> np.dtype:
        """The type on the way: the narrower of the two, its own where it is mixed."""
        is_narrowed = self.new_dtype.itemsize < self.dtype.itemsize
        return self.new_dtype if is_narrowed and not self.is_mixed else self.dtype

    @property
    def wire_bytes(self) -> int:
        """The bytes of the whole array on its way."""
        return math.prod(self.shape) * self.wire_dtype.itemsize

    @property
    def route(self) -> Route:
        """What moves where."""
        return route(
            Layout.of(self.source),
            Layout.of(self.destination),
            self.shape,
            self.wire_dtype,
        )
