"""Qwen3 with a mixture of experts in every layer.

Source: Qwen team 2025, https://arxiv.org/abs/2505.09388; names as in Hugging Face's
`Qwen3MoeForCausalLM` and `Qwen3MoeForSequenceClassification`.
"""

from collections.abc import Mapping
from typing import Any

from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig, MoEConfig
from realjax.models.families import _decoder
from realjax.models.families._decoder import Classes
from realjax.models.families._fields import Fields
from realjax.models.families._sizes import Table, published

CLASSES = Classes("Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification")
IGNORED_TENSORS = _decoder.IGNORED_TENSORS

# The width of feed-forward layers without experts, of which there are none, and the
# first layer with a window, which transformers does not look at: all have it.
_HARMLESS = ("intermediate_size", "max_window_layers", "output_router_logits")


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`; a window is in every layer, if it is used.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = Fields(fields, "Qwen3-MoE", "qwen3_moe")
    left.only("decoder_sparse_step", 1)
    left.only("mlp_only_layers", [])
    is_windowed = left.take("use_sliding_window", False)
    window = left.take("sliding_window", 4096)
    config = _decoder.read_decoder(
        left,
        family="qwen3_moe",
        classes=CLASSES,
        max_positions=32768,
        mlp_field="moe_intermediate_size",
        has_query_key_norm=True,
        window=window if is_windowed else None,
        moe=MoEConfig(
            num_experts=_read_num_experts(left),
            top_k=left.take("num_experts_per_tok"),
            is_normalized=bool(left.take("norm_topk_prob", False)),
            aux_loss_coef=left.take("router_aux_loss_coef", 0.001),
        ),
        **_decoder.read_bias(left),
    )
    left.refuse_rest(_HARMLESS)
    return config


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`, rotary ones in the old and new spelling.

    Raises:
        ValueError: for what a Qwen3-MoE checkpoint cannot say.
    """
    fields = _decoder.write_decoder(config, CLASSES) | {
        "attention_bias": config.has_qkv_bias,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "moe_intermediate_size": config.mlp_width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
    }
    if moe := config.moe:
        fields |= {
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.is_normalized,
            "router_aux_loss_coef": moe.aux_loss_coef,
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
    shared = {
        **{"vocab_size": 151936, "rope_theta": 1e6, "norm_epsilon": 1e-6},
        **{"has_query_key_norm": True, "max_positions": 40960},
        **{"bos_id": 151643, "eos_ids": (151645,)},
        "moe": MoEConfig(num_experts=128, top_k=8, aux_loss_coef=0.001),
    }
    # name: width, layers, heads, key and value heads, head, feed-forward
    table: Table = {
        "30b-a3b": (shared, (2048, 48, 32, 4, 128, 768)),
        "235b-a22b": (shared, (4096, 94, 64, 4, 128, 1536)),
    }
    return published("qwen3_moe", "Qwen3-MoE", table, name)


def _read_num_experts(fields: Fields) -> int:
    """Take out the field that transformers 5 calls otherwise than 4 did."""
    new = fields.take("num_local_experts", None)
    if new is None:
        return fields.take("num_experts")
    old = fields.take("num_experts", None)
    if old not in (None, new):
        raise ValueError(
            f"The field 'num_experts' is {old} and 'num_local_experts' is {new}."
            " Remove the wrong one."
        )
    return new
