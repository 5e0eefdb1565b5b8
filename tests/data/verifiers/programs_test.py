"""Generated programs: what passes, and what each of them is kept from."""

import os
import pathlib
import tempfile
import time

import pytest

from realjax.data.verifiers import programs, python_tests
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
        ("```bash\nls\n```\nThen\n```python3\na\n```", "a\n"),
        ("```Python\na\n```\nIt says:\n```\nb\n```", "a\n"),
        ("```py title=x\na\n```\nRun\n```bash\nls\n```\nso.", "a\n"),
        ("```text\nx\n```\n```\na\n```\nDone.", "a\n"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("Use ```add``` so:\n```python\na\n```", "a\n"),
        ("1. So: ```PY\na```\nDone.", "a"),
        ('````python\ns = "```"\n```\n````', 's = "```"\n```\n'),
    ],
)
def test_the_program_is_the_last_block_of_python(completion, program):
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
    found = run("import time\ntime.sleep(60)", limits=limits)
    assert found.passed == (False,) and found.error == "took more than 0.5 s"
    assert time.monotonic() - began < 30


def test_a_program_that_ignores_its_alarm_is_ended(monkeypatch):
    monkeypatch.setattr(programs, "_START_SECONDS", 2.0)
    program = "import signal, time\nsignal.alarm(0)\n"
    program += "signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
    found = run(program, "pass", "time.sleep(60)", limits=Limits(seconds=0.5))
    assert found.passed == (True, False) and found.error == "took more than 0.5 s"


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
        "import _dbm",
        "import os\nos.open(os.path.dirname('{outside}'), os.O_RDONLY)",
        "import os\nos.open('..', os.O_RDONLY, dir_fd=os.open('.', os.O_RDONLY))",
        "import os\nos.remove('{outside}'[1:], dir_fd=os.open('/', os.O_PATH))",
        "import os\nos.mkdir('../made', dir_fd=os.open('.', os.O_RDONLY))",
        "import os\nopen('a', 'w').close()\nos.replace('a', '{outside}')",
        "import os\nos.fchmod(os.open('{outside}', os.O_RDONLY), 0o777)",
        "import os\nos.symlink('../..', 'link')",
        "import os\nos.mkfifo('{outside}.pipe')",
        "import os\nos.pidfd_open(os.getppid())",
        "import sqlite3\nsqlite3.connect('{outside}')",
        "import sqlite3\nsqlite3.connect('file:{outside}', uri=True)",
        "__builtins__.isinstance = lambda *a: False\nopen('{outside}', 'w')",
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
    # Of an account that may less, the kernel refuses some of it.
    assert "Refused" in found.error or "Permission" in found.error, found.error
    assert outside.read_text() == "kept" and list(tmp_path.iterdir()) == [outside]


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


@pytest.mark.parametrize(
    "program",
    [
        "import builtins\nbuiltins.exec = lambda *a, **k: None",
        "import builtins\nbuiltins.compile = lambda *a, **k: 'pass'",
        "import builtins\nbuiltins.isinstance = lambda *a: True",
        "import builtins\nbuiltins.dict = lambda *a: {}",
        "import builtins\nbuiltins.BaseException = ZeroDivisionError",
        "import json\njson.dumps = json._default_encoder.encode = lambda *a: '{}'",
        "import traceback\ntraceback.TracebackException.format = lambda *a, **k: []",
        "import __main__\n__main__._run = __main__._runner = lambda *a: ''",
        "import sys\nfor name in dir(sys.modules['__main__']):\n"
        "    setattr(sys.modules['__main__'], name, print)",
    ],
    ids=lambda text: text.split("\n")[1][:32],
)
def test_what_a_program_replaces_makes_no_test_pass(program):
    assert run(program, "assert False", "1 / 0").passed == (False, False)


