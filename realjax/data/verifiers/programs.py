"""A verifier of generated Python: it runs against tests, in a process with limits.

    worker ── program, tests ─▶ sandbox.py: limits, then the program, then its tests
           ◀─ which passed ────

What holds a program back, by who holds it:

    the kernel     memory, CPU seconds and the size of files; on accounts other than
                   root, and from root where it can become "nobody", also the number of
                   processes (none but its own) and what it may write; a network of its
                   own with nothing in it, where the kernel lets an account have one
    the parent     seconds of the clock; the folder it ran in is deleted
    Python         no process, thread, signal, socket or foreign library, and nothing
                   written outside its folder: an audit hook refuses the calls of the
                   standard library that Python tells it of (PEP 578)

A program that goes wrong is held by these, and so are tricks such as ending with status
0. They are no prison for one that is written to break out of the interpreter: run what
an adversary may have trained in a container or a virtual machine. Files that the
account can read, it can read; and Python sees only what it audits, so that a foreign
library, or SQL that attaches another database, writes where the account may.

**A program that tries can forge its verdict.** Its tests call it in its own process, so
it can answer with objects that equal everything, change a builtin that a test uses, or
walk the frames above it, read the tests, and tell of them what it likes. Guaranteed all
the same are the limits of the kernel and of the parent, and that a program passes
nothing by raising, hanging, ending its process or replacing what runs its tests (exec,
compile and the like). Such a way of scoring shows in completions: read them.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from realjax.data.verifiers import sandbox
from realjax.data.verifiers.columns import needed_column

# A block begins where a line does, or with its mark after text; it ends with as many
# back ticks, which begin or end a line. So what closes one block opens no other.
_FENCED = re.compile(
    r"(?:^[ \t]*(?P<fence>`{3,})[ \t]*(?P<mark>[^`\n]*)"
    r"|(?P<late>`{3,})(?P<named>python3?|py)[ \t\r]*)\n(?P<text>.*?)"
    r"(?:^[ \t]*(?:(?P=fence)|(?P=late))(?![`\w])"
    r"|(?:(?P=fence)|(?P=late))[ \t\r]*$|\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_MARKS = ("python", "py", "python3")
_START_SECONDS = 5.0
"""Of the clock, for the interpreter; a program's own seconds are counted from then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may take.

    Attributes:
        seconds: of the clock, for the program and all its tests.
        cpu_seconds: of the processor.
        memory_bytes: beside what the interpreter itself has.
        file_bytes: of any one file that it writes.
        needs_network_namespace: whether to refuse, by an error, to run it where the
            kernel gives no empty network, so that only Python keeps it from sockets.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 29
    file_bytes: int = 1 << 24
    needs_network_namespace: bool = False

    def __post_init__(self):
        """Refuses limits that nothing could keep."""
        for name in ("seconds", "cpu_seconds", "memory_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be above 0."
                )
        if self.file_bytes < 0:
            raise ValueError(f"file_bytes is {self.file_bytes}; it must be at least 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a program.

    Attributes:
        passed: whether each test passed.
        error: of the program, or of the first test that failed; "" if all passed.
        has_own_network: whether the kernel gave it an empty one.
    """

    passed: tuple[bool, ...]
    error: str = ""
    has_own_network: bool = False


def python_tests(
    prompts: Sequence[str],
    completions: Sequence[str | None],
    *,
    tests: Sequence[Any] | None = None,
    follows_prompt: bool = False,
    is_partial: bool = False,
    num_parallel: int = 2,
    seconds: float = Limits.seconds,
    cpu_seconds: int = Limits.cpu_seconds,
    memory_bytes: int = Limits.memory_bytes,
    file_bytes: int = Limits.file_bytes,
    needs_network_namespace: bool = Limits.needs_network_namespace,
    **columns: Sequence[Any],
) -> list[float]:
    """Scores 1 where the program of a completion passes all its tests, else 0.

    The program is that of `program_of`, the last fenced block of Python.
    A test passes if it ends without an exception; it sees the program's names, and not
    those of other tests. A batch takes up to `seconds` for each completion,
    `num_parallel` at a time: give the reward function a `timeout_seconds` for that.

    Args:
        prompts: begin the programs, if `follows_prompt`.
        completions: with a program each.
        tests: the column: Python text, or a list of such, one for each test.
        follows_prompt: whether a program goes on where its prompt ends, as HumanEval's
            do (Chen et al. 2021); it is then no block, but the whole completion.
        is_partial: whether the score is the part of the tests that pass.
        num_parallel: programs that run at the same time.
        seconds: of the clock, for a program; this and what follows as in `Limits`.
        cpu_seconds: of the processor.
        memory_bytes: beside the interpreter's own.
        file_bytes: of a file.
        needs_network_namespace: whether to refuse to run without.
        **columns: not read.

    Raises:
        ValueError: there are no tests, or limits that are none.
        RuntimeError: `needs_network_namespace`, and the kernel gives none.
    """
    del columns
    every = needed_column("python_tests", "tests", tests, completions)
    limits = Limits(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        memory_bytes=memory_bytes,
        file_bytes=file_bytes,
        needs_network_namespace=needs_network_namespace,
    )

    def score(prompt: str, completion: str | None, tests: Any) -> float:
        program = completion or ""
        program = prompt + program if follows_prompt else program_of(program)
        passed = run_tests(program, _as_list(tests), limits).passed
        return sum(passed) / len(passed) if is_partial else float(all(passed))

    with concurrent.futures.ThreadPoolExecutor(max(1, num_parallel)) as pool:
        return list(pool.map(score, prompts, completions, every))


def program_of(completion: str) -> str:
    """The last fenced block of a completion that is marked as Python.

    Marks are "python", "py" and "python3", in letters of any size. Where none has one,
    it is the last block without a mark; without such a block, all of the completion.
    """
    marked, unmarked = [], []
    for block in _FENCED.finditer(completion):
        words = (block["named"] or block["mark"] or "").lower().split()
        if not words:
            unmarked.append(block["text"])
        elif words[0] in _MARKS:
            marked.append(block["text"])
    return (marked or unmarked or [completion])[-1]


def run_tests(program: str, tests: Sequence[str], limits: Limits) -> Verdict:
    """Run a program and its tests in a process of their own; see the module.

    Args:
        program: Python text.
        tests: Python texts; one that raises nothing has passed.
        limits: of that process.

    Raises:
        RuntimeError: `limits.needs_network_namespace`, and the kernel gives none.
    """
    nonce = secrets.token_hex(16)
    request = {
        "program": program,
        "tests": list(tests),
        "nonce": nonce,
        "limits": dataclasses.asdict(limits),
    }
    is_late = False
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(
            tempfile.TemporaryDirectory(prefix="program_", ignore_cleanup_errors=True)
        )
        # A file, not a pipe: a limit of the kernel keeps it small.
        answer = opened.enter_context(tempfile.TemporaryFile())
        process = subprocess.Popen(
            # -I: neither the environment nor the folder decides what is imported.
            [sys.executable, "-I", "-B", sandbox.__file__, str(answer.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[answer.fileno()],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder},
        )
        try:
            process.communicate(
                json.dumps(request).encode(), limits.seconds + _START_SECONDS
            )
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            process.kill()
            process.wait()
        answer.seek(0)
        lines = answer.read(1 << 20).decode(errors="replace").splitlines()
    is_late = is_late or process.returncode == -signal.SIGALRM
    end = f"ended its process with status {process.returncode}"
    if is_late:
        end = f"took more than {limits.seconds:g} s"
    return _verdict(lines, nonce, len(tests), end, limits)


def _verdict(
    lines: Sequence[str], nonce: str, num_tests: int, end: str, limits: Limits
) -> Verdict:
    """What the lines say that begin with the nonce; others are no verdict.

    Args:
        lines: of the file for answers.
        nonce: which no program is told.
        num_tests: that there are.
        end: what is wrong if the lines end before the tests do.
        limits: that were asked for.
    """
    told = re.compile(
        nonce + " (network|program|test) ([0-9]{1,9}) ([01]) ((?:[0-9a-f]{2})*)"
    )
    passed, error, has_own_network = [False] * num_tests, "", None
    for match in filter(None, map(told.fullmatch, lines)):
        what, number, is_good = match[1], int(match[2]), match[3] == "1"
        error = error or bytes.fromhex(match[4]).decode(errors="replace")
        if what == "network":
            has_own_network = is_good
        elif what == "test" and number < num_tests:
            passed[number] = is_good
    if limits.needs_network_namespace and has_own_network is False:
        raise RuntimeError(
            "The kernel gives this account no empty network for programs that are "
            "tested, and needs_network_namespace is set. Allow user namespaces, or run "
            "where sockets do no harm and leave it out."
        )
    if not error and not all(passed):
        error = end
    return Verdict(
        passed=tuple(passed), error=error, has_own_network=bool(has_own_network)
    )


def _as_list(tests: Any) -> list[str]:
    """Texts of the tests of one record.

    Raises:
        ValueError: there is none, or they are something else.
    """
    found = [tests] if isinstance(tests, str) else tests
    is_texts = isinstance(found, list | tuple) and all(
        isinstance(one, str) for one in found
    )
    if not is_texts or not found:
        raise ValueError(
            f"The column `tests` has {str(tests)[:60]!r}; it needs Python text for each"
            " completion, or a list of at least one."
        )
    return list(found)
