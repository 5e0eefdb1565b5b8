"""Size and checksum of every file of a folder, to tell later whether it is whole.

A folder that was renamed to its name after its last file was complete then. Disks fill,
copies break off and programs delete half a folder afterwards; readers of the files
notice some of that, and a changed byte of an array not at all.
"""

import json
import pathlib
import zlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

FILE = "files.json"

_BLOCK_BYTES = 1 << 22


type Listed = dict[str, list[int]]
"""Bytes and crc32 of files, by their paths in a folder."""


def write(
    folder: pathlib.Path,
    *,
    leave_out: Collection[str] = (),
    known: Mapping[str, list[int]] | None = None,
) -> None:
    """Lists the files of a folder in its `files.json`: {path: [bytes, crc32]}.

    Args:
        folder: complete but for what is left out.
        leave_out: paths in it that may still change.
        known: what `describe` said of some of them, which are not read again.
    """
    listed = describe(folder, folder, leave_out={FILE, *leave_out, *(known or {})})
    listed |= known or {}
    listed = {name: listed[name] for name in sorted(listed, key=pathlib.PurePath)}
    (folder / FILE).write_text(json.dumps(listed, indent=1), encoding="utf-8")


def describe(
    folder: pathlib.Path, part: pathlib.Path, *, leave_out: Collection[str] = ()
) -> Listed:
    """Reads the files of a part of a folder; none if there is no such part.

    Args:
        folder: that names are relative to.
        part: a folder in it, or itself.
        leave_out: names to pass over.
    """
    paths = (path for path in sorted(part.rglob("*")) if path.is_file())
    names = [str(path.relative_to(folder)) for path in paths]
    names = [name for name in names if name not in leave_out]
    with ThreadPoolExecutor() as pool:
        checksums = list(pool.map(lambda name: _crc32(folder / name), names))
    return {
        name: [(folder / name).stat().st_size, checksum]
        for name, checksum in zip(names, checksums, strict=True)
    }


def find_damage(
    folder: pathlib.Path, *, checksums: bool = True, share: tuple[int, int] = (0, 1)
) -> str | None:
    """What differs from the list, naming the file; None if nothing does.

    Args:
        folder: has a `files.json`; one without is damaged.
        checksums: reads every file; otherwise only the sizes count.
        share: which of how many readers this is; each reads some of the files.
    """
    path = folder / FILE
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        for name, (size, _) in listed.items():
            path = folder / name
            found = path.stat().st_size
            if found != size:
                return f"{path} is damaged: it has {found} bytes instead of {size}."
        if not checksums:
            return None
        path = folder
        number, num_readers = share
        names = list(listed)[number::num_readers]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda name: _crc32(folder / name), names))
    except FileNotFoundError:
        return f"{path} is missing."
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{path} is damaged: {error}."
    for name, now in zip(names, found, strict=True):
        if now != listed[name][1]:
            return f"{folder / name} is damaged: its bytes are not those written."
    return None


def _crc32(path: pathlib.Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum
