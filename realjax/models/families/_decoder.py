"""What the families built like Llama share: fields, windows and names of tensors.

Every family's file says what is its own; a file that starts with "_" is no family.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig
from realjax.models.families import _fields, _rope
from realjax.models.families._fields import Fields
from realjax.models.layout import Stored

# Written by some versions of transformers, and computed here.
IGNORED_TENSORS = ("rotary_emb.inv_freq",)

_LAYER = "model.layers.{layer}."


class Classes(NamedTuple):
    """Names of transformers' classes of a family."""

    language: str
    scalar: str


def read_decoder(
    fields: Fields,
    *,
    family: str,
    classes: Classes,
    max_positions: int,
    kv_heads_default: bool = False,
    head_dim: int | None = None,
    norm_epsilon: float = 1e-6,
    rope_theta: float = 10000.0,
    tie_embeddings: bool = False,
    mlp_field: str = "intermediate_size",
    activation: tuple[str, str] = ("hidden_act", "silu"),
    has_rope: bool = True,
    **own: Any,
) -> ModelConfig:
    """Take out the fields that all these families have.

    Args:
        fields: of the config; the family takes out its own, and refuses the rest.
        family: name of the module.
        classes: of transformers.
        max_positions: default of 'max_position_embeddings', as the following are of
            other fields, and as in transformers.
        kv_heads_default: whether 'num_key_value_heads' may be missing, and is then
            that of the query heads.
        head_dim: None is the width divided by the heads.
        norm_epsilon: of 'rms_norm_eps'.
        rope_theta: of the rotary base.
        tie_embeddings: of 'tie_word_embeddings'.
        mlp_field: the field with the feed-forward width.
        activation: its field, and the default.
        has_rope: whether the rotary fields are read here.
        own: fields of `ModelConfig` that the family sets.

    Raises:
        ValueError: for a field that is missing or has an unsupported value.
    """
    head = fields.head(*classes)
    width, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    default = (num_heads,) if kv_heads_default else ()
    num_kv_heads = fields.count("num_key_value_heads", *default)
    max_positions = fields.count("max_position_embeddings", max_positions)
    if has_rope:
        theta, scaling = _rope.read_rope(fields, max_positions, rope_theta)
        own = {"rope_theta": theta, "rope_scaling": scaling} | own
    ties = fields.take("tie_word_embeddings", None)
    epsilon = fields.take("rms_norm_eps", None)
    return ModelConfig(
        family=family,
        head=head,
        vocab_size=fields.count("vocab_size"),
        width=width,
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.count("head_dim", head_dim or width // num_heads),
        mlp_width=fields.count(mlp_field),
        activation=fields.activation(*activation),
        norm_epsilon=norm_epsilon if epsilon is None else epsilon,
        tie_embeddings=tie_embeddings if ties is None else bool(ties),
        max_positions=max_positions,
        **fields.ids(),
        **own,
    )


def write_decoder(
    config: ModelConfig, classes: Classes, *, activation: str = "hidden_act"
) -> dict[str, Any]:
    """Return the fields that all these families have."""
    return {
        **_fields.written_head(config.head, *classes),
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        activation: _fields.written_activation(config.activation),
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        **_rope.write_rope(config.rope_theta, config.rope_scaling),
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        **_fields.written_ids(config.bos_id, config.eos_ids, config.pad_id),
    }


def read_bias(fields: Fields) -> dict[str, Any]:
    """Take 'attention_bias' out: one of all four projections, or of none."""
    has_bias = bool(fields.take("attention_bias", None))
    return {"has_qkv_bias": has_bias, "has_output_bias": has_bias}


def windows(window: int | None, is_windowed: tuple[bool, ...]) -> dict[str, Any]:
    """Return the fields of `ModelConfig` for the layers with a window.

    Args:
        window: of those layers.
        is_windowed: for each layer.
    """
    if window is None or not any(is_windowed):
        return {"window": None, "windowed_layers": ()}
    layers = () if all(is_windowed) else is_windowed
    return {"window": window, "windowed_layers": layers}


def read_last_windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Take out Qwen's fields of windows: off, in layers listed, or in the last ones.

    Raises:
        ValueError: for layers with a window that has no size, or is off.
    """
    is_used = bool(fields.take("use_sliding_window", False))
    window = fields.take("sliding_window", 4096) if is_used else None
    first = fields.take("max_window_layers", None)
    is_windowed = fields.layer_types(num_layers)
    if not is_used:
        fields.take("sliding_window", None)
    if is_windowed is None:
        first = 28 if first is None else first  # As transformers has it.
        is_windowed = tuple(layer >= first for layer in range(num_layers))
    elif any(is_windowed) and window is None:
        raise ValueError(
            "The field 'layer_types' has 'sliding_attention', but 'use_sliding_window'"
            " is off or 'sliding_window' is null."
        )
    return windows(window, is_windowed)


def write_last_windows(config: ModelConfig) -> dict[str, Any]:
    """Return Qwen's fields of windows."""
    types = layer_types(config)
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        # Only read where there is no 'layer_types'.
        "max_window_layers": types.count("full_attention"),
        "layer_types": types,
    }


