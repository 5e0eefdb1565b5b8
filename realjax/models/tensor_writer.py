"""Writing sets of safetensors files: what goes where is known before any number is.

Names, shapes and type decide how tensors spread over files, so that every process of a
run arrives at the same plan and writes files of its own, and a file is written from
its first byte to its last with one tensor in memory at a time.
"""

import json
import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from realjax.models.byte_ranges import FLOATS
from realjax.models.tensor_files import INDEX_FILE, SINGLE_FILE

_ALIGNMENT = 8  # Of the first tensor; readers map files and cast.


class PlannedFile(NamedTuple):
    """A file to be written.

    Attributes:
        name: in the folder.
        shapes: of its tensors, by name, in the order they lie in it.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]


def plan_files(
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    dtype: np.dtype,
    max_shard_bytes: int,
) -> list[PlannedFile]:
    """Spread tensors, in order, over files of at most `max_shard_bytes` (or a tensor).

    Args:
        shapes: name and shape of every tensor.
        dtype: of all of them.
        max_shard_bytes: of one file; a larger tensor gets its own.
    """
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    pending_bytes = 0
    for name, shape in shapes:
        num_bytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and pending_bytes + num_bytes > max_shard_bytes:
            groups.append({})
            pending_bytes = 0
        groups[-1][name] = tuple(shape)
        pending_bytes += num_bytes
    if len(groups) == 1:
        return [PlannedFile(SINGLE_FILE, groups[0])]
    return [
        PlannedFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def write_file(
    folder: Path, planned: PlannedFile, arrays: Iterable[np.ndarray], dtype: np.dtype
) -> None:
    """Write a file from its tensors, one at a time.

    Args:
        folder: to write into.
        planned: the file.
        arrays: of the planned shapes, in the planned order; cast to `dtype`.
        dtype: to store.

    Raises:
        ValueError: if an array has another shape than planned.
    """
    with (folder / planned.name).open("wb") as file:
        file.write(_header(planned.shapes, dtype))
        for (name, shape), array in zip(planned.shapes.items(), arrays, strict=True):
            if array.shape != shape:
                raise ValueError(
                    f"The tensor {name!r} to be saved has the shape {array.shape}, and"
                    f" {shape} was planned."
                )
            stored = np.ascontiguousarray(array, dtype)
            file.write(stored.reshape(-1).view(np.uint8).data)


def write_index(folder: Path, plan: Sequence[PlannedFile], dtype: np.dtype) -> None:
    """Write which tensor is in which file; nothing where there is but one file."""
    if len(plan) == 1:
        return
    weight_map = {name: file.name for file in plan for name in file.shapes}
    num_elements = sum(math.prod(s) for file in plan for s in file.shapes.values())
    index = {
        "metadata": {"total_size": num_elements * dtype.itemsize},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def check_stored_dtype(dtype: np.dtype) -> None:
    """Check that tensors can be stored in a type.

    Raises:
        ValueError: if it is not one of the floats that are read again.
    """
    if dtype not in FLOATS.values():
        raise ValueError(
            f"Tensors cannot be stored as {dtype.name}; choose one of"
            f" {', '.join(d.name for d in FLOATS.values())}."
        )


def _header(shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    stored = next(name for name, known in FLOATS.items() if known == dtype)
    # transformers asks for this before it reads a file.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": stored,
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
