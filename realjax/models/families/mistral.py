"""Mistral 7B, and models of its architecture.

Source: Jiang et al. 2023, https://arxiv.org/abs/2310.06825; names as in Hugging Face's
`MistralForCausalLM` and `MistralForSequenceClassification`.
"""

from collections.abc import Mapping
from typing import Any

from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig
from realjax.models.families import _decoder
from realjax.models.families._decoder import Classes
from realjax.models.families._fields import Fields
from realjax.models.families._sizes import Table, published

CLASSES = Classes("MistralForCausalLM", "MistralForSequenceClassification")
IGNORED_TENSORS = _decoder.IGNORED_TENSORS


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`; the window is in every layer, or null.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = Fields(fields, "Mistral", "mistral")
    config = _decoder.read_decoder(
        left,
        family="mistral",
        classes=CLASSES,
        max_positions=131072,
        window=left.take("sliding_window", 4096),
    )
    left.refuse_rest()
    return config


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`, rotary ones in the old and new spelling.

    Raises:
        ValueError: for what a Mistral checkpoint cannot say.
    """
    fields = _decoder.write_decoder(config, CLASSES) | {"sliding_window": config.window}
    return _decoder.checked(fields, config, read_config)


def stored_tensors(config: ModelConfig) -> PyTree:
    """Return the parameter tree with a `Stored` in the place of every array."""
    return _decoder.stored_decoder(config)


def size(name: str) -> ModelConfig:
    """Return the config of a published size.

    Raises:
        ValueError: if there is no such size; the message lists those there are.
    """
    shared = {"max_positions": 32768, "bos_id": 1, "eos_ids": (2,)}
    columns = (4096, 32, 32, 8, 128, 14336)
    # name: width, layers, heads, key and value heads, head, feed-forward
    table: Table = {
        "7b-v0.1": (shared | {"vocab_size": 32000, "window": 4096}, columns),
        "7b-v0.2": (shared | {"vocab_size": 32000, "rope_theta": 1e6}, columns),
        "7b-v0.3": (shared | {"vocab_size": 32768, "rope_theta": 1e6}, columns),
    }
    return published("mistral", "Mistral", table, name)
