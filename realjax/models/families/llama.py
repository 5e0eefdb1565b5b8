"""Llama 2, 3, 3.1, 3.2 and 3.3, and models of their architecture.

Source: Touvron et al. 2023, https://arxiv.org/abs/2307.09288, and the Llama team 2024,
https://arxiv.org/abs/2407.21783; names as in Hugging Face's `LlamaForCausalLM` and
`LlamaForSequenceClassification`.
"""

from collections.abc import Mapping
from typing import Any

from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig, RopeScaling
from realjax.models.layout import Stored

LANGUAGE_ARCHITECTURE = "LlamaForCausalLM"
SCALAR_ARCHITECTURE = "LlamaForSequenceClassification"

# Written by some versions of transformers, and computed here.
IGNORED_TENSORS = ("rotary_emb.inv_freq",)

_ACTIVATION = "hidden_act"

# Fields that do not change what a forward pass computes.
_HARMLESS_FIELDS = frozenset(
    (
        *("architectures", "transformers_version", "torch_dtype", "dtype"),
        *("use_cache", "initializer_range", "pretraining_tp", "tokenizer_class"),
        *("id2label", "label2id", "num_labels", "problem_type", "return_dict"),
        *("unk_token_id", "sep_token_id", "max_length", "min_length", "do_sample"),
        *("temperature", "top_k", "top_p", "max_sequence_length", "model_max_length"),
    )
)

_ROPE_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_max_positions",
}


