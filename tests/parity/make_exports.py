"""Writes the checkpoints `exported_*`, which are then given to transformers.

Those in `data` make_llama.py gives it, those in `data/families` make_families.py.

.venv/bin/python -m tests.parity.make_exports
"""

import pathlib

import jax
import numpy as np

from realjax.core.arrays import PyTree
from realjax.models import hf
from realjax.models.config import ModelConfig, MoEConfig, RopeScaling
from realjax.models.transformer import Parameter, abstract_parameters

DATA = pathlib.Path(__file__).parent / "data"
FAMILIES = DATA / "families"

CONFIGS = {
    "exported_untied": ModelConfig(
        vocab_size=113,
        width=28,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        mlp_width=45,
        rope_theta=2000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_positions=16),
        max_positions=128,
        bos_id=1,
        pad_id=0,
    ),
    "exported_tied": ModelConfig(
        vocab_size=89,
        width=18,
        num_layers=3,
        num_heads=3,
        num_kv_heads=3,
        head_dim=8,
        mlp_width=31,
        norm_epsilon=1e-3,
        tie_embeddings=True,
        rope_scaling=RopeScaling(kind="linear", factor=3.0),
        pad_id=0,
    ),
    "exported_scalar": ModelConfig(
        vocab_size=71,
        width=20,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        head_dim=6,
        mlp_width=27,
        head="scalar",
        pad_id=0,
    ),
}

SIZES = {
    **{"width": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
    **{"mlp_width": 13, "max_positions": 96, "pad_id": 0},
}
GEMMA = SIZES | {
    "norm": "gemma",
    "activation": "gelu_tanh",
    "is_embedding_scaled": True,
}
GEMMA2 = GEMMA | {
    "family": "gemma2",
    "has_post_norms": True,
    "window": 6,
    "windowed_layers": (True, False),
    "attention_scale": 5**-0.5,
    "attention_soft_cap": 3.0,
    "tie_embeddings": True,
}
GEMMA3 = GEMMA | {
    "family": "gemma3_text",
    "has_post_norms": True,
    "has_query_key_norm": True,
    "window": 5,
    "windowed_layers": (False, True),
    "rope_theta": 900.0,
    "rope_scaling": RopeScaling(kind="linear", factor=3.0),
    "local_rope_theta": 80.0,
}
GPT2 = SIZES | {
    **{"family": "gpt2", "norm": "layer", "positions": "learned", "is_gated": False},
    **{"has_qkv_bias": True, "has_output_bias": True, "has_mlp_bias": True},
    **{"width": 15, "num_heads": 3, "num_kv_heads": 3, "head_dim": 5},
    **{"activation": "relu", "is_scaled_by_layer": True},
}
QWEN3_MOE = SIZES | {
    "family": "qwen3_moe",
    "has_query_key_norm": True,
    "moe": MoEConfig(num_experts=3, top_k=2, is_normalized=False),
}
FAMILY_CONFIGS = {
    "exported_gemma": ModelConfig(
        **GEMMA, family="gemma", vocab_size=33, has_qkv_bias=True, has_output_bias=True
    ),
    "exported_gemma2": ModelConfig(**GEMMA2, vocab_size=35, logit_soft_cap=8.0),
    "exported_gemma3": ModelConfig(**GEMMA3, vocab_size=36),
    "exported_gpt2": ModelConfig(**GPT2, vocab_size=37),
    "exported_llama_longrope": ModelConfig(
        **SIZES,
        vocab_size=38,
        has_qkv_bias=True,
        has_output_bias=True,
        has_mlp_bias=True,
        rope_theta=200.0,
        rope_scaling=RopeScaling(
            kind="longrope",
            factor=6.0,
            original_max_positions=16,
            attention_factor=1.2,
            short_factors=(1.0, 1.5, 2.0),
            long_factors=(1.0, 3.0, 6.0),
        ),
    ),
    "exported_mistral": ModelConfig(
        **SIZES | {"max_positions": 16},
        family="mistral",
        vocab_size=39,
        window=7,
        rope_theta=100.0,
        rope_scaling=RopeScaling(kind="dynamic", factor=2.0, original_max_positions=16),
    ),
    "exported_mixtral": ModelConfig(
        **SIZES,
        family="mixtral",
        vocab_size=40,
        window=9,
        moe=MoEConfig(num_experts=3, top_k=2, aux_loss_coef=0.02),
    ),
    "exported_qwen2": ModelConfig(
        **SIZES,
        family="qwen2",
        vocab_size=41,
        has_qkv_bias=True,
        window=6,
        windowed_layers=(False, True),
        rope_theta=100.0,
        rope_scaling=RopeScaling(
            kind="yarn",
            factor=6.0,
            original_max_positions=16,
            attention_factor=1.1,
            slow_turns=0.25,
            fast_turns=2.0,
            is_truncated=False,
        ),
    ),
    "exported_qwen3": ModelConfig(
        **SIZES,
        family="qwen3",
        vocab_size=42,
        has_query_key_norm=True,
    ),
    "exported_qwen3_moe": ModelConfig(**QWEN3_MOE, vocab_size=43, window=6),
    "exported_scalar_gemma2": ModelConfig(**GEMMA2, vocab_size=32, head="scalar"),
    "exported_scalar_gemma3": ModelConfig(**GEMMA3, vocab_size=31, head="scalar"),
    "exported_scalar_gpt2": ModelConfig(**GPT2, vocab_size=30, head="scalar"),
    "exported_scalar_qwen3_moe": ModelConfig(**QWEN3_MOE, vocab_size=29, head="scalar"),
}
# So small that every checkpoint has several files and an index.
MAX_SHARD_BYTES = 20_000


def parameters(config: ModelConfig) -> PyTree:
    """Draw parameters by numpy: norms around 1, matrices of deviation 0.3."""
    generator = np.random.default_rng(config.vocab_size)
    middle = 0.0 if config.norm == "gemma" else 1.0

    def draw(path: tuple, parameter: Parameter) -> np.ndarray:
        if path[-1].key == "scale":
            drawn = generator.uniform(middle - 0.5, middle + 0.5, parameter.shape)
            return drawn.astype(np.float32)
        return (0.3 * generator.standard_normal(parameter.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(
        draw, abstract_parameters(config), is_leaf=lambda x: isinstance(x, Parameter)
    )


def main() -> None:
    """Write every checkpoint."""
    for name, config in CONFIGS.items():
        hf.save(
            DATA / name, config, parameters(config), max_shard_bytes=MAX_SHARD_BYTES
        )
    for name, config in FAMILY_CONFIGS.items():
        hf.save(FAMILIES / name, config, parameters(config))


if __name__ == "__main__":
    main()
