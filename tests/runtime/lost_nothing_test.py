"""A run that cannot go on, or may not begin, leaves what there is as it was.

Reward functions stand in files that the tests change between two starts of the same
command, as a person would who mends one.
"""

import json
import os
import pathlib
import shutil

import pytest

from realjax.core.config import to_dataclass
from realjax.core.metrics import read_metrics
from realjax.functions.score import RewardError, RewardFunction
from realjax.runtime.checkpoint import Checkpointer, MismatchedCheckpointError
from realjax.runtime.run import prepare
from realjax.runtime.run_config import RunConfig
from realjax.runtime.workdir import WorkdirError, claim_workdir
from tests.runtime.small_runs import (
    check_same_arrays,
    check_same_metrics,
    saved_arrays,
)
from tests.runtime.small_world import (
    contents,
    make_world,
    ppo_config,
    refusal,
    sft_config,
    train,
)

GOOD = """
def score(prompts, completions):
    return [float(len(text)) for text in completions]
"""
# The first batch scores well; later ones, told by a file beside, do not.
BROKEN = """
import pathlib, time
def score(prompts, completions):
    seen = pathlib.Path(__file__).with_suffix(".seen")
    if not seen.exists():
        seen.touch()
        return [1.0] * len(prompts)
    {}
"""
FAULTS = {
    "raises": ("raise KeyError('no such word')", "raised KeyError('no such word')"),
    "hangs": ("time.sleep(600)", "took more than timeout_seconds=1"),
    "nan": ("return [float('nan')] * len(prompts)", "returned nan for completion 0"),
    "count": ("return [1.0]", "returned 1 scores for 4 completions"),
    "type": ("return None", "returned None, of type NoneType"),
    "memory": ("x = [bytes(1 << 24) for _ in range(99)]", "ran out of memory (0.5 GiB"),
    "exits": ("import os; os._exit(3)", "ended its process (exit code 3)"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def rewarded_config(world, file: pathlib.Path):
    """PPO by a function of the text, on one device, that saves at every step."""
    config = ppo_config(world)
    del config.roles.reward
    config.roles.critic.path = config.roles.policy.path
    with config.hp.ignore_type():
        fn = f"{file}:score"
        limits = {"timeout_seconds": 1.0, "memory_gib": 0.5}
        config.hp.rewards = ({"fn": fn, **limits},)
    config.checkpoint.every_steps = 1
    config.evaluation.at_start = config.evaluation.at_end = False
    return config


def child_processes() -> set[int]:
    children = pathlib.Path("/proc/self/task").glob("*/children")
    return {int(pid) for file in children for pid in file.read_text().split()}


def break_off(config, workdir) -> str:
    """Runs until the reward function's fault; checks that no process is left."""
    before = child_processes()
    with pytest.raises(RewardError) as caught:
        train(config, workdir)
    assert child_processes() <= before
    return str(caught.value)


def check_step(workdir, step):
    """The last checkpoint is that of a step, and whole."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as found:
        assert found.steps()[-1] == step
        assert found.latest_step() == step
    assert read_metrics(workdir / "metrics.jsonl")["step"].tolist()[-1] == step


def test_ppo_stops_at_a_broken_reward_function_and_goes_on_once_it_is_mended(
    world, tmp_path
):
    file, workdir = tmp_path / "mine.py", tmp_path / "run"
    config = rewarded_config(world, file)
    fault, message = FAULTS["raises"]
    file.write_text(BROKEN.format(fault))
    config.checkpoint.every_steps = 0
    found = break_off(config, workdir)
    assert f"Reward function 'score' {message}" in found and "on_error" in found
    check_step(workdir, 1)
    file.write_text(GOOD)
    result = train(config, workdir)
    assert result.is_finished and result.metrics["step"].tolist() == [1, 2]
    check_step(workdir, 2)


# Scores by length, but for one call, as long as a file lies beside it.
FLAKY = """
import pathlib
def score(prompts, completions):
    path = pathlib.Path(__file__)
    calls, broken = path.with_suffix(".calls"), path.with_suffix(".broken")
    number = int(calls.read_text()) + 1 if calls.exists() else 1
    if number == 3 and broken.exists():
        raise KeyError("no such word")
    calls.write_text(str(number))
    return [float(len(text)) for text in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_what_was_learned_since_the_last_checkpoint_is_saved(
    world, tmp_path, staleness
):
    workdirs = {}
    for name in ("whole", "broken"):
        file, workdir = tmp_path / f"{name}.py", tmp_path / name
        file.write_text(FLAKY)
        config = rewarded_config(world, file)
        config.steps, config.checkpoint.every_steps = 4, 0
        config.hp.staleness = staleness
        if name == "broken":
            file.with_suffix(".broken").touch()
            break_off(config, workdir)
            check_step(workdir, 2)  # Nothing was due, and yet.
            file.with_suffix(".broken").unlink()
        assert train(config, workdir).is_finished
        workdirs[name] = workdir
    found, wanted = (workdirs[name] for name in ("broken", "whole"))
    check_same_metrics(found, wanted)
    check_same_arrays(saved_arrays(found, 4), saved_arrays(wanted, 4))


@pytest.mark.parametrize("num_steps", [pytest.param(4, marks=pytest.mark.slow), 3])
def test_what_was_learned_is_saved_if_a_reward_of_the_evaluation_fails(
    world, tmp_path, num_steps
):
    (tmp_path / "good.py").write_text(GOOD)
    workdirs = {}
    for name in ("whole", "broken"):
        file, workdir = tmp_path / f"{name}.py", tmp_path / name
        file.write_text(FLAKY)
        config = rewarded_config(world, tmp_path / "good.py")
        config.steps, config.checkpoint.every_steps = num_steps, 0
        config.data.held_out = 3
        config.evaluation.every_steps, config.evaluation.at_end = 1, True
        config.evaluation.rewards = ({"fn": f"{file}:score"},)
        if name == "broken":
            file.with_suffix(".broken").touch()
            break_off(config, workdir)  # After the third step; of 3 it is the last.
            check_step(workdir, 3)
            with pytest.raises(RewardError):
                train(config, workdir)  # It is not mended yet.
            file.with_suffix(".broken").unlink()
        assert train(config, workdir).is_finished
        workdirs[name] = workdir
    found, wanted = (workdirs[name] for name in ("broken", "whole"))
    check_same_metrics(found, wanted)
    check_same_arrays(*(saved_arrays(one, num_steps) for one in (found, wanted)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hangs", "nan", "count", "type", "memory", "exits"])
def test_ppo_stops_at_each_fault_of_a_reward_function(world, tmp_path, name):
    file, workdir = tmp_path / "mine.py", tmp_path / "run"
    fault, message = FAULTS[name]
    file.write_text(BROKEN.format(fault))
    assert message in break_off(rewarded_config(world, file), workdir)
    check_step(workdir, 1)


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        ("nowhere.py:score", "There is no file"),
        ("realjax.data.verifiers:exact_anser", "Did you mean 'exact_answer'"),
        ("no_such_package.rewards:score", "cannot be imported from"),
    ],
)
def test_a_reward_function_that_cannot_be_imported_is_refused(
    world, tmp_path, fn, text
):
    config = rewarded_config(world, tmp_path / "mine.py")
    config.hp.rewards[0]["fn"] = fn
    found = refusal(config, tmp_path / "run")
    assert found.startswith("RewardError") and text in found


def test_a_reward_function_without_a_colon_is_refused(world, tmp_path):
    config = rewarded_config(world, tmp_path / "mine.py")
    config.hp.rewards[0]["fn"] = "mine"
    assert "fn='mine' has no colon" in refusal(config, tmp_path / "run")


def test_rewards_of_the_evaluation_are_imported_before_the_first_step(world, tmp_path):
    config = ppo_config(world)
    config.evaluation.rewards = ({"fn": "nowhere.py:score"},)
    assert "There is no file" in refusal(config, tmp_path / "run")


def scored(prompts, completions):
    return [0.0] * len(completions)


def test_a_run_with_a_function_is_the_same_run_in_the_next_process(world):
    # The text of a function holds an address, which differs from process to process.
    reward = RewardFunction(fn=scored)
    config = rewarded_config(world, pathlib.Path("mine.py")).to_dict()
    config["hp"]["rewards"], config["paths"] = (reward,), None
    del config["paths"]
    for role in config["roles"].values():
        role["path"] = str(world / "policy")
    found = prepare(to_dataclass(RunConfig, config)).fingerprint()["hp"]
    assert found["rewards"][0]["fn"] == f"{__name__}:scored"
    assert found["kl"]["coef"] == 0.1
    assert found == json.loads(json.dumps(found))


# -- folders -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The folder of a run that is done; one before it had saved nothing."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    claim_workdir(workdir, {"seed": 7}).close()
    train(sft_config(world), workdir)
    return workdir


def test_a_finished_run_is_not_mixed_with_another_model(world, finished):
    config = sft_config(world, mlp_width=32)
    found = refusal(config, finished, finished)
    assert "holds another run" in found
    assert "models.policy.mlp_width was 64 and is 32 now" in found


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("seed", 1, "seed was 0 and is 1 now"),
        ("roles.policy.model.num_layers", 3, "models.policy.num_layers was 2 and is 3"),
    ],
)
def test_a_finished_run_is_not_mixed_with_other_settings(
    world, finished, field, value, text
):
    config = sft_config(world)
    config.update_from_flattened_dict({field: value})
    found = refusal(config, finished, finished)
    assert found.startswith("WorkdirError") and text in found
    assert "Use another work folder, or the earlier config" in found


def test_a_checkpoint_of_another_model_is_not_restored(world, finished, tmp_path):
    # The checkpoints were copied into the folder of a new run.
    workdir = tmp_path / "run"
    shutil.copytree(finished / "checkpoints", workdir / "checkpoints")
    before = contents(workdir / "checkpoints")
    with pytest.raises(MismatchedCheckpointError) as caught:
        train(sft_config(world, mlp_width=32), workdir)
    assert "mlp" in str(caught.value) and "[2, 32, 64]" in str(caught.value)
    assert contents(workdir / "checkpoints") == before
    claim_workdir(workdir, {}, has_begun=lambda: False).close()  # It was given back.


def test_a_run_takes_over_a_folder_in_which_nothing_was_saved(finished):
    assert json.loads((finished / "run.json").read_text())["seed"] == 0


def test_two_processes_do_not_share_a_folder(world, tmp_path):
    workdir = tmp_path / "run"
    with claim_workdir(workdir, {}):
        with pytest.raises(WorkdirError, match=f"in use by process {os.getpid()} "):
            claim_workdir(workdir, {})
        found = refusal(sft_config(world), workdir)
    assert found.startswith("WorkdirError") and "use another work folder" in found


@pytest.mark.parametrize("name", ["run", "run/below"])
def test_a_file_in_the_place_of_the_folder_is_refused(world, tmp_path, name):
    (tmp_path / "run").write_text("mine")
    found = refusal(sft_config(world), tmp_path / name, world)
    assert "run is a file; a run needs a folder" in found
    config = sft_config(world)
    config.corpus = "reviews"
    assert "run is a file" in refusal(config, tmp_path / name)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(world):
    # Nobody can make a folder there, the superuser included.
    workdir = pathlib.Path("/proc/self/fdinfo/run")
    found = refusal(sft_config(world), workdir)
    assert found.startswith("WorkdirError") and "cannot be written" in found


def test_a_corpus_of_other_data_is_not_overwritten(world, tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "mine.txt").write_text("mine")
    config = sft_config(world)
    config.corpus = "reviews"
    assert "data" in refusal(config, tmp_path / "run")


def test_a_tokenizer_of_another_size_is_not_trained_over_the_first(world, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(world / "policy", workdir / "tokenizer")
    config = sft_config(world)
    config.new_tokenizer = 400
    found = refusal(config, workdir)
    assert "config.new_tokenizer is 400" in found and "a vocabulary of 300" in found
