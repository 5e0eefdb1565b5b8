"""What is wrong with an input is said before anything compiles, and nothing is lost.

Each row of the tables below breaks one thing of a run that is otherwise right.
"""

import json
import shutil

import pytest

from realjax.models import hf
from realjax.testing import TINY, tiny_model
from tests.runtime.small_world import (
    VOCAB_SIZE,
    make_world,
    new_role,
    other_tokenizer,
    parameters,
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


# -- the data ----------------------------------------------------------------------


def lines(*texts):
    return lambda path: path.write_text("\n".join(texts) + "\n")


@pytest.mark.parametrize(
    ("write", "texts"),
    [
        (lambda path: path.unlink(), ["config.data.path", "is not there"]),
        (lambda path: (path.unlink(), path.mkdir()), ["train.jsonl", "is a folder"]),
        (
            lines('{"prompt": "a"}', "", '{"prompt": "b"', '{"prompt": "c"}'),
            ["Line 3 of", "is not JSON", "Correct or remove it"],
        ),
        (lines('{"prompt": "a"}', "[1]"), ["Record 1 of", "is a list", "object"]),
        (
            lines('{"prompt": "a"}', '{"text": "b"}'),
            ["Record 1 (counting from 0)", "no field `prompt`", "['text']"],
        ),
        (lines('{"prompt": 7}'), ["Record 0", "`prompt` is a int"]),
        (lines('{"prompt": ""}'), ["Record 0", "its prompt is empty"]),
        (lines(""), ["has no record", "at least one"]),
        (
            lines('{"prompt": "' + "the cat " * 200 + '"}'),
            ["every prompt is longer than max_prompt_length=256", "Raise"],
        ),
        (lambda path: path.write_bytes(b'{"prompt": "\xff"}'), ["is not UTF-8"]),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) else "",
)
def test_data_that_cannot_be_read_is_refused(own, tmp_path, write, texts):
    write(own / "train.jsonl")
    found = refusal(ppo_config(own), tmp_path / "run", own)
    assert [text for text in texts if text not in found] == [], found


def test_held_out_data_is_checked_before_training_begins(own, tmp_path):
    config = ppo_config(own)
    config.data.valid_path = str(own / "valid.jsonl")
    assert "config.data.valid_path" in refusal(config, tmp_path / "run")
    (own / "valid.jsonl").write_text("{")
    assert "Line 1 of" in refusal(config, tmp_path / "run")
    config.data.valid_path, config.data.held_out = "", 20
    assert "Hold out fewer" in refusal(config, tmp_path / "run")


def test_data_of_another_kind_is_refused_with_what_the_graph_reads(own, tmp_path):
    write_lines(own / "train.jsonl", [{"prompt": "a", "answer": "b"}])
    config = ppo_config(own)
    config.data.kind = "prompt_answer"
    found = refusal(config, tmp_path / "run")
    assert (
        "config.data.kind is 'prompt_answer': Call 'rollout' reads 'prompts'" in found
    )


# -- checkpoints and tokenizers ----------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def change_fields(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("break_one", "texts"),
    [
        (lambda own: shutil.rmtree(own / "policy"), ["config.roles.policy.path"]),
        (
            lambda own: (own / "policy/tokenizer.json").unlink(),
            ["Role 'policy'", "has no tokenizer.json", "Save the fast version"],
        ),
        (
            lambda own: cut(own / "policy/tokenizer.json"),
            ["Role 'policy'", "cannot be read", "Copy its tokenizer files again"],
        ),
        (
            lambda own: (own / "policy/config.json").unlink(),
            ["Role 'policy'", "not a checkpoint", "no config.json"],
        ),
        (lambda own: cut(own / "policy/config.json"), ["Role 'policy'", "is not JSON"]),
        (
            lambda own: change_fields(own / "policy/config.json", model_type="gpt9"),
            ["Role 'policy'", "'gpt9' are not supported", "llama"],
        ),
        (
            lambda own: cut(own / "reward/model.safetensors"),
            ["Role 'reward'", "not a whole safetensors file", "copy it again"],
        ),
        (
            lambda own: (own / "reward/model.safetensors").write_bytes(b""),
            ["Role 'reward'", "not a whole safetensors file"],
        ),
        (
            lambda own: (own / "reward/model.safetensors").unlink(),
            ["Role 'reward'", "holds neither model.safetensors nor"],
        ),
        (
            lambda own: change_fields(own / "policy/config.json", num_hidden_layers=3),
            ["Role 'policy'", "lacks 9 of", "'model.layers.2."],
        ),
        (
            lambda own: change_fields(own / "policy/config.json", num_hidden_layers=1),
            ["Role 'policy'", "holds 9 tensors that a model of its config does not"],
        ),
        (
            lambda own: change_fields(own / "policy/config.json", vocab_size=400),
            ["Role 'policy'", "(300, 32)", "needs (400, 32)"],
        ),
        (
            lambda own: other_tokenizer().save(own / "reward"),
            ["have different tokenizers", "one tokenizer"],
        ),
    ],
    ids=lambda value: value[-1][:30] if isinstance(value, list) else "",
)
def test_a_checkpoint_that_cannot_be_read_is_refused(own, tmp_path, break_one, texts):
    break_one(own)
    found = refusal(ppo_config(own), tmp_path / "run", own)
    assert [text for text in texts if text not in found] == [], found


