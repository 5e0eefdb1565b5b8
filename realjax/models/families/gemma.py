"""Gemma, the first generation.

Source: Gemma team 2024, https://arxiv.org/abs/2403.08295; names as in Hugging Face's
`GemmaForCausalLM` and `GemmaForSequenceClassification`.
"""

from collections.abc import Mapping
from typing import Any

from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig
from realjax.models.families import _decoder
from realjax.models.families._decoder import Classes
from realjax.models.families._fields import Fields
from realjax.models.families._sizes import Table, published

CLASSES = Classes("GemmaForCausalLM", "GemmaForSequenceClassification")
IGNORED_TENSORS = _decoder.IGNORED_TENSORS

_OWN = {"norm": "gemma", "is_embedding_scaled": True}
_TANH = "gelu_pytorch_tanh"


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`.

    The activation of the first files, "gelu", means the tanh form: the models were
    trained with it, and transformers reads it so.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = Fields(fields, "Gemma", "gemma")
    left.only("hidden_act", "gelu", _TANH)
    left.only("hidden_activation", "gelu", _TANH)
    left.only("use_bidirectional_attention", False)
    config = _decoder.read_decoder(
        left,
        family="gemma",
        classes=CLASSES,
        max_positions=8192,
        head_dim=256,
        tie_embeddings=True,
        activation=("hidden_act", _TANH),
        **_decoder.read_bias(left),
        **_OWN,
    )
    left.refuse_rest()
    return config


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`, rotary ones in the old and new spelling.

    Raises:
        ValueError: for what a Gemma checkpoint cannot say.
    """
    fields = _decoder.write_decoder(config, CLASSES)
    fields |= {
        "hidden_activation": fields["hidden_act"],  # Read by transformers 4.
        "attention_bias": config.has_qkv_bias,
    }
    return _decoder.checked(fields, config, read_config)


def stored_tensors(config: ModelConfig) -> PyTree:
    """Return the parameter tree with a `Stored` in the place of every array."""
    return _decoder.stored_decoder(config)


def size(name: str) -> ModelConfig:
    """Return the config of a published size.

    Raises:
        ValueError: if there is no such size; the message lists those there are.
    """
    shared = _OWN | {
        **{"vocab_size": 256000, "norm_epsilon": 1e-6, "max_positions": 8192},
        **{"activation": "gelu_tanh", "tie_embeddings": True},
        **{"bos_id": 2, "eos_ids": (1,), "pad_id": 0},
    }
    # name: width, layers, heads, key and value heads, head, feed-forward
    table: Table = {
        "2b": (shared, (2048, 18, 8, 1, 256, 16384)),
        "7b": (shared, (3072, 28, 16, 16, 256, 24576)),
    }
    return published("gemma", "Gemma", table, name)
