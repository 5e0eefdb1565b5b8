"""Qwen2 and Qwen2.5.

Sources: Qwen team 2024, https://arxiv.org/abs/2407.10671 and
https://arxiv.org/abs/2412.15115; names as in Hugging Face's `Qwen2ForCausalLM` and
`Qwen2ForSequenceClassification`.
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

CLASSES = Classes("Qwen2ForCausalLM", "Qwen2ForSequenceClassification")
IGNORED_TENSORS = _decoder.IGNORED_TENSORS


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`; queries, keys and values always have biases.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = Fields(fields, "Qwen2", "qwen2")
    config = _decoder.read_decoder(
        left,
        family="qwen2",
        classes=CLASSES,
        max_positions=32768,
        has_qkv_bias=True,
    )
    windows = _decoder.read_last_windows(left, config.num_layers)
    left.refuse_rest()
    return dataclasses.replace(config, **windows)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`, rotary ones in the old and new spelling.

    Raises:
        ValueError: for what a Qwen2 checkpoint cannot say.
    """
    fields = _decoder.write_decoder(config, CLASSES)
    fields |= _decoder.write_last_windows(config)
    return _decoder.checked(fields, config, read_config)


def stored_tensors(config: ModelConfig) -> PyTree:
    """Return the parameter tree with a `Stored` in the place of every array."""
    return _decoder.stored_decoder(config)


def size(name: str) -> ModelConfig:
    """Return the config of a published size, with the fields of the instruct models.

    Raises:
        ValueError: if there is no such size; the message lists those there are.
    """
    shared = {
        **{"rope_theta": 1e6, "norm_epsilon": 1e-6, "max_positions": 32768},
        **{"has_qkv_bias": True, "bos_id": 151643, "eos_ids": (151645,)},
    }
    small = shared | {"vocab_size": 151936, "tie_embeddings": True}
    large = shared | {"vocab_size": 152064}
    # name: width, layers, heads, key and value heads, head, feed-forward
    table: Table = {
        "2.5-0.5b": (small, (896, 24, 14, 2, 64, 4864)),
        "2.5-1.5b": (small, (1536, 28, 12, 2, 128, 8960)),
        "2.5-3b": (small, (2048, 36, 16, 2, 128, 11008)),
        "2.5-7b": (large, (3584, 28, 28, 4, 128, 18944)),
        "2.5-14b": (large, (5120, 48, 40, 8, 128, 13824)),
        "2.5-32b": (large, (5120, 64, 40, 8, 128, 27648)),
        "2.5-72b": (large, (8192, 80, 64, 8, 128, 29568)),
    }
    return published("qwen2", "Qwen2", table, name)
