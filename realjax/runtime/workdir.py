"""One run in one folder: `claim_workdir` keeps other runs and processes out."""

import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Mapping
from typing import Any

_RUN = "run.json"
_LOCK = "run.lock"
_NUM_SHOWN = 5


class WorkdirError(RuntimeError):
    """The folder belongs to another run, or to another process."""


class Claim:
    """A claimed folder; the lock ends with `close`, or with the process."""

    def __init__(self, workdir: pathlib.Path, lock: int | None):
        self.workdir = workdir
        self._lock = lock

    def close(self) -> None:
        """Gives the folder back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def claim_workdir(
    workdir: str | os.PathLike[str],
    fingerprint: Mapping[str, Any],
    *,
    is_writer: bool = True,
) -> Claim:
    """Makes a folder the folder of one run, and of one live process.

    The first claim writes the fingerprint to `run.json`; later ones must have the same.
    The lock is the operating system's, so a killed process leaves none behind.

    Args:
        workdir: made if needed.
        fingerprint: what two runs that share a folder must share, as JSON can hold it.
        is_writer: False for the processes of a run that only follow the first.

    Raises:
        WorkdirError: another process has the folder, or it holds another run.
        NotADirectoryError: there is a file of that name.
    """
    workdir = pathlib.Path(workdir).absolute()
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"{workdir} is a file; a run needs a folder.")
    if not is_writer:
        return Claim(workdir, None)
    workdir.mkdir(parents=True, exist_ok=True)
    claim = Claim(workdir, _lock(workdir / _LOCK))
    try:
        _check_fingerprint(workdir / _RUN, json.loads(json.dumps(fingerprint)))
    except BaseException:
        claim.close()
        raise
    return claim


def _lock(path: pathlib.Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise WorkdirError(
            f"{path.parent} is in use by {owner or 'another process'}. Wait for it to "
            "end, stop it, or use another work folder."
        ) from None
    os.ftruncate(descriptor, 0)
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    os.pwrite(descriptor, owner.encode(), 0)
    return descriptor


def _check_fingerprint(path: pathlib.Path, here: dict[str, Any]) -> None:
    if not path.exists():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkdirError(
            f"{path} is not JSON ({error}), so it cannot be told which run this folder "
            "holds. Use another work folder."
        ) from error
    differences = _differences(there, here)
    if differences:
        shown = "".join(f"\n  {line}" for line in differences[:_NUM_SHOWN])
        more = len(differences) - _NUM_SHOWN
        raise WorkdirError(
            f"{path.parent} holds another run:{shown}"
            + (f"\n  and {more} more." if more > 0 else "")
            + "\nUse another work folder, or the earlier config to go on with that run."
        )


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Lines such as "hp.kl_coef was 0.1 and is 0.2 now"."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        return [
            line
            for key in keys
            for line in _differences(
                there.get(key), here.get(key), f"{name}.{key}" if name else key
            )
        ]
    if there == here:
        return []
    return [f"{name} was {json.dumps(there)} and is {json.dumps(here)} now"]
