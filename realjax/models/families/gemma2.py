"""Gemma 2: windows in every second layer, soft caps, norms after each part too.

Source: Gemma team 2024, https://arxiv.org/abs/2408.00118; names as in Hugging Face's
`Gemma2ForCausalLM` and `Gemma2ForSequenceClassification`.
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

CLASSES = Classes("Gemma2ForCausalLM", "Gemma2ForSequenceClassification")
IGNORED_TENSORS = _decoder.IGNORED_TENSORS

_OWN = {"norm": "gemma", "is_embedding_scaled": True, "has_post_norms": True}


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = Fields(fields, "Gemma 2", "gemma2")
    left.only("use_bidirectional_attention", False)
    attention_cap = left.take("attn_logit_softcapping", 50.0)
    logit_cap = left.take("final_logit_softcapping", 30.0)
    scalar = left.take("query_pre_attn_scalar", 256)
    config = _decoder.read_decoder(
        left,
        family="gemma2",
        classes=CLASSES,
        max_positions=8192,
        head_dim=256,
        tie_embeddings=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        attention_soft_cap=attention_cap,
        logit_soft_cap=logit_cap,
        **_decoder.read_bias(left),
        **_OWN,
    )
    window = left.take("sliding_window", 4096)
    left.only("sliding_window_size", window)  # The same again, in some files.
    is_windowed = left.layer_types(config.num_layers)
    if is_windowed is None:
        is_windowed = _alternating(config.num_layers)["windowed_layers"]
    # Files of the first release name an activation twice; this one was never read.
    left.refuse_rest(("hidden_act",))
    return dataclasses.replace(
        config,
        attention_scale=attention_scale(scalar, config.head_dim),
        **_decoder.windows(window, is_windowed),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`, rotary ones in the old and new spelling.

    Raises:
        ValueError: for what a Gemma 2 checkpoint cannot say.
    """
    fields = _decoder.write_decoder(config, CLASSES, activation="hidden_activation")
    fields |= write_own(config)
    return _decoder.checked(fields, config, read_config)


def attention_scale(scalar: float | None, head_dim: int) -> float | None:
    """Return the factor of scores that 'query_pre_attn_scalar' means; None is usual."""
    return None if scalar in (None, head_dim) else scalar**-0.5


def write_own(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of scores, logits and windows, which Gemma 3 shares."""
    scale = config.attention_scale or config.head_dim**-0.5
    return {
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
        "attention_bias": config.has_qkv_bias,
        "sliding_window": config.window,
        "layer_types": _decoder.layer_types(config),
    }


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
        **{"activation": "gelu_tanh", "tie_embeddings": True, "window": 4096},
        **{"attention_soft_cap": 50.0, "logit_soft_cap": 30.0},
        **{"bos_id": 2, "eos_ids": (1,), "pad_id": 0},
    }
    largest = shared | {"attention_scale": 144**-0.5}
    # name: width, layers, heads, key and value heads, head, feed-forward
    table: Table = {
        "2b": (shared | _alternating(26), (2304, 26, 8, 4, 256, 9216)),
        "9b": (shared | _alternating(42), (3584, 42, 16, 8, 256, 14336)),
        "27b": (largest | _alternating(46), (4608, 46, 32, 16, 128, 36864)),
    }
    return published("gemma2", "Gemma 2", table, name)


def _alternating(num_layers: int) -> dict[str, Any]:
    return {"windowed_layers": tuple(layer % 2 == 0 for layer in range(num_layers))}
