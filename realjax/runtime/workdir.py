"""One run in one folder: `claim_workdir` keeps other runs and processes out.

A run of several processes has one folder, which all of them see, and one claim: process
0 makes it, and where it is refused, all of them are.
"""

import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Callable, Mapping
from typing import Any

import jax

from realjax.core.shared_folder import wait_to_see
from realjax.runtime.agreement import Agreement

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
    has_begun: Callable[[], bool] = lambda: True,
) -> Claim:
    """Makes a folder the folder of one run, and of one live process or run of several.

    The first claim writes the fingerprint to `run.json`; later ones must have the same.
    The lock is the operating system's, so a killed process leaves none behind. All
    processes of a run call this.

    Args:
        workdir: made if needed.
        fingerprint: what two runs that share a folder must share, as JSON can hold it.
        has_begun: whether the run that claimed the folder earlier left what another
            must not be mixed with; asked once the folder is locked. One that failed
            before that may be mended and begun anew.

    Raises:
        WorkdirError: another process has the folder, it holds another run, it cannot
            be written, or the processes of this run have different fingerprints.
        NotADirectoryError: there is a file of that name.
        FileNotFoundError: this process does not see what process 0 has made.
    """
    if jax.process_count() > 1:
        return _claim_together(workdir, fingerprint, has_begun)
    return _claim(workdir, fingerprint, has_begun)


def _claim(
    workdir: str | os.PathLike[str],
    fingerprint: Mapping[str, Any],
    has_begun: Callable[[], bool],
) -> Claim:
    workdir = make_workdir(workdir)
    claim = Claim(workdir, _lock(workdir / _LOCK))
    try:
        if has_begun():
            _check_same(workdir / _RUN, json.loads(json.dumps(fingerprint)))
        _write(workdir / _RUN, fingerprint)
    except BaseException:
        claim.close()
        raise
    return claim


def _claim_together(
    workdir: str | os.PathLike[str],
    fingerprint: Mapping[str, Any],
    has_begun: Callable[[], bool],
) -> Claim:
    """Process 0 claims, the others learn of it; they must be of one run."""
    agreement = Agreement("work folder", errors=(WorkdirError,))
    first, *others = agreement.gather(lambda: json.loads(json.dumps(fingerprint)))
    for process, other in enumerate(others, start=1):
        if differences := _differences(first, other):
            raise WorkdirError(
                f"Process {process} was started with another config than process 0:"
                f"{_listed(differences)}\nStart all processes with the same."
            )
    claims: list[Claim] = []
    agreement.decide(lambda: claims.append(_claim(workdir, fingerprint, has_begun)))
    claim = claims[0] if claims else Claim(_folder(workdir), None)
    try:
        agreement.together(lambda: wait_to_see(claim.workdir / _RUN))
    except BaseException:
        claim.close()
        raise
    return claim


def make_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Makes the folder, if needed, and returns its absolute path.

    Raises:
        WorkdirError: it cannot be made.
        NotADirectoryError: there is a file of that name, or on the way to it.
    """
    workdir = _folder(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(workdir, error) from error
    return workdir


def _folder(workdir: str | os.PathLike[str]) -> pathlib.Path:
    workdir = pathlib.Path(workdir).absolute()
    for folder in (workdir, *workdir.parents):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; a run needs a folder.")
    return workdir


def _not_writable(workdir: pathlib.Path, error: OSError) -> WorkdirError:
    return WorkdirError(
        f"{workdir} cannot be written ({error.strerror}). Use another work folder."
    )


def _lock(path: pathlib.Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _not_writable(path.parent, error) from error
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


def _write(path: pathlib.Path, fingerprint: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _check_same(path: pathlib.Path, here: dict[str, Any]) -> None:
    if not path.exists():
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
        raise WorkdirError(
            f"{path.parent} holds another run:{_listed(differences)}"
            "\nUse another work folder, or the earlier config to go on with that run."
        )


def _listed(differences: list[str]) -> str:
    shown = "".join(f"\n  {line}" for line in differences[:_NUM_SHOWN])
    more = len(differences) - _NUM_SHOWN
    return shown + (f"\n  and {more} more." if more > 0 else "")


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
