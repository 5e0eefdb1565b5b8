"""The process in which a generated program meets its tests; see `programs`.

Started by its path, in an empty folder, with the request on its standard input and the
number of a file for its answers as its argument. Only the standard library is used, and
nothing of the package.

Program and tests share an interpreter with what tells of them. What runs the tests is
bound before the program can replace it; but one that walks the frames above it finds
what is there, and one whose objects claim to equal everything needs not even that. See
`programs` for what holds all the same.
"""

import builtins
import json
import os
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

_NOBODY = 65534

_REFUSED_EVENTS = (
    *("socket.", "subprocess.", "ctypes.", "pty.", "ftplib.", "http.", "imaplib."),
    *("poplib.", "smtplib.", "telnetlib.", "urllib.", "webbrowser.", "syslog."),
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.startfile"),
    *("os.kill", "resource.setrlimit", "resource.prlimit", "signal.pthread_kill"),
    *("fcntl.", "_thread.start", "mmap.", "sys.remote_exec", "gc.get"),
    *("sqlite3.enable_load_extension", "sqlite3.load_extension"),
)
"""Beginnings of the names of audit events of what a program may not do."""

_REFUSED_MODULES = (
    *("ctypes", "_ctypes", "_posixsubprocess", "_testcapi", "cffi"),
    # They open files that no event tells of; `dbm` and `shelve` have another way.
    *("_dbm", "_gdbm", "readline"),
)

_REFUSED_FUNCTIONS = {
    **dict.fromkeys(
        ("os", "posix"),
        ("chroot", "mkfifo", "mknod", "pidfd_open", "setns", "unshare"),
    ),
    **dict.fromkeys(("signal", "_signal"), ("pidfd_send_signal",)),
}
"""Of modules, what no event tells of."""

