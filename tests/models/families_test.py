"""Families: config fields in every spelling, and what is refused by name."""

import dataclasses
import json
import math
import sys
import types

import jax
import pytest

from realjax.models.checkpoint_config import read_config
from realjax.models.config import ModelConfig, MoEConfig, RopeScaling
from realjax.models.families import family, llama
from realjax.models.layout import Stored
from realjax.models.transformer import Parameter, abstract_parameters
from tests.parity.make_exports import CONFIGS, FAMILIES, FAMILY_CONFIGS

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
SIZES = {
    **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
# The least that a config of each family has to say.
LEAST = {
    "gpt2": {
        **{"vocab_size": 100, "n_embd": 32, "n_layer": 4, "n_head": 4},
        "n_positions": 64,
    },
    "llama": SIZES,
    "mistral": SIZES,
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": SIZES,
    "qwen3": SIZES,
    "qwen3_moe": SIZES | EXPERTS,
    "gemma": SIZES,
    "gemma2": SIZES,
    "gemma3_text": SIZES,
}
ALL_CONFIGS = CONFIGS | FAMILY_CONFIGS


def read(name, **fields):
    """Read the least a family needs, and what the test adds."""
    return family(name).read_config({"model_type": name} | LEAST[name] | fields)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, rope_scaling=None, tie_embeddings=True, eos_ids=()),
        dataclasses.replace(CONFIG, head="scalar", pad_id=0, eos_ids=(2,)),
        *ALL_CONFIGS.values(),
    ],
)
def test_a_config_that_is_written_reads_as_itself(config):
    module = family(config.family)
    # Through a file, as it is meant to be.
    fields = json.loads(json.dumps(module.write_config(config)))
    assert module.read_config(fields) == config


def test_fields_that_are_missing_have_the_defaults_of_transformers():
    config = llama.read_config(OLD)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert not config.tie_embeddings
    assert config.eos_ids == (2,)
    assert read("mistral").window == 4096
    assert read("mistral", sliding_window=None).window is None
    assert read("mixtral").rope_theta == 1e6
    assert read("qwen2").window is None
    assert read("qwen3").head_dim == 128
    assert read("gemma").tie_embeddings
    assert read("gemma2").windowed_layers == (True, False, True, False)
    assert (read("gemma2").attention_soft_cap, read("gemma2").logit_soft_cap) == (
        50,
        30,
    )
    gemma3 = read("gemma3_text", num_hidden_layers=7)
    assert gemma3.windowed_layers == (*(True,) * 5, False, True)
    assert (gemma3.rope_theta, gemma3.local_rope_theta) == (1e6, 1e4)
    gpt2 = read("gpt2")
    assert (gpt2.mlp_width, gpt2.head_dim, gpt2.tie_embeddings) == (128, 8, True)


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


