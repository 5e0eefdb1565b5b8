"""PyTorch's .bin files without PyTorch: where their tensors lie, and nothing executed.

Such a file is a zip archive, its members stored as they are:

    NAME/data.pkl     a pickled dictionary; tensors refer to storages by their keys
    NAME/data/KEY     the bytes of a storage

A pickle is a program that may call any function it names. The reader here knows a
handful of names, gives each a stand-in of its own that only notes its arguments, and
refuses all others; no name of a file is ever imported.
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from realjax.models.byte_ranges import TensorPlace, row_major

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_DTYPES = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_MAX_PICKLE_BYTES = 100 * 2**20
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # Signature, lengths of name and extra field.
# What zipfile raises for broken archives, and for encrypted and unknown members.
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, struct.error, RuntimeError, ValueError),
    *(EOFError, OSError),
)
# All that reading a broken or hostile pickle was seen to raise.
_PICKLE_ERRORS = (
    *(pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError),
    *(ValueError, MemoryError, RecursionError, OverflowError, AssertionError),
    *(struct.error,),
)


class _Storage(NamedTuple):
    """A storage, as a tensor refers to it."""

    key: str
    dtype: str
    num_elements: int


class _Tensor(NamedTuple):
    """A tensor, as the pickle describes it; offset and strides count elements."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_places(path: Path, expected: list[str]) -> dict[str, TensorPlace]:
    """Read where the tensors of a file lie.

    Args:
        path: of a file that `torch.save` wrote, of a dictionary of tensors.
        expected: names it should hold, for the message about a file that was cut off.

    Raises:
        ValueError: if the file is not whole, of the format before PyTorch 1.6, holds
            anything but tensors, or names something that it has no business to name.
    """
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
        except _ZIP_ERRORS as error:
            raise ValueError(_what_is_wrong(path, expected)) from error
        with archive:
            return _places(path, archive, file)


def _places(
    path: Path, archive: zipfile.ZipFile, file: BinaryIO
) -> dict[str, TensorPlace]:
    members = {member.filename: member for member in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(
            f"{path} is a zip archive, but not one of torch.save: it has"
            f" {len(pickles)} members data.pkl."
        )
    folder = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order is not None and _content(path, archive, order) != b"little":
        raise ValueError(f"{path} was written on a big-endian machine: convert it.")
    pickled = members[pickles[0]]
    if pickled.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path} is compressed. Save it anew with torch.save.")
    if pickled.file_size > _MAX_PICKLE_BYTES:
        raise ValueError(f"{path}: its data.pkl is too large to be one of tensors.")
    tensors = _read_pickle(path, _content(path, archive, pickled))
    return {
        name: _place(path, name, tensor, folder, members, file)
        for name, tensor in tensors.items()
    }


def _content(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(member)
    except _ZIP_ERRORS as error:
        raise ValueError(
            f"{path}: its member {member.filename} cannot be read ({error}). The file"
            " is broken: download or copy it again."
        ) from error


def _place(
    path: Path,
    name: str,
    tensor: _Tensor,
    folder: str,
    members: dict[str, zipfile.ZipInfo],
    file: BinaryIO,
) -> TensorPlace:
    """Find a tensor's bytes in the file, and check that they are there."""
    member = members.get(f"{folder}data/{tensor.storage.key}")
    if member is None or member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"{path}: the storage of the tensor {name!r} is"
            f" {'missing' if member is None else 'compressed'}. Save the file anew with"
            " torch.save."
        )
    file.seek(max(member.header_offset, 0))
    header = file.read(_LOCAL_HEADER.size)
    signature, *lengths = (
        _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else (b"",)
    )
    start = member.header_offset + _LOCAL_HEADER.size + sum(lengths)
    itemsize = _BYTES[tensor.dtype]
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    past = tensor.offset + extent + 1 if math.prod(tensor.shape) else 0
    is_inside = past * itemsize <= member.file_size
    is_whole = signature == b"PK\x03\x04" and (
        start + member.file_size <= path.stat().st_size
    )
    if not is_inside or not is_whole:
        raise ValueError(
            f"{path}: the tensor {name!r} of shape {tensor.shape} ends behind its"
            f" storage of {member.file_size} bytes. The file is broken: download or"
            " copy it again."
        )
    is_row_major = tensor.strides == row_major(tensor.shape)
    return TensorPlace(
        path,
        start + tensor.offset * itemsize,
        tensor.shape,
        tensor.dtype,
        None if is_row_major else tensor.strides,
    )


