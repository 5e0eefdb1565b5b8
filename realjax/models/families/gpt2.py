"""GPT-2: learned positions, LayerNorm, biases everywhere, one tensor for q, k and v.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
names as in Hugging Face's `GPT2LMHeadModel` and `GPT2ForSequenceClassification`.
"""

from collections.abc import Mapping
from typing import Any

from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig
from realjax.models.families import _decoder, _fields
from realjax.models.families._decoder import Classes
from realjax.models.families._fields import Fields
from realjax.models.families._sizes import Table, published
from realjax.models.layout import Stored

CLASSES = Classes("GPT2LMHeadModel", "GPT2ForSequenceClassification")
# Causal masks, which are in the files of some versions.
IGNORED_TENSORS = (".attn.bias", ".attn.masked_bias")

_OWN = {
    **{"norm": "layer", "positions": "learned", "is_gated": False},
    **{"has_qkv_bias": True, "has_output_bias": True, "has_mlp_bias": True},
}
# Dropout, the head of another class, and how scores are rounded in half precision
# (here always float32).
_HARMLESS = (
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"),
    *("summary_type", "summary_use_proj", "summary_activation"),
    *("summary_proj_to_labels", "reorder_and_upcast_attn", "task_specific_params"),
    # In the files of the larger models as they were published.
    *("predict_special_tokens", "output_past"),
)
_LAYER = "transformer.h.{layer}."


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = Fields(fields, "GPT-2", "gpt2")
    width, num_heads = left.count("n_embd"), left.count("n_head")
    if width % num_heads:
        raise ValueError(
            f"The field 'n_embd' is {width}, which 'n_head' {num_heads} does not"
            " divide; a GPT-2 model has no other head width."
        )
    max_positions = left.count("n_positions")
    left.only("n_ctx", max_positions)
    ties = left.take("tie_word_embeddings", None)
    is_scaled = left.take("scale_attn_weights", True)
    config = ModelConfig(
        family="gpt2",
        head=left.head(*CLASSES),
        vocab_size=left.count("vocab_size"),
        width=width,
        num_layers=left.count("n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        mlp_width=left.count("n_inner", 4 * width),
        activation=left.activation("activation_function", "gelu_new"),
        norm_epsilon=left.take("layer_norm_epsilon", 1e-5),
        attention_scale=None if is_scaled else 1.0,
        is_scaled_by_layer=bool(left.take("scale_attn_by_inverse_layer_idx", False)),
        tie_embeddings=True if ties is None else bool(ties),
        max_positions=max_positions,
        **left.ids(),
        **_OWN,
    )
    left.refuse_rest(_HARMLESS)
    return config


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`.

    Raises:
        ValueError: for what a GPT-2 checkpoint cannot say.
    """
    fields = {
        **_fields.written_head(config.head, *CLASSES),
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_positions,
        "activation_function": _fields.written_activation(
            config.activation, tanh="gelu_new"
        ),
        "layer_norm_epsilon": config.norm_epsilon,
        "scale_attn_weights": config.attention_scale != 1.0,
        "scale_attn_by_inverse_layer_idx": config.is_scaled_by_layer,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        **_fields.written_ids(config.bos_id, config.eos_ids, config.pad_id),
    }
    return _decoder.checked(fields, config, read_config)


def stored_tensors(config: ModelConfig) -> PyTree:
    """Return the parameter tree with a `Stored` in the place of every array."""

    def attention(index: int) -> dict[str, Stored]:
        return {
            "kernel": Stored(
                f"{_LAYER}attn.c_attn.weight", ((0,), (1, 2)), (1, index, 3)
            ),
            "bias": Stored(f"{_LAYER}attn.c_attn.bias", ((0, 1),), (0, index, 3)),
        }

    def linear(name: str, *groups: tuple[int, ...]) -> dict[str, Stored]:
        return {
            "kernel": Stored(f"{_LAYER}{name}.weight", groups),
            "bias": Stored(f"{_LAYER}{name}.bias", ((0,),)),
        }

    def norm(name: str) -> dict[str, Stored]:
        return {
            "scale": Stored(f"{name}.weight", ((0,),)),
            "bias": Stored(f"{name}.bias", ((0,),)),
        }

    as_it_is = ((0,), (1,))  # Its matrices are stored [inputs, outputs].
    tree: dict[str, Any] = {
        "embedding": Stored("transformer.wte.weight", as_it_is),
        "position_embedding": Stored("transformer.wpe.weight", as_it_is),
        "layers": {
            "attention_norm": norm(f"{_LAYER}ln_1"),
            "attention": {
                **{
                    name: attention(index)
                    for index, name in enumerate(("query", "key", "value"))
                },
                "output": linear("attn.c_proj", (0, 1), (2,)),
            },
            "mlp_norm": norm(f"{_LAYER}ln_2"),
            "mlp": {
                "up": linear("mlp.c_fc", *as_it_is),
                "down": linear("mlp.c_proj", *as_it_is),
            },
        },
        "final_norm": norm("transformer.ln_f"),
    }
    if config.head == "scalar":
        tree["score"] = {"kernel": Stored("score.weight", ((1,), (0,)))}
    elif not config.tie_embeddings:
        tree["head"] = {"kernel": Stored("lm_head.weight", ((1,), (0,)))}
    return tree


def size(name: str) -> ModelConfig:
    """Return the config of a published size.

    Raises:
        ValueError: if there is no such size; the message lists those there are.
    """
    shared = _OWN | {
        **{"vocab_size": 50257, "activation": "gelu_tanh", "max_positions": 1024},
        **{"tie_embeddings": True, "bos_id": 50256, "eos_ids": (50256,)},
    }
    # name: width, layers, heads, key and value heads, head, feed-forward
    table: Table = {
        "124m": (shared, (768, 12, 12, 12, 64, 3072)),
        "355m": (shared, (1024, 24, 16, 16, 64, 4096)),
        "774m": (shared, (1280, 36, 20, 20, 64, 5120)),
        "1.5b": (shared, (1600, 48, 25, 25, 64, 6400)),
    }
    return published("gpt2", "GPT-2", table, name)