def test_a_reward_model_cannot_be_the_policy(world, tmp_path):
    config = ppo_config(world)
    config.paths.policy = config.paths.reward
    found = refusal(config, tmp_path / "run")
    assert "Role 'policy'" in found and "scalar head" in found


def test_a_language_model_cannot_score_without_being_trained_to(world, tmp_path):
    config = ppo_config(world)
    config.paths.reward = config.paths.policy
    found = refusal(config, tmp_path / "run")
    assert "Role 'reward'" in found and "random head" in found


def test_a_model_smaller_than_the_vocabulary_of_its_tokenizer_is_refused(own, tmp_path):
    config = tiny_model(VOCAB_SIZE - 1)
    hf.save(own / "small", config, parameters(config))
    changed = ppo_config(own)
    changed.paths.policy = str(own / "small")
    changed.roles.policy.tokenizer = str(own / "policy")
    changed.roles.reference.tokenizer = str(own / "policy")
    found = refusal(changed, tmp_path / "run")
    assert "vocabulary of 299 and its tokenizer one of 300" in found


def test_a_new_model_needs_a_tokenizer_and_sizes(world, tmp_path):
    config = ppo_config(world)
    new_role(config, world, "policy", widht=8)
    assert "config.roles.policy.model.widht" in refusal(config, tmp_path / "run")
    new_role(config, world, "policy", num_heads=3)
    assert "3 query heads do not split" in refusal(config, tmp_path / "run")
    config.roles.policy.tokenizer = ""
    found = refusal(config, tmp_path / "run")
    assert "config.roles.policy.path" in found and "config.roles.policy.tok" in found


# -- the plan ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (set_field("allocation", "d9"), ["there are 8 devices (0 to 7)"]),
        (set_field("allocation", "d2@6-8"), ["names 3"]),
        (set_field("allocation", "x2"), ["unknown letter 'x'", "d (data)"]),
        (
            set_field("allocation", "s2"),
            ["Call 'rollout' generates", "has 2 stages", "at every token"],
        ),
        (
            set_field("allocations.value", "e2@0-1"),
            ["Call 'value', role 'critic'", "splits experts over 2 parts"],
        ),
        (
            set_field("allocations.value", "t8"),
            ["Call 'value', role 'critic'", "tensor=8 does not divide num_heads=4"],
        ),
        (
            set_field("allocations.rollout", "f3"),
            ["Call 'rollout', role 'policy'", "fsdp=3 does not divide width=32"],
        ),
        (
            set_field("hp.minibatches", 5),
            ["Call 'train_policy' makes 5 minibatches of 4", "config.hp.minibatches"],
        ),
        (
            set_field("hp.sampling.max_new_tokens", 300),
            ["'policy' was made for 256", "config.hp.sampling.max_new_tokens"],
        ),
    ],
    ids=lambda value: value[-1][:30] if isinstance(value, list) else "",
)
def test_a_plan_that_does_not_fit_is_refused(world, tmp_path, change, texts):
    config = ppo_config(world)
    change(config)
    found = refusal(config, tmp_path / "run")
    assert [text for text in texts if text not in found] == [], found


def test_a_router_of_a_model_without_experts_is_refused(world, tmp_path):
    config = ppo_config(world)
    config.roles.policy.router.capacity_factor = 1.5
    found = refusal(config, tmp_path / "run")
    assert "Role 'policy'" in found
    assert "has no experts" in found


def test_a_policy_does_not_train_without_the_tokens_it_sampled_with(world, tmp_path):
    config = ppo_config(world)
    config.roles.policy.path = ""
    config.roles.policy.tokenizer = str(world / "policy")
    experts = {"num_experts": 4, "top_k": 2, "capacity_factor": 1.25}
    config.roles.policy.model = TINY | {"moe": experts}
    found = refusal(config, tmp_path / "run")
    assert "Role 'policy': it generates" in found
    assert "Set router.capacity_factor to 0" in found


def test_completions_per_prompt_count_among_the_minibatches(world, tmp_path):
    config = ppo_config(world)
    config.hp.completions_per_prompt, config.hp.minibatches = 2, 9
    assert "9 minibatches of 8 sequences" in refusal(config, tmp_path / "run")


# -- stages ------------------------------------------------------------------------


def stages(world):
    """Two runs in a row, of which the second has something wrong."""
    one = ppo_config(world)
    paths = one.paths
    del one.paths
    two = one.copy_and_resolve_references()
    return {"stages": ("one", "two"), "paths": paths, "one": one, "two": two}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_field("hp.value_loss", "msee"), "config.hp.value_loss"),
        (set_field("allocation", "d9"), "there are 8 devices"),
        (set_field("data.path", "nowhere.jsonl"), "config.two.data.path"),
        (set_field("roles.critic.path", "nowhere"), "config.two.roles.critic.path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_last_stage_is_checked_before_the_first_runs(world, tmp_path, change, text):
    config = stages(world)
    change(config["two"])
    config = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in config.items()}
    assert text in refusal(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_that_is_not_there_is_named(world, tmp_path):
    config = stages(world)
    assert "config.tow is none of the stages" in refusal(
        config | {"tow": {}}, tmp_path / "run"
    )
    config["stages"] = ("one", "two", "three")
    assert "no config.three" in refusal(config, tmp_path / "run")
