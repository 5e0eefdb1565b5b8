"""Gemma 3, the text models, and what reads text in the others.

Five layers of six see a window and have a rotary base of their own; queries and keys
are normalised, head by head.

Source: Gemma team 2025, https://arxiv.org/abs/2503.19786; names as in Hugging Face's
`Gemma3ForCausalLM` and `Gemma3TextForSequenceClassification`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig, RopeScaling
from realjax.models.families import _decoder, _rope
from realjax.models.families._decoder import Classes
from realjax.models.families._fields import Fields
from realjax.models.families._sizes import Table, published
from realjax.models.families.gemma2 import attention_scale, write_own

CLASSES = Classes("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification")
IGNORED_TENSORS = _decoder.IGNORED_TENSORS

_OWN = {
    **{"norm": "gemma", "is_embedding_scaled": True, "has_post_norms": True},
    "has_query_key_norm": True,
}
_WHOLE, _LOCAL = "full_attention", "sliding_attention"


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = Fields(fields, "Gemma 3", "gemma3_text")
    left.only("use_bidirectional_attention", False)
    # transformers has this field for Gemma 3 and does not compute it.
    left.only("attn_logit_softcapping")
    scalar = left.take("query_pre_attn_scalar", 256)
    config = _decoder.read_decoder(
        left,
        family="gemma3_text",
        classes=CLASSES,
        max_positions=131072,
        head_dim=256,
        tie_embeddings=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        logit_soft_cap=left.take("final_logit_softcapping", None),
        has_rope=False,
        **_decoder.read_bias(left),
        **_OWN,
    )
    rope = _read_both_ropes(left, config.max_positions)
    window = left.take("sliding_window", 4096)
    pattern = left.take("sliding_window_pattern", 6)
    is_windowed = left.layer_types(config.num_layers)
    if is_windowed is None:
        is_windowed = _windowed(config.num_layers, pattern)
    left.refuse_rest()
    windows = _decoder.windows(window, is_windowed)
    if windows["window"] is None:
        rope.pop("local_rope_theta")
    scale = attention_scale(scalar, config.head_dim)
    return dataclasses.replace(config, attention_scale=scale, **rope, **windows)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`, rotary ones in the old and new spelling.

    Raises:
        ValueError: for what a Gemma 3 checkpoint cannot say.
    """
    local_theta = config.local_rope_theta
    if local_theta is None:
        local_theta = config.rope_theta
        if config.rope_scaling is not None and any(config.layer_windows):
            raise ValueError(
                "In Gemma 3 layers with a window have no rotary scaling, but the config"
                " has rope_scaling for all. Give `local_rope_theta`."
            )
    fields = _decoder.write_decoder(config, CLASSES, activation="hidden_activation")
    fields |= write_own(config) | {
        "rope_local_base_freq": local_theta,
        "rope_parameters": {
            _WHOLE: fields["rope_parameters"],
            _LOCAL: {"rope_type": "default", "rope_theta": local_theta},
        },
    }
    return _decoder.checked(fields, config, read_config)


def stored_tensors(config: ModelConfig) -> PyTree:
    """Return the parameter tree with a `Stored` in the place of every array."""
    return _decoder.stored_decoder(config)


def size(name: str) -> ModelConfig:
    """Return the config of a published size, of its text part where it sees too.

    Raises:
        ValueError: if there is no such size; the message lists those there are.
    """
    small = _OWN | {
        **{"vocab_size": 262144, "norm_epsilon": 1e-6, "max_positions": 32768},
        **{"activation": "gelu_tanh", "tie_embeddings": True, "window": 512},
        **{"rope_theta": 1e6, "local_rope_theta": 1e4},
        **{"bos_id": 2, "eos_ids": (1,), "pad_id": 0},
    }
    large = small | {
        **{"vocab_size": 262208, "max_positions": 131072, "window": 1024},
        "rope_scaling": RopeScaling(kind="linear", factor=8.0),
    }
    largest = large | {"attention_scale": 168**-0.5}
    # name: width, layers, heads, key and value heads, head, feed-forward
    table: Table = {
        "270m": (small | _repeating(18), (640, 18, 4, 1, 256, 2048)),
        "1b": (small | _repeating(26), (1152, 26, 4, 1, 256, 6912)),
        "4b": (large | _repeating(34), (2560, 34, 8, 4, 256, 10240)),
        "12b": (large | _repeating(48), (3840, 48, 16, 8, 256, 15360)),
        "27b": (largest | _repeating(62), (5376, 62, 32, 16, 128, 21504)),
    }
    return published("gemma3_text", "Gemma 3", table, name)


def _repeating(num_layers: int) -> dict[str, Any]:
    return {"windowed_layers": _windowed(num_layers, 6)}


def _windowed(num_layers: int, pattern: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % pattern != 0 for layer in range(num_layers))


def _read_both_ropes(fields: Fields, max_positions: int) -> dict[str, Any]:
    """Take out the rotary fields, of which each kind of layer has its own.

    Raises:
        ValueError: as `read_rope` does, and for scaling in layers with a window.
    """
    nested = fields.take("rope_parameters", None) or {}
    if unknown := sorted(nested.keys() - {_WHOLE, _LOCAL}):
        raise ValueError(
            f"The field 'rope_parameters' has {unknown[0]!r}; for Gemma 3 it has"
            f" {_WHOLE!r} and {_LOCAL!r}, each with its rotary fields."
        )
    theta, scaling = _rope.read_rope(fields, max_positions, 1e6, new=nested.get(_WHOLE))
    old_local = {"rope_theta": fields.take("rope_local_base_freq", None)}
    local = _rope.merged(
        _rope.one_spelling(old_local), _rope.one_spelling(nested.get(_LOCAL))
    )
    local_theta = float(local.pop("rope_theta", 1e4))
    if _rope.read_scaling(local, max_positions) is not None:
        raise ValueError(
            f"The field 'rope_parameters' scales {_LOCAL!r}; for Gemma 3 only"
            f" {_WHOLE!r} may be scaled."
        )
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": local_theta,
    }
