"""Folders of safetensors files: reading parts of tensors, writing sharded sets.

A folder holds one `model.safetensors`, or several files and an index that says which
tensor is in which.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from realjax.models.layout import Box

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")


class TensorFiles:
    """The tensors of a folder, read in parts; a context manager.

    Opening checks every file: that it is there, whole, and holds what the index says.
    """

    def __init__(self, folder: str | Path):
        """Open every file of a checkpoint folder."""
        self.folder = Path(folder)
        self._files: list[Any] = []
        self._slices: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        wanted = _read_index(self.folder)
        try:
            for path in sorted(set(wanted.values())):
                self._open(path, {name for name, p in wanted.items() if p == path})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "TensorFiles":
        """Return itself: the files are open since construction."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every file."""
        self.close()

    def close(self) -> None:
        """Close every file."""
        self._slices.clear()
        for file in self._files:
            file.__exit__(None, None, None)
        self._files.clear()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._slices[name].get_shape())

    def path(self, name: str) -> Path:
        """Return the file a tensor is in."""
        return self._paths[name]

    def read(self, name: str, box: Box) -> np.ndarray:
        """Read a part of a tensor, and no more than that.

        Raises:
            ValueError: if the tensor is not of a float type numpy can hold.
        """
        stored_dtype = self._slices[name].get_dtype()
        if stored_dtype not in _FLOATS:
            raise ValueError(
                f"{self._paths[name]}: tensor {name!r} is stored as {stored_dtype};"
                f" supported are {', '.join(_FLOATS)}. Quantized checkpoints must be"
                " converted first."
            )
        return self._slices[name][box]

    def _open(self, path: Path, wanted: set[str]) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, but {self.folder / INDEX_FILE} names it. Download"
                " or copy the checkpoint again."
            )
        try:
            file = safe_open(str(path), framework="numpy")
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}). It was probably cut"
                " off while it was written: download or copy it again."
            ) from error
        self._files.append(file)
        names = set(file.keys())
        if missing := sorted(wanted - names - {""}):
            raise ValueError(
                f"{path} lacks the tensor {missing[0]!r}"
                f"{_and_more(missing)}, which {INDEX_FILE} says it holds."
            )
        for name in names:
            self._slices[name] = file.get_slice(name)
            self._paths[name] = path


def _read_index(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor; of none in particular for a single file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint folder {folder}.")
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{index} is not an index of safetensors files ({error!r})."
            ) from error
        return {name: folder / file for name, file in weight_map.items()}
    if (folder / SINGLE_FILE).is_file():
        return {"": folder / SINGLE_FILE}
    hint = ""
    if any(folder.glob("*.bin")):
        hint = " It holds .bin files: convert them to safetensors with transformers."
    raise FileNotFoundError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}.{hint}"
    )


def _and_more(names: list[str]) -> str:
    """Return " (and 3 more)" for a list of four, nothing for one."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int
) -> None:
    """Write tensors in order, into files of at most `max_shard_bytes` (or one tensor).

    One file's tensors are held in memory at a time.
    """
    shards: list[tuple[Path, list[str]]] = []
    total_bytes = 0

    def flush(pending: dict[str, np.ndarray]) -> None:
        path = folder / f"shard-{len(shards)}.partial"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append((path, list(pending)))

    pending: dict[str, np.ndarray] = {}
    pending_bytes = 0
    for name, array in tensors:
        if pending and pending_bytes + array.nbytes > max_shard_bytes:
            flush(pending)
            pending, pending_bytes = {}, 0
        pending[name] = array
        pending_bytes += array.nbytes
        total_bytes += array.nbytes
    flush(pending)
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE_FILE)
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
