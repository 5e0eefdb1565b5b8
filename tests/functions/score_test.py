import functools
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from realjax.core.config import config_dict, to_dataclass
from realjax.functions.score import RewardError, RewardFunction, RewardWorkers

FUNCTIONS = """
import asyncio
import os
import sys
import time


def length(prompts, completions, **columns):
    return [len(completion) for completion in completions]


def matches(prompts, completions, answer):
    return [c == a for c, a in zip(completions, answer)]


def sees(prompts, completions, **columns):
    return [len(columns) + len(prompt) / 100 for prompt in prompts]


async def slow_length(prompts, completions):
    await asyncio.sleep(0.01)
    return [len(completion) for completion in completions]


def raises(prompts, completions, **columns):
    return [1 / (len(completion) - 2) for completion in completions]


def hangs(prompts, completions, **columns):
    while "hang" in completions:
        time.sleep(0.01)
    return [1.0] * len(completions)


def dies(prompts, completions, **columns):
    if "die" in completions:
        os.kill(os.getpid(), 9)
    return [1.0] * len(completions)


def quits(prompts, completions, **columns):
    sys.exit("enough")


def numbers(prompts, completions, **columns):
    return [float(completion) for completion in completions]


def too_few(prompts, completions, **columns):
    return [1.0]


def text(prompts, completions, **columns):
    return completions


def one_number(prompts, completions, **columns):
    return 1.0


def nothing(prompts, completions, **columns):
    return [None] * len(completions)


def array(prompts, completions, **columns):
    import numpy

    return numpy.arange(len(completions), dtype=numpy.float32)


def has_jax(prompts, completions, **columns):
    return ["jax" in sys.modules or "numpy" in sys.modules] * len(completions)


def process(prompts, completions, **columns):
    return [os.getpid()] * len(completions)


def scaled(prompts, completions, *, factor=1.0, offset=0.0, **columns):
    return [factor * len(completion) + offset for completion in completions]


def hungry(prompts, completions):
    if "feed" in completions:
        kept = globals().setdefault("kept", [])
        while True:
            kept.append(bytearray(1 << 24))
    return [float("kept" in globals())] * len(completions)


def starts(prompts, completions, pids):
    import pathlib
    import subprocess

    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path(pids[0]).write_text(str(child.pid))
    while "hang" in completions:
        time.sleep(0.01)
    if "die" in completions:
        os._exit(3)
    return [1.0] * len(completions)


class Constant:
    def __init__(self, value):
        self.value = value

    def __call__(self, prompts, completions):
        return [self.value] * len(completions)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards_of_mine.py"
    path.write_text(FUNCTIONS)
    return path


def score(file, name, completions, columns=None, *, num_workers=1, **options):
    function = RewardFunction(fn=f"{file}:{name}", **options)
    with RewardWorkers([function], num_workers) as workers:
        scores = workers.score(["p"] * len(completions), completions, columns)
        return scores, workers.num_failures[name]


def is_gone(pid):
    """Whether a process has ended; one that nobody has reaped yet counts."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


# Scores.


def test_scores_are_float32_in_the_order_of_the_batch(file):
    for num_workers in (1, 3):
        completions = ["x" * n for n in (5, 0, 3, 1, 9)]
        scores, num_failures = score(
            file, "length", completions, num_workers=num_workers
        )
        assert scores.dtype == np.float32 and num_failures == 0
        np.testing.assert_array_equal(scores, [5, 0, 3, 1, 9])


def test_the_score_is_the_weighted_sum(file):
    functions = [
        RewardFunction(fn=f"{file}:length", weight=0.5),
        RewardFunction(fn=f"{file}:matches", weight=-2.0),
    ]
    with RewardWorkers(functions, num_workers=2) as workers:
        arguments = (["p"] * 3, ["a", "bb", "cc"], {"answer": ["a", "x", "cc"]})
        # 0.5 * (1, 2, 2) - 2 * (1, 0, 1)
        np.testing.assert_array_equal(workers.score(*arguments), [-1.5, 1.0, -1.0])
        each = workers.score_each(*arguments)
    np.testing.assert_array_equal(each["length"], [1, 2, 2])
    np.testing.assert_array_equal(each["matches"], [1, 0, 1])