def test_rotary_fields_of_both_kinds_of_layers_are_read_in_each_spelling():
    linear = {"rope_type": "linear", "factor": 8.0}
    old = {
        "rope_theta": 2e6,
        "rope_local_base_freq": 5e3,
        "rope_scaling": linear,
        "sliding_window_pattern": 2,
    }
    new = {
        "rope_parameters": {
            "full_attention": linear | {"rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    config = read("gemma3_text", **old)
    assert config == read("gemma3_text", **new)
    assert (config.rope_theta, config.local_rope_theta) == (2e6, 5e3)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0)


@pytest.mark.parametrize(
    ("scaling", "fields", "expected"),
    [
        ({"type": "dynamic", "factor": 2.0}, {}, {"original_max_positions": 2048}),
        # 0.1 ln 4 + 1, the paper's recommendation.
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {},
            {"attention_factor": 0.1 * math.log(4) + 1, "original_max_positions": 64},
        ),
        # The factor is 2048 / 512, and DeepSeek's two fields cancel.
        (
            {"type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.7},
            {"original_max_position_embeddings": 512},
            {"factor": 4.0, "attention_factor": 1.0, "original_max_positions": 512},
        ),
        # sqrt(1 + ln 8 / ln 64) = sqrt(1.5).
        (
            {
                **{"type": "longrope", "original_max_position_embeddings": 64},
                **{"factor": 8, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            },
            {},
            {"attention_factor": math.sqrt(1.5), "long_factors": (2.0,) * 4},
        ),
        ({"type": "llama3", **LLAMA3, "factor": 3}, {}, {"factor": 3}),
    ],
)
def test_every_scaling_is_read(scaling, fields, expected):
    read_scaling = llama.read_config(OLD | fields | {"rope_scaling": scaling})
    found = read_scaling.rope_scaling
    assert found is not None
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value)


def test_windows_of_qwen_are_off_in_the_last_layers_or_in_those_listed():
    on = {"use_sliding_window": True, "sliding_window": 5}
    assert read("qwen2", sliding_window=5, max_window_layers=0).window is None
    last = read("qwen2", **on, max_window_layers=1)
    assert last.layer_windows == (None, 5, 5, 5)
    types = ["sliding_attention", "full_attention"] * 2
    assert read("qwen3", **on, layer_types=types).layer_windows == (5, None, 5, None)
    assert read("qwen3", **on, max_window_layers=4).window is None
    assert read("qwen3_moe", **on, max_window_layers=2).layer_windows == (5,) * 4


def test_experts_are_read_in_each_spelling():
    expected = MoEConfig(
        num_experts=4, top_k=2, is_normalized=False, aux_loss_coef=0.001
    )
    assert read("qwen3_moe").moe == expected
    new = {"num_experts": None, "num_local_experts": 4}
    assert read("qwen3_moe", **new).moe == expected
    assert read("qwen3_moe").mlp_width == 12
    mixtral = read("mixtral", router_jitter_noise=0.1, router_aux_loss_coef=0.02)
    assert mixtral.moe == MoEConfig(
        num_experts=4, top_k=2, aux_loss_coef=0.02, jitter=0.1
    )


@pytest.mark.parametrize("name", ("gelu", "gelu_pytorch_tanh"))
def test_the_activation_of_gemma_is_the_tanh_form_whatever_it_is_called(name):
    assert read("gemma", hidden_act=name).activation == "gelu_tanh"


def test_dropout_is_accepted_and_not_applied():
    config = read("llama", attention_dropout=0.1)
    assert config == read("llama")
    assert read("gpt2", attn_pdrop=0.1, resid_pdrop=0.2) == read("gpt2")


def test_gpt2_reads_its_switches():
    config = read(
        "gpt2",
        activation_function="relu",
        n_inner=7,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
        n_ctx=64,
        task_specific_params={"text-generation": {"max_length": 50}},
    )
    assert (config.activation, config.mlp_width) == ("relu", 7)
    assert (config.attention_scale, config.is_scaled_by_layer) == (1.0, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish'; supported .* silu"),
        ({"sliding_window": 4096}, "'sliding_window'"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"head_scale": 2.0}, "'head_scale' \\(2.0\\) is not supported"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
        ({"model_type": "mistral"}, "'model_type' is 'mistral'"),
        ({"architectures": ["LlamaForTokenClassification"]}, "'architectures' is"),
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
            "type 'proportional' .*default, linear, dynamic, llama3, yarn, longrope",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "beta_fast": 1}},
            "'beta_fast'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'linear' lacks 'factor'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "lacks 'short_factor'"),
        (
            {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}},
            "'rope_theta' is 1.0 in one spelling and 2.0",
        ),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        (
            {"architectures": [llama.CLASSES.scalar], "id2label": None},
            "has 2 labels",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "'factor' has no meaning without scaling"),
        ({"rope_scaling": "linear"}, "rotary fields are 'linear'; they must be an obj"),
        ({"hidden_size": "48"}, "'hidden_size' is '48'; it must be a whole number"),
        ({"num_hidden_layers": 2.0}, "'num_hidden_layers' is 2.0; it must be a whole"),
        ({"num_attention_heads": 0}, "'num_attention_heads' is 0; it must be a whole"),
        ({"eos_token_id": [2, "</s>"]}, "'eos_token_id' has '</s>'; ids are whole"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        llama.read_config(OLD | fields)


def test_the_number_of_labels_may_stand_alone():
    scalar = {"architectures": [llama.CLASSES.scalar], "num_labels": 1}
    assert llama.read_config(OLD | scalar).head == "scalar"


def test_rotary_embeddings_of_all_coordinates_may_say_so():
    rope = {"rope_theta": 5.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    fields = {name: x for name, x in OLD.items() if not name.startswith("rope_")}
    config = llama.read_config(fields | {"rope_parameters": rope})
    assert (config.rope_theta, config.rope_scaling) == (5.0, None)


def test_a_family_of_ones_own_may_be_a_module_beside_the_program(monkeypatch):
    own = types.ModuleType("my_family")
    vars(own).update({name: vars(llama)[name] for name in vars(llama)})
    own.__name__ = "my_family"
    monkeypatch.setitem(sys.modules, "my_family", own)
    assert family("my_family") is own


@pytest.mark.parametrize("name", ("my_package.own", "my_package", None))
def test_a_file_does_not_say_what_is_imported(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package").mkdir()
    for module in ("__init__", "own"):
        (tmp_path / "my_package" / f"{module}.py").touch()
    (tmp_path / "config.json").write_text(json.dumps(OLD | {"model_type": name}))
    with pytest.raises(ValueError, match=r"not supported. Known families are: .*llama"):
        read_config(tmp_path)
    assert "my_package" not in sys.modules


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention'"),
        ("gpt2", {"n_head": 5}, "'n_head' 5 does not divide"),
        ("gpt2", {"n_ctx": 9}, "'n_ctx' is 9; for GPT-2 models only 64"),
        ("mistral", {"num_key_value_heads": None}, "'num_key_value_heads' is missing"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "'layer_types'"),
        ("mixtral", {"num_local_experts": None}, "'num_local_experts' is missing"),
        ("qwen2", {"attention_bias": True}, "'attention_bias'"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
        ("qwen3", {"layer_types": ["full_attention"]}, "has 1 entries for 4 layers"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "'use_sliding_window'"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "'mlp_only_layers' is \\[1\\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "'decoder_sparse_step' is 2"),
        ("qwen3_moe", {"num_local_experts": 8}, "is 4 and 'num_local_experts' is 8"),
        ("gemma", {"hidden_act": "silu"}, "'hidden_act' is 'silu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping'"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "default"}},
            "'rope_parameters' has 'rope_type'",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0}
                }
            },
            "scales 'sliding_attention'",
        ),
    ],
)
def test_each_family_refuses_by_name_what_it_does_not_compute(name, fields, message):
    with pytest.raises(ValueError, match=message):
        read(name, **fields)