def _what_is_wrong(path: Path, expected: list[str]) -> str:
    """Say why a file is no zip archive; what is cut off, if that can be known."""
    with path.open("rb") as file:
        begin = file.read(len(_OLD_FORMAT))
    if begin == _OLD_FORMAT:
        return (
            f"{path} is of the format before PyTorch 1.6, which is not read here."
            " Convert it with PyTorch: torch.save(torch.load(PATH,"
            " weights_only=True), PATH)."
        )
    if not begin.startswith(b"PK\x03\x04"):
        return f"{path} is not a file of torch.save: it is no zip archive."
    lost = _first_lost(path) or (expected[0] if expected else "")
    what = f" the tensor {lost!r} and what follows cannot be read." if lost else ""
    return (
        f"{path} is not a whole file of torch.save:{what} It was probably cut off while"
        " it was written: download or copy it again."
    )


def _first_lost(path: Path) -> str:
    """Name the first tensor that cannot be whole in a file without its directory.

    The pickle comes first in the file, and the storages follow in the order of their
    numbers, so the sizes of the storages add up to more than the file from there on.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_LOCAL_HEADER.size)
            _, *lengths = _LOCAL_HEADER.unpack(header)
            file.seek(sum(lengths), 1)
            # The pickle says itself where it ends.
            tensors = _read_pickle(path, file.read(_MAX_PICKLE_BYTES))
    except (ValueError, struct.error):
        return ""
    left, seen = path.stat().st_size, set()
    for name, tensor in tensors.items():
        if tensor.storage.key not in seen:
            seen.add(tensor.storage.key)
            left -= tensor.storage.num_elements * _BYTES[tensor.storage.dtype]
        if left < 0:
            return name
    return next(iter(tensors), "")


def _read_pickle(path: Path, pickled: bytes) -> dict[str, _Tensor]:
    """Read the dictionary of tensors.

    Raises:
        ValueError: if there is anything else in it.
    """
    try:
        found = _Reader(io.BytesIO(pickled)).load()
    except _PICKLE_ERRORS as error:
        raise ValueError(f"{path}: its data.pkl is not read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a {type(found).__name__}, and not a dictionary of tensors."
        )
    for name, value in found.items():
        if type(name) is not str or not isinstance(value, _Tensor):
            raise ValueError(
                f"{path}: its entry {name!r} is a {type(value).__name__}, and not a"
                " tensor. Save the state_dict of a model alone."
            )
    return found


class _Reader(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Unpickles tensors to what they say about themselves.

    This is the unpickler written in Python: the other makes room in memory for as many
    objects as a few bytes of a broken pickle say there are.
    """

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        # Made for each file: a pickle can set attributes of what it names, and such a
        # change must not outlive it.
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): type("OrderedDict", (dict,), {}),
            ("torch._utils", "_rebuild_tensor_v2"): _stand_in(_rebuild_tensor),
            ("torch._utils", "_rebuild_tensor_v3"): _stand_in(_rebuild_typed),
            ("torch._utils", "_rebuild_parameter"): _stand_in(_rebuild_parameter),
            ("torch.storage", "UntypedStorage"): "U8",
            **{("torch", name): dtype for name, dtype in _STORAGES.items()},
            **{("torch", name): dtype for name, dtype in _DTYPES.items()},
        }

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return the stand-in for a name of the pickle; imports nothing."""
        known = self._known.get((module_name, global_name))
        if known is None:
            raise pickle.UnpicklingError(
                f"it names {module_name}.{global_name}, which a checkpoint of tensors"
                " does not need. It may be an attack, or more than a state_dict: do"
                " not load it with PyTorch either unless you trust where it is from."
            )
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        """Return what a reference to a storage says."""
        kind, dtype, key, _, num_elements = pid
        is_known = kind == "storage" and type(dtype) is str and dtype in _BYTES
        if not is_known or type(key) is not str:
            raise pickle.UnpicklingError("it refers to a storage in an unknown way.")
        return _Storage(key, dtype, _natural(num_elements))


def _stand_in(function: Callable) -> Callable:
    """Return a new function that does the same."""
    return lambda *arguments: function(*arguments)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("it has a tensor without a storage.")
    sizes, steps = tuple(map(_natural, shape)), tuple(map(_natural, strides))
    if len(sizes) != len(steps):
        raise pickle.UnpicklingError("it has a tensor with too few strides.")
    return _Tensor(storage, storage.dtype, _natural(offset), sizes, steps)


def _rebuild_typed(
    storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any
) -> _Tensor:
    """Rebuild a tensor whose type stands behind the others' arguments."""
    dtype = rest[2]
    if type(dtype) is not str or dtype not in _BYTES:
        raise pickle.UnpicklingError("it has a tensor of an unknown type.")
    tensor = _rebuild_tensor(storage, offset, shape, strides)
    return tensor._replace(dtype=dtype)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _natural(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise pickle.UnpicklingError(f"it has {number!r} where a size should be.")
    return number
