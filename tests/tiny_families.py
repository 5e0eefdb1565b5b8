"""A tiny model of every family, with what sets the family apart, in awkward sizes.

61 ids and 3 layers: no tensor or stage degree but 1 and 3 divides them. 8 query heads
of a width that is not width / heads.
"""

import dataclasses

from realjax.models.config import ModelConfig, MoEConfig, RopeScaling

LLAMA = ModelConfig(
    vocab_size=61,
    width=32,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=48,
    max_positions=64,
    eos_ids=(1,),
)


def like_llama(family: str, **changes) -> ModelConfig:
    return dataclasses.replace(LLAMA, family=family, **changes)


EXPERTS = MoEConfig(num_experts=8, top_k=2, aux_loss_coef=0.1, z_loss_coef=0.01)
GEMMA = {
    "norm": "gemma",
    "activation": "gelu_tanh",
    "is_embedding_scaled": True,
    "tie_embeddings": True,
}

FAMILIES = {
    "llama": like_llama(
        "llama",
        rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_max_positions=16),
    ),
    "gpt2": like_llama(
        "gpt2",
        num_kv_heads=8,
        norm="layer",
        activation="gelu_tanh",
        is_gated=False,
        has_qkv_bias=True,
        has_output_bias=True,
        has_mlp_bias=True,
        positions="learned",
        is_scaled_by_layer=True,
        tie_embeddings=True,
    ),
    "mistral": like_llama("mistral", window=5, num_kv_heads=8),
    "mixtral": like_llama("mixtral", moe=EXPERTS, window=7, num_kv_heads=1),
    "qwen2": like_llama(
        "qwen2",
        has_qkv_bias=True,
        tie_embeddings=True,
        window=6,
        windowed_layers=(False, True, True),
    ),
    "qwen3": like_llama(
        "qwen3",
        has_query_key_norm=True,
        num_kv_heads=1,
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_positions=16),
    ),
    "qwen3_moe": like_llama(
        "qwen3_moe",
        has_query_key_norm=True,
        moe=dataclasses.replace(EXPERTS, top_k=3, is_normalized=False),
    ),
    "gemma": like_llama("gemma", num_kv_heads=1, **GEMMA),
    "gemma2": like_llama(
        "gemma2",
        has_post_norms=True,
        attention_scale=0.3,
        attention_soft_cap=3.0,
        logit_soft_cap=4.0,
        window=5,
        windowed_layers=(True, False, True),
        **GEMMA,
    ),
    "gemma3": like_llama(
        "gemma3_text",
        has_post_norms=True,
        has_query_key_norm=True,
        attention_scale=0.3,
        window=5,
        windowed_layers=(True, True, False),
        local_rope_theta=100.0,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
        **GEMMA,
    ),
}
"""Configs by the name of the family's module, or near it."""