@pytest.mark.parametrize(
    ("family_name", "changes", "message"),
    [
        ("qwen2", {}, "cannot say that has_qkv_bias is False; it would be read as"),
        ("mistral", {"has_qkv_bias": True}, "cannot say that has_qkv_bias is True"),
        ("llama", {"window": 4}, "cannot say that window is"),
        ("llama", {"has_qkv_bias": True}, "cannot say that has_output_bias is False"),
        ("llama", {"attention_scale": 0.3}, "cannot say that attention_scale is 0.3"),
    ],
)
def test_what_a_checkpoint_of_a_family_cannot_say_is_not_written(
    family_name, changes, message
):
    config = dataclasses.replace(CONFIG, family=family_name, **changes)
    with pytest.raises(ValueError, match=message):
        family(family_name).write_config(config)


def test_padding_and_the_settings_of_a_run_do_not_hinder_writing():
    config = FAMILY_CONFIGS["exported_qwen3_moe"]
    assert config.moe is not None
    moe = dataclasses.replace(config.moe, capacity_factor=1.5, z_loss_coef=0.1)
    padded = dataclasses.replace(config, moe=moe, vocab_multiple=8, layer_multiple=4)
    module = family(config.family)
    assert module.write_config(padded) == module.write_config(config)


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_every_parameter_is_stored_with_all_its_dimensions(name):
    config = ALL_CONFIGS[name]
    stored = family(config.family).stored_tensors(config)

    def check(parameter: Parameter, tensor: Stored):
        dimensions = [d for group in tensor.groups for d in group]
        lead = [axis for axis in parameter.axes if axis in ("layer", "expert")]
        assert tensor.num_stacked == len(lead)
        assert sorted(dimensions) == list(range(len(parameter.shape) - len(lead)))

    jax.tree.map(
        check,
        abstract_parameters(config),
        stored,
        is_leaf=lambda x: isinstance(x, Parameter),
    )


def test_a_family_is_a_module():
    assert family("llama") is llama
    assert family(llama) is llama


def test_a_family_of_ones_own_is_a_dotted_name_or_the_module(monkeypatch):
    own = types.ModuleType("my_package.my_family")
    vars(own).update({name: vars(llama)[name] for name in vars(llama)})
    own.__name__ = "my_package.my_family"
    monkeypatch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.my_family", own)
    assert family("my_package.my_family") is own
    assert family(own) is own
    del own.stored_tensors
    with pytest.raises(ValueError, match=r"'my_package.my_family' .*lacks stored_tens"):
        family(own)


def test_a_dotted_name_without_a_module_is_refused():
    with pytest.raises(ValueError, match=r"no module 'my_package.other'"):
        family("my_package.other")


@pytest.mark.parametrize("name", ("phi", "..config", "", "_decoder"))
def test_an_unknown_family_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=r"not supported. Known families are: .*llama"):
        family(name)


def test_every_stored_checkpoint_says_what_is_read_of_it():
    for path in sorted(FAMILIES.glob("*/config.json")):
        fields = json.loads(path.read_text())
        module = family(fields["model_type"])
        config = module.read_config(fields)
        assert module.read_config(module.write_config(config)) == config, path
