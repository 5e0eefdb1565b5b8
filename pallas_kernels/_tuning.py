"""Block sizes that were the fastest where they were measured.

    tuned/nvidia_h200.json
        {"paged_attention": {"bfloat16 bfloat16 | 64 32 8 128 1024": {"splits": 4}}}

A table for each kind of device, and in it for each operation: types and shape, with
every dimension rounded up to a power of two. Where nothing was measured, the kernel's
own default serves. `testing/sweep.py` fills the tables on a GPU.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from pallas_kernels._dispatch import Device

FOLDER = pathlib.Path(__file__).parent / "tuned"


def tuned[Blocks](
    operation: str,
    default: Blocks,
    *,
    device: Device,
    dtypes: Sequence[Any],
    shape: Sequence[int],
) -> Blocks:
    """Return the block sizes for a shape: the measured ones, or the default.

    Args:
        operation: the folder of the kernel.
        default: a dataclass of numbers; the result is of its class.
        device: that the kernel will run on.
        dtypes: of what decides the speed, in a fixed order.
        shape: likewise.

    Raises:
        ValueError: the table has a name that the class does not.
    """
    found = _table(file_of(device)).get(operation, {}).get(key_of(dtypes, shape))
    if found is None:
        return default
    known = {field.name for field in dataclasses.fields(default)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(set(found) - known):
        raise ValueError(
            f"{file_of(device)} gives {operation} {', '.join(unknown)}, which it does"
            f" not have; it has {', '.join(sorted(known))}. Sweep again."
        )
    return dataclasses.replace(default, **found)  # pyright: ignore[reportArgumentType]


def key_of(dtypes: Sequence[Any], shape: Sequence[int]) -> str:
    """Return the name of a bucket: types, and dimensions as powers of two."""
    names = [getattr(dtype, "name", None) or str(dtype) for dtype in dtypes]
    sizes = [str(1 << max(0, size - 1).bit_length()) for size in shape]
    return f"{' '.join(names)} | {' '.join(sizes)}"


def file_of(device: Device) -> pathlib.Path:
    """Return where the table of a kind of device is, or would be."""
    name = re.sub(r"[^a-z0-9]+", "_", (device.kind or "unknown").lower()).strip("_")
    return FOLDER / f"{name}.json"


@functools.cache
def _table(path: pathlib.Path) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(path.read_text()) if path.exists() else {}
