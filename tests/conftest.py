"""What every test stands on: eight virtual devices, strict arithmetic, fixed seeds.

The environment is set here, before anything imports jax; programs that a test starts
inherit it. While the tests run, every function of ours checks its annotations.
"""

import gc
import os
import pathlib
import random
import sys
from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest

NUM_DEVICES = 8

_XLA_FLAGS = (
    f"--xla_force_host_platform_device_count={NUM_DEVICES}",
    # Eight devices share few cores: a late one is not a deadlock.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    # Tests compile much and run little: half the time to compile, the same program.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)

_USER_CACHE = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"

_ENVIRONMENT = {
    # Broadcasting over a missing dimension hides mistakes: [B] + [B, T] is an error.
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # Compiled programs are kept between test runs: minutes become seconds.
    "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(_USER_CACHE) / "realjax" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # A profile of this machine would change which plans are found.
    "REALJAX_PROFILES": str(pathlib.Path(_USER_CACHE) / "realjax" / "none"),
    # Threads of a collective wait for each other: there are more than devices.
    "NPROC": str(4 * NUM_DEVICES),
    # Figures go to files.
    "MPLBACKEND": "agg",
    # Tests use what is in the repository; a name of the hub is an error at once.
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def _wants_accelerator() -> bool:
    """Tests marked gpu keep the device of the machine: `make test-gpu` asks for it."""
    return os.environ.get("REALJAX_TEST_DEVICE") == "gpu"


def _set_environment() -> None:
    if "jax" in sys.modules:
        raise RuntimeError(
            "jax was imported before tests/conftest.py could ask for"
            f" {NUM_DEVICES} virtual devices. Start the tests with `make test`, or"
            " with pytest in a process that has not imported jax."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not _wants_accelerator():
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = (os.environ.get("XLA_FLAGS", ""), *_XLA_FLAGS)
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()


_set_environment()

# Shapes and types in signatures are checked at each call, with an int where a float is
# asked for, as everywhere in Python.
jaxtyping.install_import_hook(
    ["realjax", "pallas_kernels"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that need an accelerator where none was asked for."""
    if _wants_accelerator():
        return
    skip = pytest.mark.skip(reason="needs an accelerator: `make test-gpu`")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


_MOST_MAPS = 24_000


@pytest.fixture(autouse=True, scope="module")
def compiled_programs() -> Iterator[None]:
    """Drops compiled programs before a process has as many as the kernel lets it map.

    Each takes some mappings of memory, of which Linux gives a process 65530; to load
    one beyond them ends the process.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Gives each test the same global random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