# Audit events about files: which of their arguments are paths that are changed, and
# which are the folders (open, by number) that these paths begin at.
_WRITES = {
    **{"os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),)},
    **{"os.rename": ((0, 2), (1, 3)), "os.link": ((0, 2), (1, 3))},
    **{"os.symlink": ((1, 2),), "os.utime": ((0, 3),), "os.chmod": ((0, 2),)},
    **{"os.chown": ((0, 3),), "shutil.rmtree": ((0, 1),)},
    **{"shutil.move": ((0, None), (1, None)), "os.truncate": ((0, None),)},
    **{"os.chflags": ((0, None),), "os.setxattr": ((0, None),)},
    **{"os.removexattr": ((0, None),), "tempfile.mkdtemp": ((0, None),)},
    **{"tempfile.mkstemp": ((0, None),)},
}

_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(PermissionError):
    """A program tried what it may not do."""


class RefusedImport(ImportError):
    """A program tried to import what it may not; many libraries do without."""


def _guard(folder: str) -> Callable[[str, tuple], None]:
    """The audit hook: refuses calls by the names of their events."""
    inside = folder.rstrip(os.sep) + os.sep
    # What a program might replace, taken before it can.
    has_type, integer, string = isinstance, int, str
    refused, refused_import = Refused, RefusedImport
    writes, writing_flags = _WRITES, _WRITING_FLAGS
    events, modules = _REFUSED_EVENTS, _REFUSED_MODULES
    realpath, fspath, decode = os.path.realpath, os.fspath, os.fsdecode
    readlink, stat = os.readlink, os.stat

    def is_inside(path: Any, start: Any = None) -> bool:
        """Whether a path is in the folder: a name, or the number of an open file."""
        try:
            if has_type(path, integer):
                name = readlink(f"/proc/self/fd/{path}")
            else:
                name = decode(fspath(path))
                if has_type(start, integer) and start >= 0 and name[:1] != "/":
                    name = readlink(f"/proc/self/fd/{start}") + "/" + name
            return f"{realpath(name)}/".startswith(inside)
        except (TypeError, ValueError, OSError):
            return False

    def is_folder(path: Any) -> bool:
        try:
            return stat(path).st_mode & 0o170000 == 0o040000
        except (TypeError, ValueError, OSError):
            return False

    def has_parent(path: Any) -> bool:
        """Whether a relative path goes up."""
        name = decode(fspath(path))
        return not name.startswith("/") and ".." in name.split("/")

    def refuse(what: str) -> None:
        raise refused(f"{what} is not allowed to a program that is tested.")

    def check_open(path: Any, mode: Any, flags: Any) -> None:
        is_written = has_type(flags, integer) and flags & writing_flags
        if has_type(mode, string):
            for letter in "wax+":
                is_written = is_written or letter in mode
        if is_written and not has_type(path, integer) and not is_inside(path):
            refuse(f"writing {path!r}")
        # os.open, which does not tell at which folder a relative path begins. So no
        # folder outside is ever open, and no path leads out of one.
        if mode is None and not has_type(path, integer):
            if has_parent(path) or (is_folder(path) and not is_inside(path)):
                refuse(f"opening {path!r} by os.open")

    def check_link(target: Any) -> None:
        is_absolute = decode(fspath(target)).startswith("/")
        if has_parent(target) or (is_absolute and not is_inside(target)):
            refuse(f"a link to {target!r}")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = (*arguments, None, None, None)[:3]
            check_open(path, mode, flags)
        elif event in writes:
            if event == "os.symlink":
                check_link(arguments[0])
            for index, start in writes[event]:
                place = arguments[start] if start else None
                if not is_inside(arguments[index], place):
                    refuse(f"{event} of {arguments[index]!r}")
        elif event == "sqlite3.connect":
            name = decode(fspath(arguments[0]))
            is_named = name not in ("", ":memory:")
            if is_named and (name.startswith("file:") or not is_inside(name)):
                refuse(f"the database {name!r}")
        elif event == "import":
            if f"{arguments[0]}".partition(".")[0] in modules:
                raise refused_import(
                    f"{arguments[0]} is not allowed to a program that is tested."
                )
        elif event.startswith(events):
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


def _has_left(kinds: int) -> bool:
    """Leave namespaces for empty ones, if the kernel allows it."""
    try:
        os.unshare(kinds)
    except OSError:
        return False
    return True


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


def _refuse_functions() -> None:
    """Put what refuses in the place of functions that no audit event tells of."""

    def refusing(name: str, refused: type[Exception] = Refused) -> Callable[..., Any]:
        def refuse(*_arguments: Any, **_named: Any) -> Any:
            raise refused(f"{name} is not allowed to a program that is tested.")

        return refuse

    for module, names in _REFUSED_FUNCTIONS.items():
        for name in names:
            if hasattr(sys.modules[module], name):
                setattr(sys.modules[module], name, refusing(f"{module}.{name}"))


def _runner() -> Callable[[str, str, dict[str, Any]], tuple[bool, str]]:
    """What runs Python text, and says whether it ended well and what went wrong."""
    # What a program might replace, taken before it can.
    run, compiled, kind = exec, compile, type
    anything, describe = BaseException, traceback.format_exception

    def ends_well(text: str, name: str, names: dict[str, Any]) -> tuple[bool, str]:
        try:
            run(compiled(text, name, "exec"), names)
        except anything as error:  # SystemExit and KeyboardInterrupt, too.
            try:
                frames = error.__traceback__ and error.__traceback__.tb_next
                lines = describe(kind(error), error, frames)
                return False, "".join(lines)[-2000:]
            except anything:
                return False, kind(error).__name__
        return True, ""

    return ends_well


def _main(answers: int) -> None:
    folder = os.getcwd()
    request = json.loads(sys.stdin.buffer.read())
    tests, nonce = request.pop("tests"), request.pop("nonce")
    limits = request["limits"]
    # What a program might replace, taken before it can.
    write, leave, copy, ends_well = os.write, os._exit, dict, _runner()
    numbered = [
        (number, f"test_{number}.py", test) for number, test in enumerate(tests)
    ]

    def tell(what: str, number: int, is_good: bool, error: str = "") -> None:
        """A line for the parent, made without a module that a program may change."""
        flag = "1" if is_good else "0"
        text = error.encode("utf-8", "replace").hex()
        write(answers, f"{nonce} {what} {number} {flag} {text}\n".encode())

    has_own_network = os.geteuid() == 0 and _has_left(os.CLONE_NEWNET)
    # Before there are users of its own, among which "nobody" has no number.
    _become_nobody(folder)
    if not has_own_network:
        has_own_network = _has_left(os.CLONE_NEWUSER | os.CLONE_NEWNET)
    tell("network", 0, has_own_network)
    if limits["needs_network_namespace"] and not has_own_network:
        leave(0)
    _limit(limits)
    # A module, as dataclasses look theirs up; and a program that asks for the main one
    # finds itself.
    module = types.ModuleType("program")
    names = module.__dict__
    names["__builtins__"] = builtins
    sys.modules["program"] = sys.modules["__main__"] = module
    _refuse_functions()
    sys.addaudithook(_guard(folder))
    is_good, error = ends_well(request["program"], "program.py", names)
    tell("program", 0, is_good, error)
    if not is_good:
        leave(0)
    has_failed = False
    for number, name, test in numbered:
        is_good, error = ends_well(test, name, copy(names))
        tell("test", number, is_good, "" if has_failed else error)
        has_failed = has_failed or not is_good
    leave(0)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
