"""What the commands share: config flags, where configs are found, clean errors."""

import os
import pathlib
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from realjax.runtime.checkpoint import CheckpointError
from realjax.runtime.recipe import find_config
from realjax.runtime.trainer import NonFiniteError

USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    CheckpointError,
    NonFiniteError,
)
"""Raised with a message for the person who typed the command; shown without trace."""


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless the environment says where."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(home / "realjax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def use_cpu_devices(count: int) -> None:
    """Splits the CPU into virtual devices, where that was not settled before."""
    if count and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def run(main: Callable[[], None]) -> None:
    """Parses flags and runs a command; user errors become one message and status 2."""
    try:
        sys.argv = [_with_found_config(argument) for argument in sys.argv]
        app.run(lambda _: _guarded(main), flags_parser=_parse)
    except FileNotFoundError as error:
        _fail(error)


def define_config() -> flags.FlagHolder:
    """The flag `--config`, a file whose fields are flags too."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, as in configs/ppo.py or configs/ppo.py:debug."
    )


def _with_found_config(argument: str) -> str:
    for prefix in ("--config=", "-config="):
        if argument.startswith(prefix):
            path, colon, variant = argument.removeprefix(prefix).partition(":")
            return f"{prefix}{find_config(path)}{colon}{variant}"
    return argument


def _parse(arguments: list[str]) -> list[str]:
    """Parses flags; a misspelt config field is answered with the nearest one."""
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        _fail(error)
    except (AttributeError, KeyError) as error:
        _fail(f"A flag names no field of the config: {error}")
    except (ValueError, TypeError) as error:
        _fail(error)
    raise AssertionError("unreachable")


def _guarded(main: Callable[[], None]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file.
    try:
        main()
    except USER_ERRORS as error:
        if os.environ.get("REALJAX_TRACEBACK"):
            raise
        _fail(error)


def _fail(error: object) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