def test_a_function_gets_the_columns_it_names_or_all(file):
    columns = {"answer": ["a", "b"], "id": [1, 2]}
    np.testing.assert_array_equal(
        score(file, "matches", ["a", "a"], columns)[0], [1, 0]
    )
    # Two columns, and prompts of one letter.
    np.testing.assert_allclose(
        score(file, "sees", ["a", "a"], columns)[0], [2.01, 2.01]
    )


def test_rows_of_columns_follow_their_part_of_the_batch(file):
    answers = list("abcdefg")
    completions = ["a", "x", "c", "x", "e", "x", "g"]
    scores, _ = score(file, "matches", completions, {"answer": answers}, num_workers=3)
    np.testing.assert_array_equal(scores, [1, 0, 1, 0, 1, 0, 1])


def test_a_coroutine_function_is_awaited(file):
    np.testing.assert_array_equal(score(file, "slow_length", ["ab", "c"])[0], [2, 1])


def test_an_array_is_a_list_of_numbers(file):
    np.testing.assert_array_equal(score(file, "array", ["a", "b"])[0], [0, 1])


def test_more_workers_than_completions_and_no_completions(file):
    np.testing.assert_array_equal(score(file, "length", ["a"], num_workers=3)[0], [1])
    assert score(file, "length", [])[0].shape == (0,)


def test_workers_start_without_jax_or_numpy_and_are_kept(file):
    with RewardWorkers([RewardFunction(fn=f"{file}:has_jax")]) as workers:
        assert workers.score(["p"], ["c"])[0] == 0
    with RewardWorkers([RewardFunction(fn=f"{file}:process")]) as workers:
        first, second = (workers.score(["p"], ["c"])[0] for _ in range(2))
    assert first == second != os.getpid()


