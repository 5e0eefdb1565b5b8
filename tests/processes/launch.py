"""Runs one function in several processes, each with virtual CPU devices of its own.

    results = launch(work.count_rows, 8, num_processes=2, num_devices=4)

The function is named by its module, takes and returns what JSON holds, and finds
`jax.distributed` started. What a failed process printed is in the error.
"""

import importlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


class ProcessError(AssertionError):
    """A process failed, or took too long."""


def launch(
    function: Callable[..., Any],
    *arguments: Any,
    num_processes: int,
    num_devices: int = 2,
    timeout_seconds: float = 240,
    may_fail: bool = False,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Return what the function returned in each process.

    Args:
        function: of a module that can be imported in a fresh process.
        arguments: for the function, in every process.
        num_processes: of the run.
        num_devices: virtual CPU devices of each.
        timeout_seconds: for all of them together.
        may_fail: if so, a failed process gives its exit status and what it printed,
            as `(status, text)`, instead of an error here.
        environment: more of it.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        places = [pathlib.Path(folder, str(n)) for n in range(num_processes)]
        children = [
            _child(
                [function.__module__, function.__qualname__, json.dumps(arguments)],
                place,
                {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(num_processes),
                    "JAX_PROCESS_ID": str(index),
                    "XLA_FLAGS": _flags(num_devices),
                    **(environment or {}),
                },
            )
            for index, place in enumerate(places)
        ]
        statuses = _wait(children, timeout_seconds, may_fail)
        texts = [place.with_suffix(".log").read_text() for place in places]
        if any(statuses) and not may_fail:
            shown = [
                f"--- process {index} ended with {status}\n{_ours(text)}"
                for index, (status, text) in enumerate(
                    zip(statuses, texts, strict=True)
                )
            ]
            raise ProcessError("\n".join(shown))
        return [
            (status, text) if status else json.loads(place.read_text())
            for status, text, place in zip(statuses, texts, places, strict=True)
        ]


def _child(
    work: Sequence[str], place: pathlib.Path, environment: Mapping[str, str]
) -> subprocess.Popen:
    # To a file: a pipe that nobody reads would stop the process when it is full.
    with place.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.processes.launch", str(place), *work],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _flags(num_devices: int) -> str:
    """The flags of these tests, with another number of devices."""
    count = "--xla_force_host_platform_device_count"
    kept = re.sub(rf"{count}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return f"{kept} {count}={num_devices}".strip()


def _wait(
    children: Sequence[subprocess.Popen], timeout_seconds: float, may_fail: bool
) -> list[int]:
    """Wait for all; when one fails, the others get a little time to see it."""
    deadline = time.monotonic() + timeout_seconds
    try:
        while any(child.poll() is None for child in children):
            if not may_fail and any(child.poll() for child in children):
                deadline = min(deadline, time.monotonic() + 10)
                may_fail = True
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
    return [child.returncode for child in children]


def _ours(text: str, num_lines: int = 60) -> str:
    """The end of what a process printed, without the chatter of gloo."""
    lines = [line for line in text.splitlines() if "[Gloo]" not in line]
    return "\n".join(lines[-num_lines:])


def _main() -> None:
    place, module, name, arguments = sys.argv[1:]

    from realjax.runtime import cluster

    cluster.start()
    with cluster.telling_failures():
        function = getattr(importlib.import_module(module), name)
        result = function(*json.loads(arguments))
    pathlib.Path(place).write_text(json.dumps(result))


if __name__ == "__main__":
    _main()
