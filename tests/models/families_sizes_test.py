"""Published sizes: the same as what was released, by its config and its size."""

import pytest

from realjax.models.families import family, names

_NOISE = {
    **{"initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True},
    **{"attention_dropout": 0.0, "transformers_version": "4.44.0"},
}
_GEMMA = {
    **{"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "rms_norm_eps": 1e-6},
    **{"attention_bias": False, "vocab_size": 256000, "rope_theta": 10000.0},
    **{"max_position_embeddings": 8192, "head_dim": 256},
}
_QWEN = {
    **{"bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu"},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False},
}
_MISTRAL = {
    **{"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"},
    **{"rms_norm_eps": 1e-5, "vocab_size": 32000, "tie_word_embeddings": False},
    **{"max_position_embeddings": 32768},
}


def sizes(width, layers, heads, kv_heads, mlp_width):
    return {
        **{"hidden_size": width, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads},
        "intermediate_size": mlp_width,
    }


# (family, size, class, fields of the released config.json)
PUBLISHED = [
    (
        *("gpt2", "124m", "GPT2LMHeadModel"),
        {
            **{"activation_function": "gelu_new", "attn_pdrop": 0.1, "n_ctx": 1024},
            **{"bos_token_id": 50256, "eos_token_id": 50256, "embd_pdrop": 0.1},
            **{"layer_norm_epsilon": 1e-5, "n_embd": 768, "n_head": 12, "n_layer": 12},
            **{"n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None},
            **{"summary_first_dropout": 0.1, "summary_proj_to_labels": True},
            **{"summary_type": "cls_index", "summary_use_proj": True},
            "task_specific_params": {"text-generation": {"max_length": 50}},
            "vocab_size": 50257,
        },
    ),
    (
        *("gpt2", "355m", "GPT2LMHeadModel"),
        {
            **{"activation_function": "gelu_new", "attn_pdrop": 0.1, "n_ctx": 1024},
            **{"bos_token_id": 50256, "eos_token_id": 50256, "embd_pdrop": 0.1},
            **{"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_positions": 1024},
            **{"n_special": 0, "predict_special_tokens": True, "vocab_size": 50257},
        },
    ),
    (
        *("gpt2", "1.5b", "GPT2LMHeadModel"),
        {
            **{"activation_function": "gelu_new", "attn_pdrop": 0.1, "n_ctx": 1024},
            **{"bos_token_id": 50256, "eos_token_id": 50256, "embd_pdrop": 0.1},
            **{"n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024},
            **{"output_past": True, "vocab_size": 50257},
        },
    ),
    (
        *("mistral", "7b-v0.1", "MistralForCausalLM"),
        _MISTRAL
        | sizes(4096, 32, 32, 8, 14336)
        | {"rope_theta": 10000.0, "sliding_window": 4096},
    ),
    (
        *("mixtral", "8x7b", "MixtralForCausalLM"),
        _MISTRAL
        | sizes(4096, 32, 32, 8, 14336)
        | {"rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8}
        | {"num_experts_per_tok": 2, "output_router_logits": False}
        | {"router_aux_loss_coef": 0.02},
    ),
    (
        *("qwen2", "2.5-7b", "Qwen2ForCausalLM"),
        _QWEN
        | sizes(3584, 28, 28, 4, 18944)
        | {"max_position_embeddings": 32768, "max_window_layers": 28}
        | {"sliding_window": 131072, "tie_word_embeddings": False}
        | {"vocab_size": 152064},
    ),
    (
        *("qwen3", "0.6b", "Qwen3ForCausalLM"),
        _QWEN
        | sizes(1024, 28, 16, 8, 3072)
        | {"attention_bias": False, "head_dim": 128, "max_window_layers": 28}
        | {"max_position_embeddings": 40960, "rope_scaling": None}
        | {"sliding_window": None, "tie_word_embeddings": True, "vocab_size": 151936},
    ),
    (
        *("qwen3_moe", "30b-a3b", "Qwen3MoeForCausalLM"),
        _QWEN
        | sizes(2048, 48, 32, 4, 6144)
        | {"attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128}
        | {"max_position_embeddings": 40960, "max_window_layers": 48}
        | {"mlp_only_layers": [], "moe_intermediate_size": 768, "num_experts": 128}
        | {"norm_topk_prob": True, "num_experts_per_tok": 8, "rope_scaling": None}
        | {"output_router_logits": False, "router_aux_loss_coef": 0.001}
        | {"sliding_window": None, "tie_word_embeddings": False, "vocab_size": 151936},
    ),
    (
        *("gemma", "2b", "GemmaForCausalLM"),
        _GEMMA
        | sizes(2048, 18, 8, 1, 16384)
        | {"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None},
    ),
    (
        *("gemma2", "9b", "Gemma2ForCausalLM"),
        _GEMMA
        | sizes(3584, 42, 16, 8, 14336)
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"cache_implementation": "hybrid", "query_pre_attn_scalar": 256}
        | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
        | {"sliding_window": 4096, "sliding_window_size": 4096},
    ),
    (
        *("gemma3_text", "1b", "Gemma3ForCausalLM"),
        _GEMMA
        | sizes(1152, 26, 4, 1, 6912)
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"cache_implementation": "hybrid", "query_pre_attn_scalar": 256}
        | {"hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768}
        | {"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000}
        | {"sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144},
    ),
]


@pytest.mark.parametrize("name", names())
def test_a_published_size_that_is_written_reads_as_itself(name):
    module = family(name)
    with pytest.raises(ValueError, match="known sizes are: ") as error:
        module.size("0b")
    for size in str(error.value).split("are: ")[1].rstrip(".").split(", "):
        config = module.size(size)
        assert config.family == name
        assert module.read_config(module.write_config(config)) == config


@pytest.mark.parametrize(("name", "size", "architecture", "fields"), PUBLISHED)
def test_a_config_as_published_is_read_as_the_published_size(
    name, size, architecture, fields
):
    known = {"architectures": [architecture], "model_type": name}
    config = family(name).read_config(_NOISE | known | fields)
    assert config == family(name).size(size)


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        # As transformers counts them in its own models of these configs.
        ("gpt2", "124m", 124_439_808),
        ("gpt2", "1.5b", 1_557_611_200),
        ("llama", "3.1-8b", 8_030_261_248),
        ("llama", "3.2-1b", 1_235_814_400),
        ("mistral", "7b-v0.1", 7_241_732_096),
        ("mixtral", "8x7b", 46_702_792_704),
        ("qwen2", "2.5-0.5b", 494_032_768),
        ("qwen3", "0.6b", 596_049_920),
        ("qwen3_moe", "30b-a3b", 30_532_122_624),
        ("gemma", "2b", 2_506_172_416),
        ("gemma2", "2b", 2_614_341_888),
        ("gemma3_text", "1b", 999_885_952),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, size, count):
    assert family(name).size(size).num_parameters == count


def test_an_unknown_size_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"size '9b'; known sizes are: .*3\.1-8b"):
        family("llama").size("9b")
