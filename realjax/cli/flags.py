"""What the commands share: flags, fields of a config as flags, errors as one message.

    python -m realjax.cli.train --config=configs/ppo.py:debug --config.hp.kl.coef=0.2
                                  └ a file: its get_config("debug")  └ any field of it

A command is two functions: `declare` adds its flags to an empty set of them, `main`
gets their values. Exit status 2 stands for a message to the person who typed the
command, 130 for Ctrl-C; anything else that goes wrong is ours and shows a traceback.
"""

import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from realjax.core.config import suggest
from realjax.functions.score import RewardError
from realjax.runtime.checkpoint import CheckpointError
from realjax.runtime.cluster import ClusterError
from realjax.runtime.recipe import find_config, load_config
from realjax.runtime.trainer import NonFiniteError
from realjax.runtime.workdir import WorkdirError

Declare = Callable[[flags.FlagValues, list[str]], list[str]]
Main = Callable[[flags.FlagValues], int]

USER_ERRORS = (
    OSError,
    CheckpointError,
    ClusterError,
    NonFiniteError,
    RewardError,
    WorkdirError,
)
"""Of the world around: files, disks, data. Shown without a traceback."""

_HELP = ("-h", "-help", "--help", "-helpfull", "--helpfull")
_PACKAGE = str(pathlib.Path(__file__).parents[1])
_CONFIG_HELP = (
    "Config file, as in configs/ppo.py or configs/ppo.py:debug; one that is not here "
    "is looked for among those shipped. --config.a.b=value changes a field."
)
_FOOTER = "REALJAX_TRACEBACK=1 in the environment shows where an error came from."

_THREADS_PER_DEVICE = 4


def run(declare: Declare, main: Main, arguments: Sequence[str], *, about: str) -> int:
    """Parses flags and runs a command.

    Args:
        declare: adds flags; gets the arguments and returns those left to parse.
        main: does the work; returns the exit status.
        arguments: of the command line, without the program's name.
        about: shown by `--help`, above the flags.

    Returns:
        The exit status.
    """
    try:
        if any(argument in _HELP for argument in arguments):
            print(_help(declare, about))
            return 0
        return main(_parse(declare, list(arguments)))
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except BrokenPipeError:  # Of `… | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, *USER_ERRORS) as error:
        if os.environ.get("REALJAX_TRACEBACK") or not _is_for_the_user(error):
            raise
        return _fail(f"error: {error}", 2)


def declare_config(
    values: flags.FlagValues, arguments: list[str]
) -> tuple[list[str], str]:
    """Adds `--config`, and a flag for every field of it that the arguments name.

    Args:
        values: gets the flags.
        arguments: of the command line.

    Returns:
        The arguments without `--config`; the name of its file, or "".

    Raises:
        FileNotFoundError: there is no such config; names those shipped.
        ValueError: an argument names a field that the config does not have.
    """
    path, rest = _take_flag("config", arguments)
    if path is None:
        flags.DEFINE_string("config", None, _CONFIG_HELP, flag_values=values)
        return rest, ""
    config = load_config(path)
    _check_fields(config, rest)
    try:
        config_flags.DEFINE_config_dict(
            "config", config, _CONFIG_HELP, flag_values=values, sys_argv=rest
        )
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"A flag names no field of the config: {error}.") from error
    return rest, find_config(path.partition(":")[0]).stem


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
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if count and "host_platform_device_count" not in xla_flags:
        jax.config.update("jax_num_cpu_devices", count)
    if count:
        # A device's part of a collective holds a thread while it waits for the others,
        # and by default there are no more threads than devices: other work may leave
        # too few.
        os.environ.setdefault("NPROC", str(_THREADS_PER_DEVICE * count))
    if count and "collective_call" not in xla_flags:
        # They share few cores, perhaps with a compiler: a late one is not a deadlock.
        os.environ["XLA_FLAGS"] = (
            f"{xla_flags} --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
            " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        )


def _parse(declare: Declare, arguments: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    try:
        left = values(["", *declare(values, arguments)])[1:]
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        raise ValueError(
            f"There is no flag --{name}. {suggest(name, values)}"
        ) from None
    except flags.IllegalFlagValueError as error:
        raise ValueError(_wrong_value(values, str(error))) from None
    except flags.Error as error:
        raise ValueError(str(error)) from None
    if left:
        raise ValueError(f"{left[0]!r} is no flag. Write --name=value; see --help.")
    return values


def _wrong_value(values: flags.FlagValues, text: str) -> str:
    """The message of a flag whose value has another type."""
    match = re.fullmatch(r"flag --([^=]+)=(.*?): (.*)", text, re.DOTALL)
    if match is None:
        return text
    name, value, reason = match.groups()
    kind = values[name].flag_type() if name in values else ""
    return f"--{name}={value}: a value of type {kind} is needed ({reason})."


def _take_flag(name: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The last value of `--name=value` or `--name value`, and the other arguments."""
    value, rest, index = None, [], 0
    while index < len(arguments):
        argument = arguments[index]
        if re.match(f"--?{name}=", argument):
            value = argument.partition("=")[2]
        elif argument in (f"-{name}", f"--{name}"):
            index += 1
            if index == len(arguments):
                raise ValueError(f"--{name} has no value. Write --{name}=value.")
            value = arguments[index]
        else:
            rest.append(argument)
        index += 1
    return value, rest


def _check_fields(config: ConfigDict, arguments: list[str]) -> None:
    """Refuses `--config.a.b` where the config has no such field."""
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        node, path = config, "config"
        for name in match[1].split(".") if match else ():
            if "[" in name:  # An item of a tuple.
                break
            if not isinstance(node, ConfigDict):
                raise ValueError(f"{argument}: {path} is {node!r} and has no fields.")
            if name not in node:
                raise ValueError(
                    f"{argument}: {path} has no field {name!r}. {suggest(name, node)}"
                )
            node, path = node[name], f"{path}.{name}"


def _help(declare: Declare, about: str) -> str:
    values = flags.FlagValues()
    declare(values, [])
    lines = [about.strip(), "", "Flags:"]
    for name in values:
        flag = values[name]
        default = "" if flag.default in (None, "") else f" (default: {flag.default})"
        lines.append(f"  --{name}  {flag.help}{default}")
    return "\n".join([*lines, "", _FOOTER])


def _is_for_the_user(error: BaseException) -> bool:
    """Whether the error was raised by a check of ours, or tells of files."""
    if isinstance(error, USER_ERRORS):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return not frames or frames[-1].filename.startswith(_PACKAGE)


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
