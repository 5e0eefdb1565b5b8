"""Folders that several processes see, on file systems that take their time."""

import pathlib
import time

import jax

SHARED_SECONDS = 30.0
"""How long what one process has made may take to show in the others."""


def wait_to_see(path: pathlib.Path) -> None:
    """Wait until a path that another process has made shows in this one.

    Raises:
        FileNotFoundError: it does not.
    """
    deadline = time.monotonic() + SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"Process {jax.process_index()} does not see {path}, which another"
                " process has made. Use a folder that all processes share."
            )
        time.sleep(0.05)
