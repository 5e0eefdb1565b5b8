"""Writes the checkpoints `data/exported_*`, which make_llama.py gives to transformers.

.venv/bin/python -m tests.parity.make_exports
"""

import pathlib

import jax
import numpy as np

from realjax.core.arrays import PyTree
from realjax.models import hf
from realjax.models.config import ModelConfig, RopeScaling
from realjax.models.transformer import Parameter, abstract_parameters

DATA = pathlib.Path(__file__).parent / "data"

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
# So small that every checkpoint has several files and an index.
MAX_SHARD_BYTES = 20_000


def parameters(config: ModelConfig) -> PyTree:
    """Draw parameters by numpy: norms around 1, matrices of deviation 0.3."""
    generator = np.random.default_rng(config.vocab_size)

    def draw(path: tuple, parameter: Parameter) -> np.ndarray:
        if path[-1].key == "scale":
            return generator.uniform(0.5, 1.5, parameter.shape).astype(np.float32)
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


if __name__ == "__main__":
    main()
