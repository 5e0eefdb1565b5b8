"""Families: config fields in both spellings, and what is refused by name."""

import dataclasses

import jax
import pytest

from realjax.models.config import ModelConfig, RopeScaling
from realjax.models.families import family, llama
from realjax.models.layout import Stored
from realjax.models.transformer import Parameter, abstract_parameters

CONFIG = ModelConfig(
    vocab_size=11,
    width=6,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    max_positions=64,
    bos_id=1,
    eos_ids=(2, 3),
)
# As published with Llama 2: no head width, no key heads, no rotary fields.
OLD = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, rope_scaling=None, tie_embeddings=True, eos_ids=()),
        dataclasses.replace(CONFIG, head="scalar", pad_id=0, eos_ids=(2,)),
        dataclasses.replace(
            CONFIG, rope_scaling=RopeScaling(kind="linear", factor=2.0)
        ),
    ],
)
def test_a_config_that_is_written_reads_as_itself(config):
    assert llama.read_config(llama.write_config(config)) == config


def test_fields_that_are_missing_have_the_defaults_of_transformers():
    config = llama.read_config(OLD)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert not config.tie_embeddings
    assert config.eos_ids == (2,)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
    ],
)
def test_rotary_fields_are_read_in_each_spelling(fields):
    config = llama.read_config(OLD | fields)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == CONFIG.rope_scaling


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "'attention_bias' is True"),
        ({"mlp_bias": True}, "'mlp_bias' is True"),
        ({"attention_dropout": 0.1}, "'attention_dropout' is 0.1"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"sliding_window": 4096}, "'sliding_window'"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"head_scale": 2.0}, "'head_scale' \\(2.0\\) is not supported"),
        ({"model_type": "mistral"}, "'model_type' is 'mistral'"),
        ({"architectures": ["LlamaForTokenClassification"]}, "'architectures' is"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "type 'yarn'"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "type 'dynamic' .*default, linear, llama3",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "beta_fast": 1}},
            "'beta_fast'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'linear' lacks 'factor'"),
        (
            {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}},
            "'rope_theta' is 1.0 in one spelling and 2.0",
        ),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        (
            {"architectures": [llama.SCALAR_ARCHITECTURE], "id2label": None},
            "makes 2 labels",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        llama.read_config(OLD | fields)


@pytest.mark.parametrize("head", ("language", "scalar"))
def test_every_parameter_is_stored_with_all_its_dimensions(head):
    config = dataclasses.replace(CONFIG, head=head)
    stored = llama.stored_tensors(config)

    def check(parameter: Parameter, tensor: Stored):
        dimensions = [d for group in tensor.groups for d in group]
        is_stacked = parameter.axes[0] == "layer"
        assert sorted(dimensions) == list(range(len(parameter.shape) - is_stacked))
        assert tensor.is_stacked == is_stacked

    jax.tree.map(
        check,
        abstract_parameters(config),
        stored,
        is_leaf=lambda x: isinstance(x, Parameter),
    )


def test_a_family_is_a_module():
    assert family("llama") is llama


@pytest.mark.parametrize("name", ("phi", "..config", ""))
def test_an_unknown_family_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=r"not supported. Known families are: .*llama"):
        family(name)


def test_an_unknown_size_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"size '9b'; known sizes are: .*3\.1-8b"):
        llama.size("9b")