def test_errors_without_a_name_or_a_text_are_errors():
    program = "E = type('', (Exception,), {'__module__': 'builtins'})\n"
    program += "import traceback\ntraceback.print_list = None\n"
    program += "traceback.TracebackException.format = lambda *a, **k: []\n"
    assert run(program, "raise E()").passed == (False,)


def test_programs_are_modules_as_others_are():
    program = (
        "from __future__ import annotations\nimport dataclasses, typing\n"
        "@dataclasses.dataclass\nclass Point:\n"
        "    x: int\n    made: typing.ClassVar[int] = 3\n"
    )
    tests = (
        "assert Point(1) == Point(x=1) and Point.made == 3",
        "import pickle\nassert pickle.loads(pickle.dumps(Point(2))).x == 2",
        "from program import Point as same\nassert same is Point",
        "assert typing.get_type_hints(Point)['x'] is int",
    )
    assert run(program, *tests).passed == (True,) * 4


def test_libraries_do_without_the_modules_that_are_refused():
    program = (
        "import shelve\nwith shelve.open('kept') as kept:\n    kept['a'] = 1\n"
        "import sqlite3\nfor name in (':memory:', 'a.db'):\n"
        "    sqlite3.connect(name).execute('create table t (a)')\n"
        "try:\n    import ctypes\nexcept ImportError:\n    found = True\n"
        "import os, shutil, tempfile\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    os.makedirs(folder + '/a/b')\n    os.symlink('a', folder + '/c')\n"
        "place = os.open('.', os.O_RDONLY)\n"
        "os.mkdir('d', dir_fd=place)\nos.rmdir('d', dir_fd=place)\n"
    )
    found = run(program, "assert found and not os.path.exists(folder)")
    assert found.passed == (True,), found.error


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


def sandbox_where(kernel, folder, monkeypatch):
    """The sandbox with another `_has_left`, as where a kernel gives less."""
    text = pathlib.Path(programs.sandbox.__file__).read_text()
    begin = "def _main(answers: int) -> None:\n"
    assert begin in text
    lines = f"    had_left = _has_left\n    globals()['_has_left'] = {kernel}\n"
    file = folder / "sandbox.py"
    file.write_text(text.replace(begin, begin + lines))
    monkeypatch.setattr(programs.sandbox, "__file__", str(file))


def test_without_an_empty_network_no_program_is_run(tmp_path, monkeypatch):
    sandbox_where("lambda kinds: False", tmp_path, monkeypatch)
    assert run("pass").passed == (True,) and not run("pass").has_own_network
    ends = []

    def verdict(lines, nonce, num_tests, end, limits):
        ends.append(end)
        return judge(lines, nonce, num_tests, end, limits)

    judge = programs._verdict
    monkeypatch.setattr(programs, "_verdict", verdict)
    limits = Limits(needs_network_namespace=True)
    with pytest.raises(RuntimeError, match="no empty network"):
        run("import os\nos._exit(7)", limits=limits)
    # Not 7: the program did not come to its end.
    assert ends == ["ended its process with status 0"]


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root can become another account.")
def test_root_becomes_nobody_where_only_users_get_a_network(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("kept")
    secret.chmod(0o600)
    program = f"open('a', 'w').write('1')\nopen({str(secret)!r})"
    found = run(program)
    if found.passed == (True,):
        pytest.skip("Nobody can read this Python, so root stays root.")
    kernel = "lambda kinds: kinds != os.CLONE_NEWNET and had_left(kinds)"
    sandbox_where(kernel, tmp_path, monkeypatch)
    again = run(program)
    assert again.passed == (False,) and "Permission denied" in again.error


def test_lines_that_are_no_answers_are_no_verdict():
    lines = ["n test 0 1 ", "n test 7 1 ", "n test 1 2 ", "m test 1 1 ", "n test 1 1 f"]
    lines += ["n", "n {}", "n test -1 1 ", "n test 1 1 zz", "n network 0 1 "]
    found = programs._verdict(lines, "n", 2, "ended", Limits())
    assert found.passed == (True, False) and found.error == "ended"
    assert found.has_own_network
