"""Mixtral: Mistral with a mixture of experts in every layer.

Source: Jiang et al. 2024, https://arxiv.org/abs/2401.04088; names as in Hugging Face's
`MixtralForCausalLM` and `MixtralForSequenceClassification`.
"""

from collections.abc import Mapping
from typing import Any

from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig, MoEConfig
from realjax.models.families import _decoder
from realjax.models.families._decoder import Classes
from realjax.models.families._fields import Fields
from realjax.models.families._sizes import Table, published

CLASSES = Classes("MixtralForCausalLM", "MixtralForSequenceClassification")
IGNORED_TENSORS = _decoder.IGNORED_TENSORS

# w1 and w3 are the gate and what it multiplies, w2 leads back.
_EXPERT = {
    name: f"block_sparse_moe.experts.{{expert}}.{theirs}"
    for name, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`; the window is in every layer, or null.

    The router's jitter and the coefficient of its loss are read too; both count in
    training only.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = Fields(fields, "Mixtral", "mixtral")
    config = _decoder.read_decoder(
        left,
        family="mixtral",
        classes=CLASSES,
        max_positions=131072,
        norm_epsilon=1e-5,
        rope_theta=1e6,
        window=left.take("sliding_window", None),
        moe=MoEConfig(
            num_experts=left.take("num_local_experts"),
            top_k=left.take("num_experts_per_tok"),
            aux_loss_coef=left.take("router_aux_loss_coef", 0.001),
            jitter=left.take("router_jitter_noise", 0.0),
        ),
    )
    left.refuse_rest(("output_router_logits",))
    return config


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`, rotary ones in the old and new spelling.

    Raises:
        ValueError: for what a Mixtral checkpoint cannot say.
    """
    fields = _decoder.write_decoder(config, CLASSES) | {"sliding_window": config.window}
    if moe := config.moe:
        fields |= {
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.aux_loss_coef,
            "router_jitter_noise": moe.jitter,
            "output_router_logits": False,
        }
    return _decoder.checked(fields, config, read_config)


def stored_tensors(config: ModelConfig) -> PyTree:
    """Return the parameter tree with a `Stored` in the place of every array."""
    return _decoder.stored_decoder(
        config, router="block_sparse_moe.gate", expert=_EXPERT
    )


def size(name: str) -> ModelConfig:
    """Return the config of a published size.

    Raises:
        ValueError: if there is no such size; the message lists those there are.
    """
    shared = {
        **{"vocab_size": 32000, "rope_theta": 1e6, "bos_id": 1, "eos_ids": (2,)},
        "moe": MoEConfig(num_experts=8, top_k=2, aux_loss_coef=0.02),
    }
    larger = shared | {
        "moe": MoEConfig(num_experts=8, top_k=2, aux_loss_coef=0.001),
        "max_positions": 65536,
    }
    # name: width, layers, heads, key and value heads, head, feed-forward
    table: Table = {
        "8x7b": (shared | {"max_positions": 32768}, (4096, 32, 32, 8, 128, 14336)),
        "8x22b": (larger, (6144, 56, 48, 8, 128, 16384)),
    }
    return published("mixtral", "Mixtral", table, name)
