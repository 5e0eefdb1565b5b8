"""The command that trains: flags, messages, exit status."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from realjax.algorithms.ppo import PPO
from realjax.cli.train import command, declare
from realjax.core.config import to_dataclass
from realjax.functions import RewardFunction
from realjax.runtime.workdir import claim_workdir
from tests.runtime.small_world import (
    contents,
    make_world,
    nothing_compiles,
    write_lines,
)

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns its one message, of status 2."""
    monkeypatch.chdir(tmp_path)

    def refused(*arguments, writes=()):
        with nothing_compiles():
            assert command(arguments) == 2
        found = capsys.readouterr()
        assert found.err.startswith("error: ") and "Traceback" not in found.err
        assert found.out == ""
        assert set(contents(tmp_path)) <= {str(tmp_path / name) for name in writes}
        return found.err

    return refused


def sft_arguments(world, *more):
    """A step of configs/sft.py on one device, from the world's policy."""
    return (
        "--config=sft.py",
        f"--config.paths.model={world / 'policy'}",
        f"--config.paths.data={world}",
        f"--config.data.path={world / 'answers.jsonl'}",
        "--config.data.valid_path=",
        "--config.data.batch_size=4",
        "--config.allocation=d1",
        "--config.steps=1",
        "--config.tensorboard=False",
        *more,
    )


# -- flags -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--config is missing, as in --config=configs/quickstart.py"),
        (["--confg=ppo.py"], "There is no flag --confg. Did you mean 'config'?"),
        (["--config=ppo.py", "--workdri=x"], "Did you mean 'workdir'?"),
        (["ppo.py"], "'ppo.py' is no flag. Write --name=value"),
        (["--config"], "--config has no value"),
        (["--config=pppo.py"], "no config 'pppo.py'. Did you mean 'ppo.py'? Shipped:"),
        (["--config=ppo.py:debg"], "variant='debg' is not one of '', 'debug'"),
        (["--config=sft.py:debg"], "Did you mean 'debug'?"),
        (["--config=reward_model.py:debg"], "Did you mean 'debug'?"),
        (["--config=quickstart.py:debg"], "Did you mean 'debug'?"),
        (["--config=gsm8k_ppo.py:exat"], "Did you mean 'exact'?"),
        (["--config=gsm8k_sft.py:debg"], "Did you mean 'debug'?"),
        (["--config=gsm8k_reward_model.py:debg"], "Did you mean 'debug'?"),
        (
            ["--config=ppo.py:debug", "--config.hp.kl.cof=1"],
            "kl.cof=1: config.hp.kl has no field 'cof'. Did you mean 'coef'?",
        ),
        (
            ["--config=ppo.py:debug", "--config.stepz", "3"],
            "config has no field 'stepz'. Did you mean 'steps'?",
        ),
        (
            ["--config=ppo.py:debug", "--noconfig.tensorbord"],
            "Did you mean 'tensorboard'?",
        ),
        (
            ["--config=ppo.py:debug", "--config.steps.now=1"],
            "config.steps is 3 and has no fields",
        ),
        (
            ["--config=ppo.py:debug", "--config.hp.rewards[0].fn=mine:score"],
            "A flag names no field of the config: tuple index out of range",
        ),
        (
            ["--config=ppo.py:debug", "--config.steps=abc"],
            "--config.steps=abc: a value of type int is needed",
        ),
        (
            ["--config=ppo.py:debug", "--config.hp.discount=high"],
            "--config.hp.discount=high: a value of type float is needed",
        ),
        (
            ["--config=ppo.py:debug", "--config.hp.shuffle=maybe"],
            "--config.hp.shuffle=maybe: a value of type bool is needed",
        ),
        (
            ["--config=ppo.py:debug", "--config.hp.value_loss=msee"],
            "config.hp.value_loss='msee' is not one of 'mse', 'huber'. Did you mean",
        ),
        (
            ["--config=ppo.py"],
            "config.paths.data is not set: --config.paths.data=FOLDER",
        ),
        (
            ["--config=quickstart.py", "--config.ppo.allocations.rollout=d4x2"],
            "Allocation 'd4x2': unknown letter 'x'",
        ),
    ],
)
def test_a_flag_that_cannot_be_meant_is_answered_with_what_can(
    refused, arguments, text
):
    assert text in refused(*arguments)


def test_a_missing_file_is_one_message(refused, world):
    found = refused(*sft_arguments(world, "--config.data.path=nowhere.jsonl"))
    assert "config.data.path is 'nowhere.jsonl', which is not there" in found


def test_the_file_of_a_config_may_be_ones_own(refused, tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\n")
    found = refused("--config=mine.py", writes=["mine.py"])
    assert "mine.py has no function get_config" in found


def test_a_mistake_in_ones_own_config_shows_where_it_is(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(variant):\n    return 1 + ''\n")
    with pytest.raises(TypeError) as caught:
        command([f"--config={tmp_path / 'mine.py'}"])
    assert caught.traceback[-1].path.name == "mine.py"


def test_the_environment_can_ask_for_the_traceback(monkeypatch):
    monkeypatch.setenv("REALJAX_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="no config"):
        command(["--config=pppo.py"])


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_names_every_flag_and_reads_nothing(capsys, flag):
    assert command(["--config=nowhere.py", flag]) == 0
    found = capsys.readouterr().out
    assert "python -m realjax.cli.train --config=configs/ppo.py" in found
    assert "--config  Config file" in found and "--workdir  Folder" in found


# -- a run -------------------------------------------------------------------------


def test_a_run_ends_with_status_0_and_its_folder_is_named_by_its_config(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert command(sft_arguments(world)) == 0
    folder = tmp_path / "runs" / "sft"
    assert (folder / "export" / "policy" / "model.safetensors").exists()
    assert "step 1/1" in capsys.readouterr().out
    # The same folder with other data is refused, and keeps its run.
    before = contents(folder)
    write_lines(tmp_path / "other.jsonl", [{"prompt": "a", "answer": "b"}])
    arguments = sft_arguments(world, "--config.data.path=other.jsonl")
    assert command([*arguments, "--workdir", str(folder)]) == 2
    assert "holds another run:\n  data was" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_second_process_is_refused_from_any_folder(world, tmp_path):
    with claim_workdir(tmp_path / "run", {}):
        result = subprocess.run(
            [
                *(sys.executable, "-m", "realjax.cli.train"),
                *sft_arguments(world, f"--workdir={tmp_path / 'run'}"),
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 2, result.stderr
    assert f"is in use by process {os.getpid()} on" in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_fields_of_every_type_are_changed_by_flags():
    values = flags.FlagValues()
    arguments = [
        "--config=ppo.py:debug",
        "--config.steps=7",
        "--config.hp.kl.coef=1",
        "--config.hp.value_loss=huber",
        "--config.hp.score.truncated=-1.5",
        "--config.hp.rewards=a.b:c",
        "--config.data.length_buckets=(8,16)",
        "--noconfig.tensorboard",
        "--config.roles.policy.model.width",
        "64",
        "--config.steps=8",
        "--workdir=here",
    ]
    values(["", *declare(values, arguments)])
    config = values.config
    hp = to_dataclass(PPO, config.hp)
    assert (config.steps, config.tensorboard) == (8, False)
    assert (hp.kl.coef, hp.value_loss, hp.score.truncated) == (1.0, "huber", -1.5)
    assert hp.rewards == (RewardFunction(fn="a.b:c"),)
    assert config.data.length_buckets == (8, 16)
    assert config.roles.policy.model.width == 64
    assert values.workdir == "here"
