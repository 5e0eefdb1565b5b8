"""Nothing happens on import: no device is touched, no setting of jax is changed."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]

IMPORT_ALL = """
import importlib, sys
import jax
before = dict(jax.config.values)
for name in sys.argv[1:]:
    importlib.import_module(name)
from jax._src import xla_bridge
changed = {k: v for k, v in jax.config.values.items() if before.get(k, v) != v}
print("changed", changed)
print("devices", xla_bridge.backends_are_initialized())
"""


def module_names() -> list[str]:
    """Every module of both packages; commands, which define flags, left out."""
    names = []
    for package in ("realjax", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[1] not in ("cli", "bench") and parts[-1] != "__main__":
                names.append(".".join(parts).removesuffix(".__init__"))
    return names


def test_importing_every_module_does_nothing():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *module_names()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["changed {}", "devices False"]