def layer_types(config: ModelConfig) -> list[str]:
    """Return the field of this name."""
    return [
        "full_attention" if window is None else "sliding_attention"
        for window in config.layer_windows
    ]


def stored_decoder(
    config: ModelConfig,
    *,
    router: str = "mlp.gate",
    expert: Mapping[str, str] | None = None,
) -> PyTree:
    """Return the parameter tree with a `Stored` in the place of every array.

    Args:
        config: of the model.
        router: name of the router in a layer, if there are experts.
        expert: names of the projections "gate", "up" and "down" of an expert.
    """
    transposed = ((1,), (0,))
    layers: dict[str, Any] = {"attention": _stored_attention(config)}
    norms = {"attention_norm": "input", "mlp_norm": "post_attention"}
    if config.has_post_norms:
        norms = {
            "attention_norm": "input",
            "attention_post_norm": "post_attention",
            "mlp_norm": "pre_feedforward",
            "mlp_post_norm": "post_feedforward",
        }
    for name, theirs in norms.items():
        layers[name] = {"scale": Stored(f"{_LAYER}{theirs}_layernorm.weight", ((0,),))}
    names = ("gate", "up", "down")
    if config.moe is not None:
        expert = expert or {
            name: f"mlp.experts.{{expert}}.{name}_proj" for name in names
        }
        layers["moe"] = {
            "router": Stored(f"{_LAYER}{router}.weight", transposed),
            **{
                name: Stored(f"{_LAYER}{theirs}.weight", transposed)
                for name, theirs in expert.items()
            },
        }
    else:
        layers["mlp"] = {
            name: _linear(f"mlp.{name}_proj", transposed, ((0,),), config.has_mlp_bias)
            for name in names
        }
    tree: dict[str, Any] = {
        "embedding": Stored("model.embed_tokens.weight", ((0,), (1,))),
        "layers": layers,
        "final_norm": {"scale": Stored("model.norm.weight", ((0,),))},
    }
    if config.head == "scalar":
        tree["score"] = {"kernel": Stored("score.weight", transposed)}
    elif not config.tie_embeddings:
        tree["head"] = {"kernel": Stored("lm_head.weight", transposed)}
    return tree


def checked(
    fields: dict[str, Any],
    config: ModelConfig,
    read: Callable[[Mapping[str, Any]], ModelConfig],
) -> dict[str, Any]:
    """Return the fields, if they say all that the config does.

    Args:
        fields: written of the config.
        config: of the model.
        read: the family's reader.

    Raises:
        ValueError: if a model of this family has no field for what the config says;
            saved so, it would compute something else when it is loaded.
    """
    before, after = _meaning(config), _meaning(read(fields))
    for name, value in before.items():
        if after[name] != value:
            raise ValueError(
                f"A checkpoint of family {config.family!r} cannot say that {name} is"
                f" {value!r}; it would be read as {after[name]!r}. Change the config or"
                " its family."
            )
    return fields


def _stored_attention(config: ModelConfig) -> dict[str, Any]:
    heads_out = ((1, 2), (0,))  # [D, H, K] stored as [H x K, D].
    attention = {
        name: _linear(
            f"self_attn.{name[0]}_proj", heads_out, ((0, 1),), config.has_qkv_bias
        )
        for name in ("query", "key", "value")
    }
    attention["output"] = _linear(
        "self_attn.o_proj", ((2,), (0, 1)), ((0,),), config.has_output_bias
    )
    if config.has_query_key_norm:
        for name in ("query", "key"):
            stored = Stored(f"{_LAYER}self_attn.{name[0]}_norm.weight", ((0,),))
            attention[f"{name}_norm"] = {"scale": stored}
    return attention


def _linear(
    name: str,
    kernel: tuple[tuple[int, ...], ...],
    bias: tuple[tuple[int, ...], ...],
    has_bias: bool,
) -> dict[str, Stored]:
    stored = {"kernel": Stored(f"{_LAYER}{name}.weight", kernel)}
    if has_bias:
        stored["bias"] = Stored(f"{_LAYER}{name}.bias", bias)
    return stored


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """Return what of a config a checkpoint has to say, one spelling for each meaning.

    Padding is of the memory, and losses, jitter and capacity of experts are of a run.
    """
    windowed = any(config.layer_windows)
    meaning: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("vocab_multiple", "layer_multiple", "windowed_layers")
    }
    if not windowed:
        meaning["local_rope_theta"] = None
    elif config.local_rope_theta is None and config.rope_scaling is None:
        meaning["local_rope_theta"] = config.rope_theta
    meaning["window"] = config.layer_windows
    meaning["attention_scale"] = config.attention_scale or config.head_dim**-0.5
    if config.moe is not None:
        moe = config.moe
        meaning["moe"] = (moe.num_experts, moe.top_k, moe.is_normalized)
    if scaling := config.rope_scaling:
        values = [getattr(scaling, ours) for _, ours in _rope.fields_of(scaling)]
        original = scaling.kind == "dynamic" and scaling.original_max_positions
        meaning["rope_scaling"] = (scaling.kind, *values, original)
    return meaning