def test_functions_of_importable_modules_may_be_given_as_they_are(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    module = __import__(file.stem)
    functions = [
        RewardFunction(fn=module.length),
        RewardFunction(fn=f"{file.stem}:array"),
        RewardFunction(fn=module.Constant(10.0)),
        RewardFunction(fn=functools.partial(module.matches, answer=["ab"]), name="m"),
    ]
    with RewardWorkers(functions) as workers:
        each = workers.score_each(["p"], ["ab"])
    assert {name: float(scores[0]) for name, scores in each.items()} == {
        "length": 2,
        "array": 0,
        "Constant": 10,
        "m": 1,
    }


def test_a_function_of_a_script_is_read_from_its_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from realjax.functions.score import RewardFunction, RewardWorkers\n\n"
        "def vowels(prompts, completions):\n"
        "    return [sum(x in 'aeiou' for x in c) for c in completions]\n\n"
        "if __name__ == '__main__':\n"
        "    with RewardWorkers([RewardFunction(fn=vowels)]) as workers:\n"
        "        print(workers.score(['p', 'p'], ['aei', 'xyz']).tolist())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "[3.0, 0.0]\n", done.stderr


def test_options_are_arguments_by_name(file):
    options = {"factor": 2.0, "offset": 1.0}
    found = score(file, "scaled", ["ab", ""], {"factor": [7, 7]}, options=options)
    np.testing.assert_array_equal(found[0], [5, 1])  # They win over columns.
    function = RewardFunction(fn="realjax.data.verifiers:gsm8k")
    with RewardWorkers([function]) as workers:
        found = workers.score(["?"] * 2, ["#### 4", "4"], {"answer": ["4", "4"]})
    np.testing.assert_array_equal(found, [1, 0])


def test_misspelt_options_are_refused_at_once(file):
    function = RewardFunction(fn=f"{file}:scaled", options={"faktor": 2.0})
    with pytest.raises(RewardError, match=r"no argument 'faktor'.*mean 'factor'"):
        RewardWorkers([function])
    function = RewardFunction(fn=f"{file}:length", options={"x": 2.0})
    with pytest.raises(RewardError, match=r"no argument 'x'.* none but two"):
        RewardWorkers([function])


# Failures: the run stops with the reason, or counts and goes on.


@pytest.mark.parametrize(
    "name, completions, message",
    [
        (
            "raises",
            ["a", "bb"],
            r"'raises' raised ZeroDivisionError.*line \d+, in raise",
        ),
        ("hangs", ["a", "hang"], r"'hangs' took more than timeout_seconds=0\.3"),
        ("dies", ["a", "die"], r"'dies' ended its process \(killed by SIGKILL"),
        ("quits", ["a"], r"'quits' raised SystemExit\('enough'\)"),
        ("numbers", ["1", "2", "nan"], r"returned nan for completion 2 of the batch"),
        ("numbers", ["inf"], r"returned inf for completion 0"),
        ("numbers", ["-1e39"], r"returned -1e\+39 for completion 0"),  # Not a float32.
        ("too_few", ["a", "b"], r"returned 1 scores for 2 completions"),
        ("text", ["a"], r"returned 'a', of type str, as score 0"),
        ("one_number", ["a"], r"returned 1\.0, of type float; .* list"),
        ("nothing", ["a"], r"returned None, of type NoneType, as score 0"),
        ("matches", ["a"], r"missing 1 required positional argument: 'answer'"),
    ],
)
def test_a_failure_stops_the_run_and_says_what_happened(
    file, name, completions, message
):
    with pytest.raises(RewardError, match=f"(?s){message}.*on_error='fallback'"):
        score(file, name, completions, timeout_seconds=0.3)


@pytest.mark.parametrize(
    "name, completions, scores, num_failures",
    [
        # The part of the batch that a call had.
        ("raises", ["bb", "a"], [-5, -5], 2),
        ("hangs", ["hang", "a"], [-5, -5], 2),
        ("dies", ["a", "die"], [-5, -5], 2),
        ("too_few", ["a", "b"], [-5, -5], 2),
        # Only the completions without a score.
        ("numbers", ["1", "nan", "3", "inf"], [1, -5, 3, -5], 2),
    ],
)
def test_a_fallback_score_replaces_what_is_missing_and_is_counted(
    file, name, completions, scores, num_failures, caplog
):
    options = {"on_error": "fallback", "fallback_score": -5.0, "timeout_seconds": 0.3}
    with caplog.at_level(logging.WARNING):
        found = score(file, name, completions, **options)
    np.testing.assert_array_equal(found[0], scores)
    assert found[1] == num_failures
    assert f"Reward function '{name}'" in caplog.text


@pytest.mark.parametrize("name, word", [("hangs", "hang"), ("dies", "die")])
def test_after_a_worker_was_lost_the_next_batch_is_scored(file, name, word):
    function = RewardFunction(fn=f"{file}:{name}", timeout_seconds=0.3)
    with RewardWorkers([function], num_workers=2) as workers:
        for _ in range(2):
            with pytest.raises(RewardError):
                workers.score(["p"] * 2, [word, word])
            np.testing.assert_array_equal(workers.score(["p"] * 2, ["a", "b"]), [1, 1])


def test_one_hung_part_leaves_the_other_parts_their_scores(file):
    scores, num_failures = score(
        file,
        "hangs",
        ["a", "b", "hang", "c"],
        num_workers=2,
        on_error="fallback",
        timeout_seconds=0.3,
    )
    np.testing.assert_array_equal(scores, [1, 1, 0, 0])
    assert num_failures == 2


def test_a_worker_that_ended_between_batches_is_replaced(file):
    with RewardWorkers([RewardFunction(fn=f"{file}:process")]) as workers:
        pid = int(workers.score(["p"], ["c"])[0])
        os.kill(pid, signal.SIGKILL)
        while not workers._workers[0].has_ended():
            time.sleep(0.01)
        assert workers.score(["p"], ["c"])[0] != pid


def test_memory_beyond_the_limit_is_a_failure_and_goes_with_its_worker(file):
    options = {"memory_gib": 0.25, "timeout_seconds": 60.0}
    with pytest.raises(RewardError, match=r"ran out of memory \(0\.25 GiB"):
        score(file, "hungry", ["feed"], **options)
    function = RewardFunction(
        fn=f"{file}:hungry", on_error="fallback", fallback_score=-1.0, **options
    )
    with RewardWorkers([function]) as workers:
        np.testing.assert_array_equal(workers.score(["p"] * 2, ["a", "feed"]), [-1, -1])
        assert workers.num_failures == {"hungry": 2}
        # What it kept is gone, and the next batch has all of the limit.
        np.testing.assert_array_equal(workers.score(["p"], ["a"]), [0])


# Processes.


def test_close_leaves_no_process_even_when_one_hangs(file):
    functions = [
        RewardFunction(fn=f"{file}:process"),
        RewardFunction(fn=f"{file}:hangs", timeout_seconds=0.3),
    ]
    workers = RewardWorkers(functions, num_workers=2)
    pids = [int(pid) for pid in workers.score_each(["p"] * 2, ["a", "b"])["process"]]
    with pytest.raises(RewardError):
        workers.score(["p"] * 2, ["hang", "hang"])
    processes = [worker._process for worker in workers._workers]
    workers.close()
    workers.close()  # A second time does nothing.
    assert all(process.returncode is not None for process in processes)
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize("word", ["a", "hang", "die"])
def test_what_a_function_started_ends_with_its_worker(file, tmp_path, word):
    function = RewardFunction(
        fn=f"{file}:starts", timeout_seconds=2.0, on_error="fallback"
    )
    path = tmp_path / "pid"
    with RewardWorkers([function]) as workers:
        workers.score(["p"], [word], {"pids": [str(path)]})
    deadline = time.monotonic() + 30
    while not is_gone(int(path.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert is_gone(int(path.read_text()))


def test_workers_end_when_the_parent_is_killed_even_in_a_hung_call(file):
    program = (
        "import sys, threading\n"
        "from realjax.functions.score import RewardFunction, RewardWorkers\n"
        "functions = [RewardFunction(fn=sys.argv[1] + ':hangs')]\n"
        "workers = RewardWorkers(functions, 2)\n"
        "print(*(worker._process.pid for worker in workers._workers), flush=True)\n"
        "workers.score(['p'], ['hang'])\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and not any(is_gone(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while not all(is_gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(is_gone(pid) for pid in pids)


# What cannot be imported is said before the first batch.


@pytest.mark.parametrize(
    "fn, message",
    [
        ("no_such_module_here:f", r"'f' cannot be imported from 'no_such_module_here'"),
        ("{file}:lenght", r"no 'lenght'. Did you mean 'length'\?"),
        ("{file}:FUNCTIONS", r"no 'FUNCTIONS'"),
        ("{folder}/none.py:f", r"There is no file .*none\.py"),
        ("{broken}:f", r"cannot be imported from .*broken\.py.*SyntaxError"),
    ],
)
def test_what_cannot_be_imported_is_named_at_once(file, fn, message):
    broken = file.with_name("broken.py")
    broken.write_text("def f(:\n")
    fn = fn.format(file=file, folder=file.parent, broken=broken)
    with pytest.raises(RewardError, match=f"(?s){message}"):
        RewardWorkers([RewardFunction(fn=fn)])


def test_lambdas_and_functions_of_notebooks_are_refused_with_a_way_out(monkeypatch):
    with pytest.raises(RewardError, match=r"no other process can import.*file\.py"):
        RewardWorkers([RewardFunction(fn=lambda prompts, completions: [0.0])])
    notebook = types.ModuleType("__main__")
    exec("def f(prompts, completions):\n    return [0.0]", notebook.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    with pytest.raises(RewardError, match=r"notebook.*file\.py:function"):
        RewardWorkers([RewardFunction(fn=notebook.f)])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"fn": "module.function"}, "has no colon"),
        ({"fn": "m:f", "on_error": "fall_back"}, "Did you mean 'fallback'"),
        ({"fn": "m:f", "timeout_seconds": 0.0}, "timeout_seconds is 0"),
        ({"fn": "m:f", "weight": float("nan")}, "weight is nan"),
        ({"fn": "m:f", "memory_gib": -1.0}, "memory_gib is -1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RewardFunction(**fields)


def test_bad_arguments_are_refused(file):
    function = RewardFunction(fn=f"{file}:length")
    with pytest.raises(ValueError, match="No reward function"):
        RewardWorkers([])
    with pytest.raises(ValueError, match="num_workers is 0"):
        RewardWorkers([function], 0)
    with pytest.raises(ValueError, match="different names"):
        RewardWorkers([function, function])
    with RewardWorkers([function]) as workers:
        with pytest.raises(ValueError, match="answer has 1 items for 2 completions"):
            workers.score(["p", "p"], ["a", "b"], {"answer": ["a"]})
        with pytest.raises(ValueError, match="called 'prompts'"):
            workers.score(["p"], ["a"], {"prompts": ["a"]})


def test_a_config_names_functions_by_strings_or_fields():
    function = RewardFunction(fn="package.module:exact", weight=2.0)
    assert function.name == "exact"
    assert to_dataclass(RewardFunction, config_dict(function)) == function
    assert to_dataclass(RewardFunction, "m:exact") == RewardFunction(fn="m:exact")
