"""A worker process of `score.py`: imports functions, then calls them on request.

    parent ── (function, prompts, completions, columns) ─▶ worker
           ◀─ ("scores", [...]), ("error", text) or ("memory", text) ─

The parent starts this file by its path, so that nothing of the package is imported,
JAX least of all, unless a function asks for it. Only the standard library is used.
"""

import asyncio
import contextlib
import difflib
import importlib
import importlib.util
import inspect
import io
import multiprocessing.connection as connections
import numbers
import os
import pathlib
import pickle
import resource
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Target(NamedTuple):
    """How a worker finds a function.

    Attributes:
        name: of the reward function, for errors.
        text: "package.module:function" or "file.py:function"; empty if pickled.
        pickled: the callable, by reference.
        main: module or file that is `__main__` in the parent.
        options: arguments by name.
        memory_bytes: that a call may take; 0 is no limit.
    """

    name: str
    text: str = ""
    pickled: bytes = b""
    main: str = ""
    options: Mapping[str, Any] | None = None
    memory_bytes: int = 0


class LoadError(Exception):
    """A function cannot be had; the text says why."""


def load(target: Target) -> Callable[..., Any]:
    """Imports a function.

    Raises:
        LoadError: naming what cannot be imported or is not there.
    """
    place, _, attribute = target.text.rpartition(":")
    try:
        if target.pickled:
            found = _Unpickler(io.BytesIO(target.pickled), target.main).load()
        else:
            found = _attribute(_module(place), attribute)
    except LoadError as error:
        raise LoadError(f"Reward function {target.name!r}: {error}") from error
    except BaseException as error:  # Whatever an import runs into, exit() included.
        raise LoadError(
            f"Reward function {target.name!r} cannot be imported"
            f"{f' from {place!r}' if place else ''}: {error!r}\n"
            + "".join(traceback.format_exception(error)).rstrip()
        ) from error
    if not callable(found):
        raise LoadError(
            f"Reward function {target.name!r} is {found!r}, not a function."
        )
    _check_options(found, target)
    return found


def _check_options(fn: Callable[..., Any], target: Target) -> None:
    """Refuses options that `**columns` would swallow."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # A builtin.
        return
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [one.name for one in parameters if one.kind in named][2:]
    for name in target.options or ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise LoadError(
                f"Reward function {target.name!r} has no argument {name!r}, which its"
                f" `options` give. It has {', '.join(known) or 'none but two'}."
                + (f" Did you mean {close[0]!r}?" if close else "")
            )


class _Unpickler(pickle.Unpickler):
    """Finds what stands in the parent's script in the script's file."""

    def __init__(self, file: io.BytesIO, main: str):
        super().__init__(file)
        self._main = main

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "__main__":
            return _attribute(_module(self._main), global_name)
        return super().find_class(module_name, global_name)


def _module(place: str) -> types.ModuleType:
    """A module by its name, or by the path of its file."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = pathlib.Path(place)
    if not path.exists():
        raise LoadError(f"There is no file {path}.")
    name = f"_reward_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # For what it imports from beside it.
        spec.loader.exec_module(module)
    return sys.modules[name]


def _attribute(found: Any, path: str) -> Any:
    for part in path.split("."):
        if not hasattr(found, part):
            known = [name for name, value in vars(found).items() if callable(value)]
            close = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
            raise LoadError(
                f"{getattr(found, '__name__', found)!r} has no {part!r}."
                + (f" Did you mean {close[0]!r}?" if close else "")
            )
        found = getattr(found, part)
    return found


def answer(
    fn: Callable[..., Any],
    prompts: list[str],
    completions: list[str],
    columns: dict[str, list],
    *,
    options: Mapping[str, Any] | None = None,
    memory_bytes: int = 0,
) -> tuple[str, Any]:
    """Calls a function: ("scores", floats) or ("error", what it did).

    ("memory", what it did) if it ran out of memory: of what it keeps, nobody knows.
    """
    try:
        with _memory_limit(memory_bytes):
            arguments = _accepted(fn, columns) | dict(options or {})
            result = fn(prompts, completions, **arguments)
            if inspect.isawaitable(result):
                result = asyncio.run(_await(result))
    except MemoryError as error:
        limit = f"{memory_bytes / 2**30:g} GiB" if memory_bytes else "no limit"
        return "memory", f"ran out of memory ({limit} by memory_gib): {error!r}."
    except BaseException as error:
        # Without our own frame, which tells the user nothing.
        frames = error.__traceback__ and error.__traceback__.tb_next
        text = "".join(traceback.format_exception(type(error), error, frames))
        return "error", f"raised {error!r}:\n{text.rstrip()}"
    return _as_floats(result, len(completions))


@contextlib.contextmanager
def _memory_limit(num_bytes: int) -> Iterator[None]:
    """Lets allocations fail that go so far beyond what the process has.

    Counted is what a process may write to and need not share (RLIMIT_DATA), which
    leaves aside files that are mapped and room that is only reserved.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if not num_bytes:
        yield
        return
    limit = _data_bytes() + num_bytes
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int:
    """Of this process, as RLIMIT_DATA counts them."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0


async def _await(result: Any) -> Any:
    return await result


def _accepted(fn: Callable[..., Any], columns: dict[str, list]) -> dict[str, list]:
    """The columns that the signature of `fn` has room for."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):  # A builtin.
        return columns
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return columns
    return {name: values for name, values in columns.items() if name in parameters}


def _as_floats(result: Any, size: int) -> tuple[str, Any]:
    if hasattr(result, "tolist"):
        result = result.tolist()  # An array or tensor of any library.
    if not isinstance(result, list | tuple):
        return "error", (
            f"returned {_short(result)}, of type {type(result).__name__}; it must "
            "return a list with one number for each completion."
        )
    if len(result) != size:
        return "error", f"returned {len(result)} scores for {size} completions."
    scores = []
    for i, item in enumerate(result):
        if hasattr(item, "item") and getattr(item, "shape", None) == ():
            item = item.item()
        if not isinstance(item, numbers.Real):
            return "error", (
                f"returned {_short(item)}, of type {type(item).__name__}, as score "
                f"{i}; it must be a number."
            )
        scores.append(float(item))
    return "scores", scores


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _serve(pipe: connections.Connection) -> None:
    """Imports the functions, then answers requests until the pipe closes."""
    paths, targets = pipe.recv()
    sys.path[:] = paths
    try:
        targets = _targets(targets)
        functions = [load(target) for target in targets]
    except LoadError as error:
        pipe.send(("error", str(error)))
        return
    pipe.send(("ready", ""))
    while True:
        index, *request = pipe.recv()
        function, target = functions[index], targets[index]
        given = {"options": target.options, "memory_bytes": target.memory_bytes}
        pipe.send(answer(function, *request, **given))


def _targets(items: Sequence[tuple]) -> list[Target]:
    # They travel as tuples: this file is another module in the parent than here.
    return [Target(*item) for item in items]


def _end_with(alive: int) -> None:
    """Ends the process when the parent closed its end, or died."""
    os.read(alive, 1)
    _end()


def _end() -> None:
    """Ends the process and what functions have started, without waiting for it."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _main(pipe: int, alive: int) -> None:
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        _serve(connections.Connection(pipe))
    _end()


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
