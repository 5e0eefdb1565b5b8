"""The process in which a generated program meets its tests; see `programs`.

Started by its path, in an empty folder, with the request on its standard input and the
number of a file for its answers as its argument. Only the standard library is used, and
nothing of the package.
"""

import builtins
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

_NOBODY = 65534

_REFUSED_EVENTS = (
    *("socket.", "subprocess.", "ctypes.", "pty.", "ftplib.", "http.", "imaplib."),
    *("poplib.", "smtplib.", "telnetlib.", "urllib.", "webbrowser.", "syslog."),
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.startfile"),
    *("os.kill", "os.setuid", "os.chroot", "os.mount", "os.unshare", "os.setns"),
    *("resource.setrlimit", "resource.prlimit", "signal.pthread_kill", "fcntl."),
    *("_thread.start", "mmap.", "sys.remote_exec", "sys._debugmallocstats", "gc.get"),
)
"""Beginnings of the names of audit events of what a program may not do."""

_REFUSED_MODULES = ("ctypes", "_ctypes", "_posixsubprocess", "_testcapi", "cffi")

# Audit events about files, and which of their arguments are paths that are changed.
_WRITES = {
    **{"os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.truncate": (0,)},
    **{"os.rename": (0, 1), "os.link": (0, 1), "os.symlink": (1,), "os.utime": (0,)},
    **{"os.chmod": (0,), "os.chown": (0,), "os.chflags": (0,), "os.setxattr": (0,)},
    **{"os.removexattr": (0,), "shutil.rmtree": (0,), "shutil.move": (0, 1)},
    **{"tempfile.mkdtemp": (0,), "tempfile.mkstemp": (0,)},
}


_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(PermissionError):
    """A program tried what it may not do."""


def _guard(folder: str) -> Callable[[str, tuple], None]:
    """The audit hook: refuses calls by the names of their events."""
    inside = folder.rstrip(os.sep) + os.sep
    realpath, fspath, decode = os.path.realpath, os.fspath, os.fsdecode

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):
            return True  # Open already, and then by whoever was allowed to.
        try:
            return (realpath(decode(fspath(path))) + os.sep).startswith(inside)
        except (TypeError, ValueError):
            return False

    def refuse(what: str) -> None:
        raise Refused(f"{what} is not allowed to a program that is tested.")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = (*arguments, None, None, None)[:3]
            is_written = isinstance(mode, str) and bool(set(mode) & set("wax+"))
            has_flag = isinstance(flags, int) and bool(flags & _WRITING_FLAGS)
            if (is_written or has_flag) and not is_inside(path):
                refuse(f"writing {path!r}")
        elif event in _WRITES:
            for index in _WRITES[event]:
                if index < len(arguments) and not is_inside(arguments[index]):
                    refuse(f"{event} of {arguments[index]!r}")
        elif event == "import":
            if str(arguments[0]).partition(".")[0] in _REFUSED_MODULES:
                refuse(f"importing {arguments[0]}")
        elif event.startswith(_REFUSED_EVENTS):
            refuse(event)

    return hook


def _limit(limits: dict[str, Any]) -> None:
    """Limits of the kernel on what is done from here on."""

    def at_most(what: int, number: int) -> None:
        _, hard = resource.getrlimit(what)
        if hard != resource.RLIM_INFINITY:
            number = min(number, hard)
        resource.setrlimit(what, (number, number))

    at_most(resource.RLIMIT_CPU, int(limits["cpu_seconds"]) + 1)
    at_most(resource.RLIMIT_FSIZE, int(limits["file_bytes"]) + (1 << 20))
    at_most(resource.RLIMIT_CORE, 0)
    at_most(resource.RLIMIT_NOFILE, 64)
    at_most(resource.RLIMIT_NPROC, 0)
    at_most(resource.RLIMIT_AS, _address_bytes() + int(limits["memory_bytes"]))
    # Of the clock: should the parent be gone, nobody else would end it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits["seconds"])


def _address_bytes() -> int:
    """Of this process, so far."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _has_own_network() -> bool:
    """Leave the network for an empty one, if the kernel allows it."""
    spaces = [os.CLONE_NEWNET] if os.geteuid() == 0 else []
    for kinds in (*spaces, os.CLONE_NEWUSER | os.CLONE_NEWNET):
        try:
            os.unshare(kinds)
        except OSError:
            continue
        return True
    return False


def _become_nobody(folder: str) -> None:
    """From root to an account that may do nothing, if Python can be read by it."""
    if os.geteuid() != 0:
        return
    try:
        os.seteuid(_NOBODY)
        try:
            for module in (os, json):
                with open(str(module.__file__)):
                    pass
        finally:
            os.seteuid(0)
        os.chown(folder, _NOBODY, _NOBODY)
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    except OSError:
        return


def _run(text: str, name: str, names: dict[str, Any]) -> str:
    """Run Python text; return what went wrong, or ""."""
    try:
        exec(compile(text, name, "exec"), names)
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too.
        try:
            frames = error.__traceback__ and error.__traceback__.tb_next
            lines = traceback.format_exception(type(error), error, frames)
            return "".join(lines)[-2000:] or type(error).__name__
        except BaseException:
            return type(error).__name__
    return ""


def _main(answers: int) -> None:
    folder = os.getcwd()
    request = json.loads(sys.stdin.buffer.read())
    tests, nonce = request.pop("tests"), request.pop("nonce")
    # What a program might replace, taken before it can.
    write, dumps, leave = os.write, json.dumps, os._exit
    copy, run = dict, _run

    def tell(**values: Any) -> None:
        write(answers, (f"{nonce}{dumps(values)}\n").encode())

    tell(has_own_network=_has_own_network())
    _become_nobody(folder)
    _limit(request["limits"])
    sys.addaudithook(_guard(folder))
    names = {"__name__": "program", "__builtins__": builtins}
    program_error = run(request["program"], "program.py", names)
    if program_error:
        tell(error=program_error)
        leave(0)
    for number, test in enumerate(tests):
        error = run(test, f"test_{number}.py", copy(names))
        tell(number=number, error=error)
    leave(0)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
