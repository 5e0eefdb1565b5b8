"""Llama 2 to 3.3, Code Llama, DeepSeek LLM, and models of their architecture.

Sources: Touvron et al. 2023, https://arxiv.org/abs/2307.09288; the Llama team 2024,
https://arxiv.org/abs/2407.21783; Rozière et al. 2023, https://arxiv.org/abs/2308.12950;
DeepSeek-AI 2024, https://arxiv.org/abs/2401.02954. Names as in Hugging Face's
`LlamaForCausalLM` and `LlamaForSequenceClassification`.
"""

from collections.abc import Mapping
from typing import Any

from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig, RopeScaling
from realjax.models.families import _decoder
from realjax.models.families._decoder import Classes
from realjax.models.families._fields import Fields
from realjax.models.families._sizes import Table, published

CLASSES = Classes("LlamaForCausalLM", "LlamaForSequenceClassification")
IGNORED_TENSORS = _decoder.IGNORED_TENSORS


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = Fields(fields, "Llama", "llama")
    config = _decoder.read_decoder(
        left,
        family="llama",
        classes=CLASSES,
        kv_heads_default=True,
        max_positions=2048,
        has_mlp_bias=bool(left.take("mlp_bias", None)),
        **_decoder.read_bias(left),
    )
    left.refuse_rest()
    return config


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`, rotary ones in the old and new spelling.

    Raises:
        ValueError: for what a Llama checkpoint cannot say.
    """
    fields = _decoder.write_decoder(config, CLASSES) | {
        "attention_bias": config.has_qkv_bias,
        "mlp_bias": config.has_mlp_bias,
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
    second = {"vocab_size": 32000, "max_positions": 4096, "bos_id": 1, "eos_ids": (2,)}
    code = second | {"rope_theta": 1e6, "max_positions": 16384}
    deepseek = {
        **{"vocab_size": 102400, "max_positions": 4096, "norm_epsilon": 1e-6},
        **{"bos_id": 100000, "eos_ids": (100001,)},
    }
    third = {
        **{"vocab_size": 128256, "rope_theta": 500000.0, "max_positions": 8192},
        **{"bos_id": 128000, "eos_ids": (128001,)},
    }
    longer = third | {
        "rope_scaling": RopeScaling(kind="llama3", factor=8.0),
        "max_positions": 131072,
    }
    small = longer | {
        "rope_scaling": RopeScaling(kind="llama3", factor=32.0),
        "tie_embeddings": True,
    }
    # name: width, layers, heads, key and value heads, head, feed-forward
    table: Table = {
        "2-7b": (second, (4096, 32, 32, 32, 128, 11008)),
        "2-13b": (second, (5120, 40, 40, 40, 128, 13824)),
        "2-70b": (second, (8192, 80, 64, 8, 128, 28672)),
        "code-7b": (code | {"vocab_size": 32016}, (4096, 32, 32, 32, 128, 11008)),
        "code-13b": (code | {"vocab_size": 32016}, (5120, 40, 40, 40, 128, 13824)),
        "code-34b": (code, (8192, 48, 64, 8, 128, 22016)),
        "deepseek-7b": (deepseek, (4096, 30, 32, 32, 128, 11008)),
        "deepseek-67b": (deepseek, (8192, 95, 64, 8, 128, 22016)),
        "3-8b": (third, (4096, 32, 32, 8, 128, 14336)),
        "3-70b": (third, (8192, 80, 64, 8, 128, 28672)),
        "3.1-8b": (longer, (4096, 32, 32, 8, 128, 14336)),
        "3.1-70b": (longer, (8192, 80, 64, 8, 128, 28672)),
        "3.1-405b": (longer, (16384, 126, 128, 8, 128, 53248)),
        "3.2-1b": (small, (2048, 16, 32, 8, 64, 8192)),
        "3.2-3b": (small, (3072, 28, 24, 8, 128, 8192)),
        "3.3-70b": (longer, (8192, 80, 64, 8, 128, 28672)),
    }
    return published("llama", "Llama", table, name)
