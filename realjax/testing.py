"""Tiny models, tokenizers and batches: for tests, notebooks and `:debug` configs."""

import pathlib

import jax
import numpy as np

from realjax.core.arrays import PyTree
from realjax.core.batch import Batch
from realjax.data.tokenizer import Tokenizer
from realjax.models import transformer
from realjax.models.config import ModelConfig

TINY = {
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_width": 64,
    "max_positions": 256,
}
"""Sizes of a Llama that trains in moments, without its vocabulary."""


def tiny_model(vocab_size: int = 64, **changes) -> ModelConfig:
    """The config of a tiny Llama."""
    return ModelConfig(**{"vocab_size": vocab_size, "eos_ids": (1,), **TINY, **changes})


def tiny_parameters(config: ModelConfig, seed: int = 0) -> PyTree:
    """New parameters, on the default device."""
    init = jax.jit(transformer.init_parameters, static_argnums=0)
    return init(config, jax.random.key(seed))


def tiny_tokenizer(folder: str | pathlib.Path | None = None) -> Tokenizer:
    """A byte-level BPE of 300 ids, saved to `folder` if there is one."""
    texts = ["the cat sat on the mat and the dog ran", "a good day, a bad day"] * 20
    tokenizer = Tokenizer.train(texts, vocab_size=300)
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def tiny_batch(
    size: int = 8, width: int = 24, vocab_size: int = 64, seed: int = 0
) -> Batch:
    """Random sequences of unlike lengths; each completion is about half of one."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(6, width + 1, size).astype(np.int32)
    starts = (lengths // 2)[:, None]
    place = np.arange(width)[None, :]
    tokens = generator.integers(2, vocab_size, (size, width)).astype(np.int32)
    return Batch.create(
        {
            "tokens": np.where(place < lengths[:, None], tokens, 0).astype(np.int32),
            "completion_mask": (place >= starts) & (place < lengths[:, None]),
        },
        lengths=lengths,
    )
