"""What is wrong with an input is said before anything compiles, and nothing is lost.

Each row of the tables below breaks one thing of a run that is otherwise right.
"""

import dataclasses
import json
import shutil

import pytest

from realjax.models import hf
from realjax.testing import tiny_model, tiny_parameters
from tests.runtime.small_world import (
    VOCAB_SIZE,
    make_world,
    new_role,
    other_tokenizer,
    ppo_config,
    refusal,
    write_lines,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own(world, tmp_path):
    """A copy of the world, to be broken."""
    return shutil.copytree(world, tmp_path / "world")


# -- the config --------------------------------------------------------------------


def set_field(path, value):
    def change(config):
        *parents, name = path.split(".")
        for parent in parents:
            config = config[parent]
        with config.ignore_type():
            config[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        # A name.
        (set_field("hp.kl_coef", 1.0), ["config.hp.kl_coef", "PPO has no field"]),
        (set_field("hp.kl.cof", 1.0), ["config.hp.kl.cof", "mean 'coef'"]),
        (set_field("stepz", 1), ["config.stepz", "mean 'steps'"]),
        (set_field("roles", {"polcy": {}}), ["the role 'policy'", "has polcy"]),
        (set_field("allocations.rolout", "d1"), ["'rolout'", "mean 'rollout'"]),
        (set_field("rows.train_polcy", 2), ["'train_polcy'", "mean 'train_policy'"]),
        # A choice.
        (set_field("algorithm", "pop"), ["no algorithm 'pop'", "mean 'ppo'"]),
        (set_field("algorithm", "json.tool"), ["'json.tool' has no `graph`"]),
        (set_field("corpus", "review"), ["corpus='review'", "reviews"]),
        (set_field("hp.value_loss", "msee"), ["config.hp.value_loss", "mean 'mse'"]),
        (set_field("hp.value_norm", "expp"), ["config.hp.value_norm", "mean 'exp'"]),
        (
            set_field("hp.score.truncated", "zer"),
            ["config.hp.score", "'zero' or a num"],
        ),
        (
            set_field("roles.policy.optimizer.schedule", "cosin"),
            ["config.roles.policy.optimizer", "mean 'cosine'"],
        ),
        (
            set_field("roles.policy.dtype", "float23"),
            ["config.roles.policy: dtype='float23'", "mean 'float32'"],
        ),
        (set_field("roles.critic.remat", "blok"), ["remat='blok'", "mean 'block'"]),
        (set_field("data.kind", "prompt"), ["config.data", "'prompts'"]),
        (set_field("data.kind", "pairs"), ["cannot be read as 'pairs'"]),
        (set_field("data.overlong", "cut"), ["config.data", "'truncate'"]),
        # A type.
        (set_field("steps", "abc"), ["config.steps is 'abc'", "it needs int"]),
        (set_field("steps", 2.5), ["config.steps is 2.5", "it needs int"]),
        (set_field("data.batch_size", None), ["config.data.batch_size is None"]),
        (set_field("roles.policy", 3), ["config.roles.policy is 3"]),
        (set_field("hp.rewards", "a:b"), ["config.hp.rewards is 'a:b'", "tuple"]),
        # A number.
        (set_field("steps", -1), ["config: steps is -1", "at least 0"]),
        (set_field("epochs", 0), ["config: epochs is 0", "at least 1"]),
        (set_field("profile_steps", "3-5"), ["profile_steps is '3-5'", "'3:5'"]),
        (set_field("rows.rollout", -2), ["rows.rollout is -2"]),
        (set_field("evaluation.num_samples", -1), ["num_samples is -1"]),
        (set_field("checkpoint.keep", 0), ["config.checkpoint: keep is 0"]),
        (set_field("data.batch_size", 0), ["`batch_size` is 0"]),
        (set_field("hp.minibatches", 0), ["minibatches is 0", "at least 1"]),
        (set_field("hp.completions_per_prompt", 0), ["completions_per_prompt is 0"]),
        (set_field("hp.kl.horizon", 0.0), ["config.hp.kl: horizon is 0.0"]),
        (set_field("hp.score.clip", 0.0), ["config.hp.score: clip is 0.0"]),
        (set_field("hp.sampling.top_p", 1.5), ["config.hp.sampling: top_p is 1.5"]),
        (set_field("roles.policy.optimizer.beta1", 1.0), ["beta1=1.0"]),
        # What is not set, or not installed.
        (set_field("paths.policy", ""), ["config.paths.policy is not set"]),
        (set_field("data.kind", ""), ["`data.kind` is empty"]),
        (set_field("data.path", ""), ["`data.path` is empty"]),
        (set_field("wandb_project", "mine"), ["`wandb` is not installed"]),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) else "",
)
def test_a_config_that_cannot_be_meant_is_refused(world, tmp_path, change, texts):
    config = ppo_config(world)
    change(config)
    found = refusal(config, tmp_path / "run", world)
    assert [text for text in texts if text not in found] == [], found
    assert not (tmp_path / "run").exists()
