"""Tensors in files: where each lies, and reading a part of one by its byte ranges.

A part is rows of bytes at equal distances. Only the rows are read; where what lies
between them is less than a page, which the disk would deliver anyway, whole blocks are
read through a buffer and cut:

    tensor [6, 8], part [1:4, 2:5]      . . . . . . . .
                                        . . x x x . . .
                                        . . x x x . . .
                                        . . x x x . . .
                                        . . . . . . . .

Nothing is mapped into memory: mapped pages count as the process's own until they are
given back, and a file that shrinks under a mapping kills the process.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from realjax.models.layout import Box

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Types that can be read, by the names that safetensors give them."""

BUFFER_BYTES = 4 * 2**20
_PAGE_BYTES = 4096


class TensorPlace(NamedTuple):
    """Where a tensor lies.

    Attributes:
        path: of its file.
        start: byte of the file at which its elements begin.
        shape: of the tensor.
        dtype: by the name that safetensors give it; need not be a float.
        strides: elements from one index to the next, for every dimension; None where
            the elements are in row-major order without gaps.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a row-major array."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


class ByteRanges:
    """Open files, read in parts; a context manager.

    Attributes:
        bytes_read: so far, what was read through included.
    """

    def __init__(self):
        """Opens nothing yet; a file is opened at its first read, if not before."""
        self.bytes_read = 0
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "ByteRanges":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every file."""
        self.close()

    def open(self, path: Path) -> None:
        """Open a file now, so that it stays this one if its name is given away."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, name: str, place: TensorPlace, box: Box) -> np.ndarray:
        """Read a part of a tensor.

        Args:
            name: of the tensor, for errors.
            place: of the tensor, of a type in `FLOATS`.
            box: the part, in the tensor's dimensions.

        Raises:
            ValueError: the file ends before the part does.
        """
        bounds = [s.indices(n)[:2] for s, n in zip(box, place.shape, strict=True)]
        sizes = [stop - start for start, stop in bounds]
        dtype = FLOATS[place.dtype]
        if 0 in sizes:
            return np.empty(sizes, dtype)
        if place.strides is not None:
            return self._read_strided(name, place, bounds)
        result = np.empty(sizes, dtype)
        self._fill(name, place, bounds, result.reshape(-1).view(np.uint8))
        return result

    def _fill(
        self,
        name: str,
        place: TensorPlace,
        bounds: list[tuple[int, int]],
        target: np.ndarray,
    ) -> None:
        """Read the rows of a part, one after the other, into bytes."""
        sizes = [stop - start for start, stop in bounds]
        strides = row_major(place.shape)
        itemsize = FLOATS[place.dtype].itemsize
        # The last dimension that is cut decides how long a row is.
        is_cut = [size != n for size, n in zip(sizes, place.shape, strict=True)]
        last = max((d for d, cut in enumerate(is_cut) if cut), default=0)
        if not sizes or last == 0:
            first = bounds[0][0] * strides[0] * itemsize if sizes else 0
            self._read_exactly(name, place, place.start + first, target)
            return
        row_bytes = sizes[last] * strides[last] * itemsize
        step = strides[last - 1] * itemsize
        num_rows = sizes[last - 1]
        for number, index in enumerate(np.ndindex(*sizes[: last - 1])):
            origin = [start for start, _ in bounds]
            for dimension, offset in enumerate(index):
                origin[dimension] += offset
            first = sum(i * s for i, s in zip(origin, strides, strict=True)) * itemsize
            rows = target[number * num_rows * row_bytes :][: num_rows * row_bytes]
            self._read_rows(
                name, place, place.start + first, step, rows.reshape(num_rows, -1)
            )

    def _read_rows(
        self, name: str, place: TensorPlace, start: int, step: int, rows: np.ndarray
    ) -> None:
        """Read rows of bytes that start `step` bytes apart."""
        num_rows, row_bytes = rows.shape
        if step - row_bytes >= _PAGE_BYTES:
            for number in range(num_rows):
                self._read_exactly(name, place, start + number * step, rows[number])
            return
        block = max(1, BUFFER_BYTES // step)
        buffer = np.empty(min(block, num_rows) * step, np.uint8)
        for first in range(0, num_rows, block):
            count = min(block, num_rows - first)
            # What lies behind the last row may be behind the end of the file.
            span = (count - 1) * step + row_bytes
            self._read_exactly(name, place, start + first * step, buffer[:span])
            whole = buffer[: count * step].reshape(count, step)
            rows[first : first + count] = whole[:, :row_bytes]

    def _read_strided(
        self, name: str, place: TensorPlace, bounds: list[tuple[int, int]]
    ) -> np.ndarray:
        """Read all between a part's first and last element, and pick out the part."""
        assert place.strides is not None
        dtype = FLOATS[place.dtype]
        steps = list(zip(bounds, place.strides, strict=True))
        first = sum(start * step for (start, _), step in steps)
        last = sum((stop - 1) * step for (_, stop), step in steps)
        span = np.empty(last - first + 1, dtype)
        start = place.start + first * dtype.itemsize
        self._read_exactly(name, place, start, span.view(np.uint8))
        sizes = [stop - start for start, stop in bounds]
        strides = [s * dtype.itemsize for s in place.strides]
        return np.lib.stride_tricks.as_strided(span, sizes, strides)

    def _read_exactly(
        self, name: str, place: TensorPlace, start: int, target: np.ndarray
    ) -> None:
        self.open(place.path)
        descriptor = self._descriptors[place.path]
        view, done = memoryview(target), 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], start + done)
            if not count:
                raise ValueError(
                    f"{place.path} ends at byte {start + done}, within the tensor"
                    f" {name!r}. It was cut off: download or copy it again."
                )
            done += count
        self.bytes_read += done
