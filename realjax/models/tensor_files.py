"""Folders of tensor files: which tensor is in which, and reading parts of tensors.

A folder holds one file, or several and an index that says which tensor is in which:

    model.safetensors     or  model.safetensors.index.json, model-00001-of-00003.…
    pytorch_model.bin     or  pytorch_model.bin.index.json, pytorch_model-00001-of-…

Where there are several kinds, the first of these is read. A safetensors file is eight
bytes that say how long its header is, the header (JSON: type, shape and bytes of every
tensor), and the tensors.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from realjax.models import torch_files
from realjax.models.byte_ranges import FLOATS, ByteRanges, TensorPlace
from realjax.models.layout import Box

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_SINGLE_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"

_MAX_HEADER_BYTES = 100 * 2**20  # The limit of the format's own reader.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}


class TensorFiles:
    """The tensors of a folder, read in parts; a context manager.

    Opening checks every file: that it is there, whole, and holds what the index says.
    What was opened is read, also if another checkpoint takes the folder's name.
    """

    def __init__(
        self, folder: str | Path, needed: Iterable[str] = (), *, file: str = ""
    ):
        """Open a checkpoint folder.

        Args:
            folder: of the files.
            needed: names of tensors that will be read, so that the message about a
                file of which nothing can be read says what is missing.
            file: the one to open, and no other.

        Raises:
            FileNotFoundError: if the folder or one of its files is missing.
            ValueError: if a file is broken, or the folder is replaced meanwhile.
        """
        self.folder = Path(folder)
        self._ranges = ByteRanges()
        self._places: dict[str, TensorPlace] = {}
        try:
            self._open_all(set(needed), file)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "TensorFiles":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close every file."""
        self.close()

    def close(self) -> None:
        """Close every file."""
        self._ranges.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    @property
    def paths(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({place.path for place in self._places.values()})

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return self._ranges.bytes_read

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        """Type a tensor is stored as, by the name that safetensors give it."""
        return self._places[name].dtype

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names, here and not in the files."""
        for old, new in names.items():
            self._places[new] = self._places.pop(old)

    def path(self, name: str) -> Path:
        """Return the file a tensor is in."""
        return self._places[name].path

    def check_dtype(self, name: str) -> None:
        """Check that a tensor can be read.

        Raises:
            ValueError: if it is not of a float type numpy can hold.
        """
        if self.dtype(name) not in FLOATS:
            raise ValueError(
                f"{self.path(name)}: tensor {name!r} is stored as {self.dtype(name)};"
                f" supported are {', '.join(FLOATS)}. Quantized checkpoints must be"
                " converted first."
            )

    def read(self, name: str, box: Box) -> np.ndarray:
        """Read a part of a tensor, and no more than that.

        Raises:
            ValueError: if the tensor is not of a float type numpy can hold.
        """
        self.check_dtype(name)
        return self._ranges.read(name, self._places[name], box)

    def _open_all(self, needed: set[str], file: str) -> None:
        before = _identity(self.folder)
        found = (file, "", {}) if file else _find_files(self.folder)
        single_file, index, weight_map = found
        files = sorted(set(weight_map.values())) if index else [single_file]
        for name in files:
            wanted = {tensor for tensor, where in weight_map.items() if where == name}
            self._open(self.folder / name, wanted, wanted or needed, index)
        if _identity(self.folder) != before:
            raise ValueError(
                f"{self.folder} was replaced by another checkpoint while it was opened."
                " Load it again."
            )

    def _open(
        self, path: Path, wanted: set[str], expected: set[str], index: str
    ) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, but {self.folder / index} names it. Download or"
                " copy the checkpoint again."
            )
        self._ranges.open(path)
        is_torch = path.suffix != ".safetensors"
        read_places = torch_files.read_places if is_torch else _read_header
        found = read_places(path, sorted(expected))
        if missing := sorted(wanted - found.keys()):
            raise ValueError(
                f"{path} lacks the tensor {missing[0]!r}"
                f"{_and_more(missing)}, which {index} says it holds."
            )
        # A tensor may be in a second file too; the index says which one counts.
        is_new = lambda name: name in wanted or name not in self._places
        self._places |= {name: found[name] for name in found if is_new(name)}


def _identity(folder: Path) -> tuple[int, int] | None:
    """Tell a folder from another one of its name."""
    if not folder.exists():
        return None
    found = folder.stat()
    return found.st_dev, found.st_ino


def _find_files(folder: Path) -> tuple[str, str, dict[str, str]]:
    """Return the single file, or the index and the file it gives for every tensor."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint folder {folder}.")
    for single_file, index in (
        (SINGLE_FILE, INDEX_FILE),
        (TORCH_SINGLE_FILE, TORCH_INDEX_FILE),
    ):
        if (folder / index).is_file():
            return "", index, _read_index(folder / index)
        if (folder / single_file).is_file():
            return single_file, "", {}
    raise FileNotFoundError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}, nor a"
        f" {TORCH_SINGLE_FILE} or its index."
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of tensor files ({error!r}).") from (
            error
        )


def _read_header(path: Path, expected: list[str]) -> dict[str, TensorPlace]:
    """Read where the tensors of a safetensors file lie."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        length_bytes = file.read(8)
        length = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else 0
        is_cut = len(length_bytes) < 8 or 8 + length > num_bytes
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file: its header is wrong.")
        header = b"" if is_cut else file.read(length)
    if is_cut:
        raise ValueError(
            f"{path} is not a whole safetensors file: it ends within its header, so"
            f" {_of_which(expected)} can be read. It was probably cut off while it was"
            " written: download or copy it again."
        )
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        places = {}
        for name, entry in entries.items():
            start, stop = map(int, entry["data_offsets"])
            shape = tuple(map(int, entry["shape"]))
            places[name] = str(entry["dtype"]), shape, start, stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a safetensors file: its header is wrong ({error!r})."
        ) from error
    for name, (dtype, shape, start, stop) in places.items():
        _check_entry(path, name, dtype, shape, (start, stop))
        if 8 + length + stop > num_bytes:
            raise ValueError(
                f"{path} is not a whole safetensors file: the tensor {name!r} ends at"
                f" byte {8 + length + stop}, and the file at {num_bytes}. It was"
                " probably cut off while it was written: download or copy it again."
            )
    return {
        name: TensorPlace(path, 8 + length + start, shape, dtype)
        for name, (dtype, shape, start, _) in places.items()
    }


def _check_entry(
    path: Path, name: str, dtype: str, shape: tuple[int, ...], span: tuple[int, int]
) -> None:
    """Compare what the header says about one tensor."""
    start, stop = span
    bits = _BITS.get(dtype)
    needed = stop - start if bits is None else bits * math.prod(shape) // 8
    if not 0 <= start <= stop or min(shape, default=0) < 0 or needed != stop - start:
        raise ValueError(
            f"{path}: the header gives the tensor {name!r} of type {dtype} and shape"
            f" {shape} the bytes {start} to {stop}. The file is broken: download or"
            " copy it again."
        )


def _of_which(names: list[str]) -> str:
    return f"none of its tensors ({names[0]!r}{_and_more(names)})" if names else "none"


def _and_more(names: list[str]) -> str:
    """Return " (and 3 more)" for a list of four, nothing for one."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
