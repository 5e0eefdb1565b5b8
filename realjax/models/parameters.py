"""The parameter tree of a model: its shapes, and its numbers at the start.

Parameters are a plain nested dict whose layer leaves are stacked, [layer, ...], and
those of experts [layer, expert, ...]. In memory the vocabulary and the stack may be
padded, with zeros, so that a strategy's parts divide them.

Matrices start as normal numbers of deviation 0.02, those that write to the residual
stream divided by sqrt(2 L) (GPT-2's rule: L layers add 2 L terms to the stream), norms
as what leaves a normalised vector alone, biases as zeros. Adapters start as nothing:
A B is 0.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Key, PyTree
from realjax.models import rotary
from realjax.models.axes import Axes
from realjax.models.block import INIT_DEVIATION, Block
from realjax.models.config import Adapters, ModelConfig

LORA = ("lora_a", "lora_b")
"""Names of the two matrices of an adapter."""


class Parameter(NamedTuple):
    """Shape and logical axes of one parameter; its master is float32.

    Attributes:
        shape: in memory.
        axes: what each dimension is.
        real_shape: without the padding, which lies at the end of a dimension.
        dtype: of a part of a quantized matrix, and of what stands beside adapters; ""
            is that of the tree.
    """

    shape: tuple[int, ...]
    axes: Axes
    real_shape: tuple[int, ...]
    dtype: str = ""


def abstract_parameters(config: ModelConfig) -> PyTree:
    """Return the parameter tree with a `Parameter` in the place of every array."""
    width, vocab = config.width, ("vocab", config.vocab_size)

    def leaf(*dimensions: tuple[str | None, int]) -> Parameter:
        axes, sizes = zip(*dimensions, strict=True)
        padded: dict[str | None, int] = {
            "vocab": config.padded_vocab_size,
            "layer": config.padded_num_layers,
        }
        shape = tuple(padded.get(name, size) for name, size in dimensions)
        return Parameter(shape, axes, sizes)

    tree: dict[str, Any] = {
        "embedding": leaf(vocab, ("embed", width)),
        "layers": jax.tree.map(
            lambda dimensions: leaf(("layer", config.num_layers), *dimensions),
            _layer(config),
            is_leaf=lambda node: isinstance(node, tuple),
        ),
        "final_norm": {
            name: leaf(*dimensions) for name, dimensions in _norm(config, width).items()
        },
    }
    if config.positions == "learned":
        places = (None, config.max_positions)
        tree["position_embedding"] = leaf(places, ("embed", width))
    if config.head == "scalar":
        # Cut by width it would cut the hidden states, which are not.
        tree["score"] = {"kernel": leaf(("norm", width), (None, 1))}
    elif not config.tie_embeddings:
        tree["head"] = {"kernel": leaf(("embed", width), vocab)}
    if config.adapters is None:
        return tree
    base_dtype = config.adapters.base_dtype
    trained, base = split(tree, config)
    typed = jax.tree.map(
        lambda leaf: leaf._replace(dtype=base_dtype),
        base,
        is_leaf=lambda node: isinstance(node, Parameter),
    )
    return join(trained, typed)


def split(tree: PyTree, config: ModelConfig) -> tuple[PyTree, PyTree]:
    """Return what of a tree like the parameters is trained, and the rest.

    Args:
        tree: nested dicts, with anything as leaves.
        config: of the model. Without adapters all is trained.
    """
    return (tree, {}) if config.adapters is None else divide(tree, (*LORA, "score"))


def divide(tree: PyTree, names: tuple[str, ...]) -> tuple[PyTree, PyTree]:
    """Return what of nested dicts lies under some names, and the rest."""
    found, rest = {}, {}
    for name, node in tree.items():
        if name in names:
            found[name] = node
        elif isinstance(node, dict):
            inside, outside = divide(node, names)
            found |= {name: inside} if inside else {}
            rest |= {name: outside} if outside else {}
        else:
            rest[name] = node
    return found, rest


def join(first: PyTree, second: PyTree) -> PyTree:
    """Undo `split`; of what both have, the first counts."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return first
    both = {name: join(first[name], second[name]) for name in first if name in second}
    return {**second, **first, **both}


def without_adapters(config: ModelConfig) -> ModelConfig:
    """Return the config of the model that adapters stand beside."""
    return dataclasses.replace(config, adapters=None)


