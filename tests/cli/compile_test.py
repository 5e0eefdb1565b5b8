"""Tests of `realjax/cli/compile.py` that need no compiler for CUDA.

A machine's own devices stand in for described ones: what is made for them, and not
what a GPU's compiler says of it, is tested here. `tests/gpu_compile_test.py` compiles.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.testing import aot
from realjax.cli import compile as cli
from realjax.functions.role import LoraConfig
from realjax.models.config import ModelConfig
from realjax.models.parameters import LORA, divide
from realjax.runtime.confirming import cluster_of
from realjax.runtime.described import described_programs
from realjax.runtime.planning import described_plan
from realjax.runtime.recipe import load_config
from realjax.testing import TINY


def tiny(**overrides):
    """Return the 8B config with a model of a few thousand parameters."""
    values = load_config("configs/compile_llama_8b.py").to_dict()
    for role in values["roles"].values():
        role["model"] = dict(TINY, vocab_size=250, eos_ids=(1,))
    values["data"] |= {"max_prompt_length": 8, "batch_size": 16}
    values["hp"]["sampling"]["max_new_tokens"] = 8
    values["rows"] = dict.fromkeys(values["rows"], 8)
    return cli.run_config(values | overrides)


def described(config, calls=()):
    """Go over the programs of the plan that the config gives."""
    machine = virtual_devices()
    plan = described_plan(config, cluster_of(machine))
    return described_programs(config, machine, plan, calls)


def virtual_devices() -> aot.Machine:
    return aot.Machine("cpux8", tuple(jax.devices()))


def test_the_llama_8b_config_has_eight_billion_parameters():
    role = load_config("configs/compile_llama_8b.py").to_dict()["roles"]["policy"]
    model = ModelConfig(**{**role["model"], "rope_scaling": None})
    assert model.num_parameters == 8_030_261_248


def test_every_call_gets_its_programs_and_the_batch_follows_the_graph():
    parts = list(described(tiny(allocation="f4t2")))
    assert [(part.call, part.name) for part in parts] == [
        ("rollout", "prefill"),
        ("rollout", "decode"),
        ("reward", "fill"),
        ("reference", "fill"),
        ("value", "fill"),
        ("train_policy", "accumulate"),
        ("train_policy", "apply"),
        ("train_critic", "accumulate"),
        ("train_critic", "apply"),
    ]
    train = next(part for part in parts if part.call == "train_policy")
    # Advantages come from a transform of what the calls before it wrote.
    batch = train.arguments[2]
    assert batch["advantages"].shape == (16, 16)
    assert batch["tokens"].dtype == jnp.int32
    masters = jax.tree.leaves(train.arguments[0])
    assert {leaf.dtype for leaf in masters} == {jnp.dtype("float32")}
    reference = next(part for part in parts if part.call == "reference")
    stored = jax.tree.leaves(reference.arguments[0])
    assert {leaf.dtype for leaf in stored} == {jnp.dtype("bfloat16")}


def test_programs_of_adapters_take_them_beside_a_narrow_base():
    config = tiny(allocation="f4t2")
    policy = dataclasses.replace(
        config.roles["policy"], lora=LoraConfig(rank=2, dropout=0.1)
    )
    config = dataclasses.replace(config, roles=config.roles | {"policy": policy})
    parts = list(described(config, ("rollout", "train_policy")))
    accumulate, apply = parts[-2:]
    trained, base = divide(accumulate.arguments[0], LORA)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    assert jax.tree.structure(accumulate.arguments[1][0]) == (
        jax.tree.structure(trained)
    )
    assert jax.tree.structure(apply.arguments[0].parameters) == (
        jax.tree.structure(trained)
    )
    accumulate.function.lower(*accumulate.arguments)
    apply.function.lower(*apply.arguments)


def test_the_programs_are_those_that_the_devices_run():
    (fill,) = described(tiny(allocation="d4t2"), ("reference",))
    compiled = fill.function.lower(*fill.arguments).compile()
    assert compiled.memory_analysis().argument_size_in_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["f4t2", "s2f4"])
def test_all_programs_lower(strategy):
    rollout = {"rollout": "f4t2"}  # Stages do not generate.
    config = tiny(allocation=strategy, allocations=rollout)
    for part in described(config):
        part.function.lower(*part.arguments)


def test_a_call_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"'train' is no call of a role.*train_policy"):
        list(described(tiny(), ("train",)))


def test_a_model_of_unknown_vocabulary_is_refused():
    values = load_config("configs/ppo.py:debug").to_dict()
    with pytest.raises(ValueError, match="has no path, and its model no vocab_size"):
        list(described(cli.run_config(values)))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--for=h200x3", "none of the described devices"),
        ("--for=tpu", "none of the described devices"),
    ],
)
def test_devices_that_are_not_described_end_with_a_message(capsys, flag, message):
    config = "--config=configs/compile_llama_8b.py"
    assert cli.command([config, flag]) == 2
    assert message in capsys.readouterr().err


def test_json_holds_every_program_with_its_bytes():
    (part,) = described(tiny(allocation="d8"), ("reference",))
    report = aot.Report(
        argument_bytes=1,
        output_bytes=2,
        alias_bytes=2,
        temporary_bytes=2**30,
        peak_bytes=5,
        seconds=1.0,
        collectives=(),
        arrays=(),
    )
    cli.print_table(virtual_devices(), [(part, report)])
    found = cli.as_dict(virtual_devices(), [(part, report)])
    assert found["for"] == "cpux8"
    (program,) = found["programs"]
    assert program["call"] == "reference"
    assert program["allocation"] == "d8@0-7"
    assert program["temporary_bytes"] == 2**30