def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed `config.json`.

    Raises:
        ValueError: for a missing size, and for a field or a value that would change
            what the model computes and is not supported; the message names it.
    """
    left = dict(fields)
    _require_value(left, "model_type", "llama")
    for name in ("attention_bias", "mlp_bias", "attention_dropout"):
        _require_value(left, name, False)
    _require_value(left, _ACTIVATION, "silu")
    head = _read_head(left)
    width = _take(left, "hidden_size")
    num_heads = _take(left, "num_attention_heads")
    num_kv_heads = left.pop("num_key_value_heads", None) or num_heads
    head_dim = left.pop("head_dim", None) or width // num_heads
    rope_theta, rope_scaling = _read_rope(left)
    eos = left.pop("eos_token_id", None)
    config = ModelConfig(
        family="llama",
        vocab_size=_take(left, "vocab_size"),
        width=width,
        num_layers=_take(left, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=_take(left, "intermediate_size"),
        norm_epsilon=left.pop("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=bool(left.pop("tie_word_embeddings", False)),
        head=head,
        max_positions=left.pop("max_position_embeddings", 2048),
        bos_id=left.pop("bos_token_id", None),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_id=left.pop("pad_token_id", None),
    )
    for name, value in left.items():
        if name in _HARMLESS_FIELDS or name.startswith("_") or not value:
            continue
        raise ValueError(
            f"The field {name!r} ({value!r}) is not supported for Llama models. If it"
            " does not change what the model computes, take it out of config.json."
        )
    return config


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `config.json`, rotary ones in the old and new spelling."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := config.rope_scaling:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                theirs: getattr(scaling, our) for theirs, our in _ROPE_FIELDS.items()
            }
    is_scalar = config.head == "scalar"
    fields = {
        "architectures": [SCALAR_ARCHITECTURE if is_scalar else LANGUAGE_ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        _ACTIVATION: "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": _one_or_many(config.eos_ids),
        "pad_token_id": config.pad_id,
    }
    if is_scalar:
        fields |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return fields


def stored_tensors(config: ModelConfig) -> PyTree:
    """Return the parameter tree with a `Stored` in the place of every array."""
    layer = "model.layers.{layer}."

    def matrix(name: str, *groups: tuple[int, ...]) -> dict[str, Stored]:
        return {"kernel": Stored(f"{layer}{name}_proj.weight", groups)}

    def norm(name: str) -> dict[str, Stored]:
        return {"scale": Stored(f"{layer}{name}_layernorm.weight", ((0,),))}

    heads_out = ((1, 2), (0,))  # [D, H, K] stored as [H x K, D].
    transposed = ((1,), (0,))
    tree: dict[str, Any] = {
        "embedding": Stored("model.embed_tokens.weight", ((0,), (1,))),
        "layers": {
            "attention_norm": norm("input"),
            "attention": {
                "query": matrix("self_attn.q", *heads_out),
                "key": matrix("self_attn.k", *heads_out),
                "value": matrix("self_attn.v", *heads_out),
                "output": matrix("self_attn.o", (2,), (0, 1)),
            },
            "mlp_norm": norm("post_attention"),
            "mlp": {
                "gate": matrix("mlp.gate", *transposed),
                "up": matrix("mlp.up", *transposed),
                "down": matrix("mlp.down", *transposed),
            },
        },
        "final_norm": {"scale": Stored("model.norm.weight", ((0,),))},
    }
    if config.head == "scalar":
        tree["score"] = {"kernel": Stored("score.weight", transposed)}
    elif not config.tie_embeddings:
        tree["head"] = {"kernel": Stored("lm_head.weight", transposed)}
    return tree


def size(name: str) -> ModelConfig:
    """Return the config of a published size.

    Raises:
        ValueError: if there is no such size; the message lists those there are.
    """
    #             width layers heads kv  head   mlp    tied   scaling factor
    sizes = {
        "2-7b": (4096, 32, 32, 32, 128, 11008, False, None),
        "2-13b": (5120, 40, 40, 40, 128, 13824, False, None),
        "2-70b": (8192, 80, 64, 8, 128, 28672, False, None),
        "3.1-8b": (4096, 32, 32, 8, 128, 14336, False, 8.0),
        "3.1-70b": (8192, 80, 64, 8, 128, 28672, False, 8.0),
        "3.2-1b": (2048, 16, 32, 8, 64, 8192, True, 32.0),
        "3.2-3b": (3072, 28, 24, 8, 128, 8192, True, 32.0),
    }
    if name not in sizes:
        raise ValueError(
            f"There is no Llama of size {name!r}; known sizes are: {', '.join(sizes)}."
        )
    width, layers, heads, kv_heads, head_dim, mlp_width, tied, factor = sizes[name]
    is_third = factor is not None
    return ModelConfig(
        family="llama",
        vocab_size=128256 if is_third else 32000,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=mlp_width,
        rope_theta=500000.0 if is_third else 10000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=factor) if is_third else None,
        tie_embeddings=tied,
        max_positions=131072 if is_third else 4096,
        bos_id=128000 if is_third else 1,
        eos_ids=(128001,) if is_third else (2,),
    )


def _take(left: dict[str, Any], name: str) -> Any:
    if left.get(name) is None:
        raise ValueError(f"The field {name!r} is missing; a Llama model needs it.")
    return left.pop(name)


def _require_value(left: dict[str, Any], name: str, needed: Any) -> None:
    """Take a field out, refusing any value but the one supported (or none)."""
    found = left.pop(name, needed)
    if found != needed and not (not needed and not found):
        raise ValueError(
            f"The field {name!r} is {found!r}; for Llama models only {needed!r} is"
            " supported."
        )


def _read_head(left: dict[str, Any]) -> str:
    architectures = left.pop("architectures", None) or [LANGUAGE_ARCHITECTURE]
    if architectures == [LANGUAGE_ARCHITECTURE]:
        return "language"
    if architectures != [SCALAR_ARCHITECTURE]:
        raise ValueError(
            f"The field 'architectures' is {architectures!r}; supported are"
            f" [{LANGUAGE_ARCHITECTURE!r}] and [{SCALAR_ARCHITECTURE!r}]."
        )
    num_labels = len(left.get("id2label") or (0, 0))  # transformers' default is 2.
    if num_labels != 1:
        raise ValueError(
            f"The field 'id2label' makes {num_labels} labels; reward models and"
            " critics have one (num_labels=1)."
        )
    return "scalar"


def _read_rope(left: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Read theta and scaling from transformers 4's two fields or 5's one."""
    old = dict(left.pop("rope_scaling", None) or {})
    old_theta = left.pop("rope_theta", None)
    if old_theta is not None:
        old["rope_theta"] = old_theta
    new = dict(left.pop("rope_parameters", None) or {})
    for spelling in (old, new):
        if "type" in spelling:  # The oldest spelling.
            spelling.setdefault("rope_type", spelling.pop("type"))
            spelling.pop("type", None)
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            raise ValueError(
                f"The rotary field {name!r} is {old[name]!r} in one spelling and"
                f" {new[name]!r} in 'rope_parameters'. Remove the wrong one."
            )
    rope = old | new
    theta = float(rope.pop("rope_theta", 10000.0))
    kind = rope.pop("rope_type", "default")
    if kind == "default" and not rope:
        return theta, None
    known = {"linear": ("factor",), "llama3": tuple(_ROPE_FIELDS), "default": ()}
    if kind not in known:
        raise ValueError(
            f"Rotary scaling of type {kind!r} (field 'rope_type') is not supported."
            f" Known types are: {', '.join(sorted(known))}."
        )
    if unknown := sorted(rope.keys() - set(known[kind])):
        raise ValueError(
            f"Rotary scaling of type {kind!r} has the field {unknown[0]!r}, which is"
            " not supported."
        )
    if missing := [name for name in known[kind] if name not in rope]:
        raise ValueError(f"Rotary scaling of type {kind!r} lacks {missing[0]!r}.")
    return theta, RopeScaling(
        kind=kind,
        **{ours: rope[name] for name, ours in _ROPE_FIELDS.items() if name in rope},
    )


def _one_or_many(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
