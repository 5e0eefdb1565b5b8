"""Qwen3, the dense models: queries and keys are normalised, head by head.

Source: Qwen team 2025, https://arxiv.org/abs/2505.09388; names as in Hugging Face's
`Qwen3ForCausalLM` and `Qwen3ForSequenceClassification`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig
from realjax.models.families import _decoder
from realjax.models.families._decoder import Classes
from realjax.models.families._fields import Fields
from realjax.models.families._sizes import Table, published

CLASSES = Classes("Qwen3ForCausalLM", "Qwen3ForSequenceClassification")
IGNORED_TENSORS = _decoder.IGNORED_TENSORS


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = Fields(fields, "Qwen3", "qwen3")
    config = _decoder.read_decoder(
        left,
        family="qwen3",
        classes=CLASSES,
        max_positions=32768,
        head_dim=128,
        has_query_key_norm=True,
        **_decoder.read_bias(left),
    )
    windows = _decoder.read_last_windows(left, config.num_layers)
    left.refuse_rest()
    return dataclasses.replace(config, **windows)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`, rotary ones in the old and new spelling.

    Raises:
        ValueError: for what a Qwen3 checkpoint cannot say.
    """
    fields = _decoder.write_decoder(config, CLASSES)
    fields |= _decoder.write_last_windows(config)
    fields |= {"attention_bias": config.has_qkv_bias}
    return _decoder.checked(fields, config, read_config)


def stored_tensors(config: ModelConfig) -> PyTree:
    """Return the parameter tree with a `Stored` in the place of every array."""
    return _decoder.stored_decoder(config)


def size(name: str) -> ModelConfig:
    """Return the config of a published size.

    Raises:
        ValueError: if there is no such size; the message lists those there are.
    """
    large = {
        **{"vocab_size": 151936, "rope_theta": 1e6, "norm_epsilon": 1e-6},
        **{"has_query_key_norm": True, "max_positions": 40960},
        **{"bos_id": 151643, "eos_ids": (151645,)},
    }
    small = large | {"tie_embeddings": True}
    # name: width, layers, heads, key and value heads, head, feed-forward
    table: Table = {
        "0.6b": (small, (1024, 28, 16, 8, 128, 3072)),
        "1.7b": (small, (2048, 28, 16, 8, 128, 6144)),
        "4b": (small, (2560, 36, 32, 8, 128, 9728)),
        "8b": (large, (4096, 36, 32, 8, 128, 12288)),
        "14b": (large, (5120, 40, 40, 8, 128, 17408)),
        "32b": (large, (5120, 64, 64, 8, 128, 25600)),
    }
    return published("qwen3", "Qwen3", table, name)