def _layer(config: ModelConfig) -> dict[str, Any]:
    """Return the dimensions of one layer's leaves, (name, size) each."""
    heads, kv_heads = ("heads", config.num_heads), ("kv_heads", config.num_kv_heads)
    embed, head_dim = ("embed", config.width), ("head_dim", config.head_dim)

    def linear(
        name: str, inputs: tuple, outputs: tuple, has_bias: bool
    ) -> dict[str, tuple]:
        leaves: dict[str, tuple] = {"kernel": (*inputs, *outputs)}
        if has_bias:
            # One of the residual stream is as small as a norm, and whole like one.
            leaves["bias"] = tuple(
                ("norm", n) if name == "embed" else (name, n) for name, n in outputs
            )
        if config.adapters is not None and name in config.adapters.targets:
            leaves |= _adapter(config.adapters, name, inputs, outputs)
        return leaves

    attention: dict[str, Any] = {
        name: linear(name, (embed,), (number, head_dim), config.has_qkv_bias)
        for name, number in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    }
    attention["output"] = linear(
        "output", (heads, head_dim), (embed,), config.has_output_bias
    )
    if _shares_input(config):
        assert config.adapters is not None
        attention["lora_a"] = (embed, (None, config.adapters.rank))
    if config.has_query_key_norm:
        attention |= {
            name: {"scale": (head_dim,)} for name in ("query_norm", "key_norm")
        }
    layer = {
        "attention_norm": _norm(config, config.width),
        "attention": attention,
        "mlp_norm": _norm(config, config.width),
    }
    if config.has_post_norms:
        layer["attention_post_norm"] = _norm(config, config.width)
        layer["mlp_post_norm"] = _norm(config, config.width)
    mlp = ("mlp", config.mlp_width)
    if config.moe is not None:
        experts = ("expert", config.moe.num_experts)
        layer["moe"] = {
            "router": (embed, (None, config.moe.num_experts)),
            "gate": (experts, embed, mlp),
            "up": (experts, embed, mlp),
            "down": (experts, mlp, embed),
        }
        return layer
    has_bias = config.has_mlp_bias
    # Cut by its last dimension the largest matrix would be transposed to be gathered,
    # and XLA for GPUs keeps the whole transposed stack: 0.9 GiB of an 8B model on 8.
    mlp_in, whole = ("mlp_in", config.mlp_width), ("norm", config.width)
    layer["mlp"] = {
        "up": linear("up", (embed,), (mlp,), has_bias),
        "down": linear("down", (mlp_in,), (whole,), has_bias),
    }
    if config.is_gated:
        layer["mlp"]["gate"] = linear("gate", (embed,), (mlp,), has_bias)
    return layer


def _adapter(
    adapters: Adapters, name: str, inputs: tuple, outputs: tuple
) -> dict[str, tuple]:
    """Return the dimensions of an adapter's leaves: cut as its projection is."""
    rank = (None, adapters.rank)
    leaves = {"lora_a": (*inputs, rank), "lora_b": (rank, *outputs)}
    if adapters.shares_input and name in ("query", "key", "value"):
        del leaves["lora_a"]
    return leaves


def _shares_input(config: ModelConfig) -> bool:
    """Whether query, key and value have one A."""
    adapters = config.adapters
    return (
        adapters is not None and adapters.shares_input and "query" in adapters.targets
    )


def _norm(config: ModelConfig, size: int) -> dict[str, tuple]:
    names = ("scale", "bias") if config.norm == "layer" else ("scale",)
    return {name: (("norm", size),) for name in names}


def init_parameters(config: ModelConfig, key: Key[Array, ""]) -> PyTree:
    """Draw the parameters of a new model, float32.

    Under `jax.jit` with `out_shardings` every device makes its own part, of the same
    numbers, whatever the padding.
    """
    if config.adapters is not None:
        base = init_parameters(without_adapters(config), key)
        return join(init_adapters(config, key), base)
    embedding_key, layers_key, head_key = jax.random.split(key, 3)
    token = jnp.zeros((1, 1, config.width))
    places = jnp.zeros((1, 1), jnp.int32)
    turned = None
    if config.positions == "rotary":
        turned = rotary.rotation(config, places, places)

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
        return query, None  # Initialisation only needs the shape.

    def layer(key: Array) -> PyTree:
        return Block(config).init(key, token, turned, attend, places)["params"]

    def normal(key: Array, *shape: int) -> Array:
        return INIT_DEVIATION * jax.random.normal(key, shape, jnp.float32)

    norm = {"scale": jnp.full(config.width, config.norm != "gemma", jnp.float32)}
    if config.norm == "layer":
        norm["bias"] = jnp.zeros(config.width, jnp.float32)
    tree = {
        "embedding": normal(embedding_key, config.vocab_size, config.width),
        "layers": jax.vmap(layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": norm,
    }
    if config.positions == "learned":
        position_key = jax.random.fold_in(embedding_key, 1)
        shape = (config.max_positions, config.width)
        tree["position_embedding"] = normal(position_key, *shape)
    if config.head == "scalar":
        tree["score"] = {"kernel": normal(head_key, config.width, 1)}
    elif not config.tie_embeddings:
        tree["head"] = {"kernel": normal(head_key, config.width, config.vocab_size)}
    return jax.tree.map(_pad, tree, abstract_parameters(config))


def init_adapters(config: ModelConfig, key: Key[Array, ""]) -> PyTree:
    """Draw new adapters, float32: B is zero, A uniform up to 1 / sqrt(inputs).

    As Hugging Face's PEFT does.

    Returns:
        The leaves of the parameter tree that are adapters', alone.
    """
    abstract, _ = divide(abstract_parameters(config), LORA)
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        abstract, is_leaf=lambda node: isinstance(node, Parameter)
    )

    def draw(number: int, name: str, parameter: Parameter) -> Array:
        num_layers, *sizes = parameter.real_shape
        if name == "lora_b":
            return jnp.zeros(parameter.shape, jnp.float32)
        bound = 1 / math.sqrt(math.prod(sizes[:-1]))
        drawn = jax.random.uniform(
            # Apart from the keys of the parameters beside them.
            jax.random.fold_in(jax.random.fold_in(key, 1), number),
            (num_layers, *sizes),
            jnp.float32,
            -bound,
            bound,
        )
        return _pad(drawn, parameter)

    drawn = [
        draw(number, path[-1].key, parameter)
        for number, (path, parameter) in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def _pad(array: Array, parameter: Parameter) -> Array:
    sizes = zip(array.shape, parameter.shape, strict=True)
    return jnp.pad(array, [(0, padded - size) for size, padded in sizes])
