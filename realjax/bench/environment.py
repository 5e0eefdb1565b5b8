"""Where a figure was measured: device, processor, versions, commit; and memory."""

import pathlib
import platform
import re
import subprocess
from typing import Any

import jax


def describe() -> dict[str, Any]:
    """What has to stand beside a measured figure."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": len(jax.devices()),
        "processor": _processor(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    folder = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def memory_bytes(field: str) -> int:
    """A figure of this process's memory, by its name in /proc/self/status."""
    return 1024 * _figure("status", field)


def bytes_read() -> int:
    """Bytes that this process has read from files so far, cached or not."""
    return _figure("io", "rchar")


def _figure(file: str, field: str) -> int:
    text = pathlib.Path("/proc/self", file).read_text()
    found = re.search(rf"{field}:\s+(\d+)", text)
    assert found, f"This system does not tell {field}; the bench needs Linux."
    return int(found[1])
