"""Generated programs: what passes, and what each of them is kept from."""

import os
import pathlib
import tempfile
import time

import pytest

from realjax.data.verifiers import python_tests
from realjax.data.verifiers.programs import Limits, program_of, run_tests

ADD = "def add(a, b):\n    return a + b\n"
TESTS = (
    "assert add(1, 2) == 3",
    "assert add('a', 'b') == 'ab'",
    "assert add(1, 1) == 3",
)
QUICK = Limits(seconds=5.0, cpu_seconds=2, memory_bytes=1 << 28)


def run(program, *tests, limits=QUICK):
    return run_tests(program, tests or ("pass",), limits)


def test_each_test_passes_or_fails_for_itself():
    found = run(ADD, *TESTS)
    assert found.passed == (True, True, False)
    assert "AssertionError" in found.error and "test_2.py" in found.error


def test_tests_do_not_see_each_others_names():
    assert run(ADD, "x = 1", "x").passed == (True, False)


def test_completions_score_by_all_tests_or_by_the_part():
    completions = [f"Look:\n```python\n{ADD}```\nDone.", ADD, "def add(a, b):", None]
    tests = [list(TESTS[:2]), list(TESTS), TESTS[0], TESTS[0]]
    prompts = ["Write add."] * 4
    assert python_tests(prompts, completions, tests=tests) == [1, 0, 0, 0]
    found = python_tests(prompts, completions, tests=tests, is_partial=True)
    assert found == pytest.approx([1, 2 / 3, 0, 0])


def test_a_program_may_go_on_where_its_prompt_ends():
    prompt, completion = "def add(a, b):\n", "    return a + b\n"
    options = {"tests": [TESTS[0]]}
    assert python_tests([prompt], [completion], follows_prompt=True, **options) == [1]
    assert python_tests([prompt], [completion], **options) == [0]


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\na\n```\nthen\n```py\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```python\nnever closed", "never closed"),
    ],
)
def test_the_program_is_the_last_fenced_block(completion, program):
    assert program_of(completion) == program


@pytest.mark.parametrize("tests", [[None], [[]], [[1]], [{"a": "b"}]])
def test_tests_that_are_none_are_refused(tests):
    with pytest.raises(ValueError, match=r"The column `tests` has"):
        python_tests(["?"], [ADD], tests=tests)


def test_limits_that_nothing_keeps_are_refused():
    with pytest.raises(ValueError, match="seconds is 0"):
        python_tests(["?"], [ADD], tests=["pass"], seconds=0)
    with pytest.raises(ValueError, match="file_bytes is -1"):
        Limits(file_bytes=-1)


# -- what a program is kept from -----------------------------------------------------


def test_a_program_that_sleeps_is_ended():
    began = time.monotonic()
    limits = Limits(seconds=0.5)
    assert not any(run("import time\ntime.sleep(60)", limits=limits).passed)
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_a_program_that_spins_is_ended():
    found = run("while True: pass", limits=Limits(seconds=20.0, cpu_seconds=1))
    assert found.passed == (False,) and "status -" in found.error


def test_memory_is_limited():
    found = run("x = bytearray(1 << 30)", limits=QUICK)
    assert found.passed == (False,) and "MemoryError" in found.error


def test_files_are_small_and_in_their_folder():
    limits = Limits(seconds=5.0, file_bytes=1 << 10)
    inside = "open('a', 'w').write('1')\nassert open('a').read() == '1'"
    assert run(inside, limits=limits).passed == (True,)
    large = "f = open('a', 'wb')\nf.write(bytes(4 << 20))\nf.flush()"
    assert "File too large" in run(large, limits=limits).error


@pytest.mark.parametrize(
    "program",
    [
        "import socket\nsocket.socket()",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        "import urllib.request as r\nr.urlopen('http://127.0.0.1:9')",
        "import os\nos.fork()",
        "import os\nos.system('true')",
        "import subprocess\nsubprocess.run(['true'])",
        "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
        "import threading\nthreading.Thread(target=print).start()",
        "import ctypes",
        "open('{outside}', 'w')",
        "import os\nos.remove('{outside}')",
        "import os\nos.open('{outside}', os.O_CREAT | os.O_WRONLY)",
        "import shutil, os\nshutil.rmtree(os.path.dirname('{outside}'))",
        "import os\nos.symlink('/etc', 'link')\nopen('link/x', 'w')",
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))",
    ],
    ids=lambda text: text.split("\n")[-1][:32],
)
def test_what_is_not_allowed_fails(program, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("kept")
    found = run(program.replace("{outside}", str(outside)))
    assert found.passed == (False,)
    assert "Refused" in found.error or "Permission" in found.error, found.error
    assert outside.read_text() == "kept"


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import sys\nsys.exit()",
        "import os\nos._exit(0)",
        "import builtins\nbuiltins.exec = lambda *a: None\nraise ValueError",
        "print('passed')\nraise KeyboardInterrupt",
    ],
)
def test_ending_early_is_no_way_to_pass(program):
    assert run(program, "assert False").passed == (False,)


def test_a_program_in_a_test_that_ends_the_process_leaves_the_others_their_verdict():
    program = "import os\ndef f(): os._exit(0)\n"
    found = run(program, "pass", "f()", "pass")
    assert found.passed == (True, False, False)
    assert "status 0" in found.error


def test_nothing_is_left_of_a_program(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = children()
    run(
        "open('a', 'w').write('x')\nimport time\ntime.sleep(60)",
        limits=Limits(seconds=0.3),
    )
    assert children() == before
    assert not list(tmp_path.iterdir())


def children():
    found = pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {pid for file in found for pid in file.read_text().split()}


def test_an_empty_network_can_be_required():
    limits = Limits(seconds=5.0, needs_network_namespace=True)
    # On this machine the kernel gives one, or the refusal says that it does not.
    if run("pass").has_own_network:
        assert run("pass", limits=limits).passed == (True,)
    else:
        with pytest.raises(RuntimeError, match="no empty network"):
            run("pass", limits=limits)
