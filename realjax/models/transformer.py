"""The decoder-only transformer: parameters, full forward pass, cached forward pass.

    tokens -> embedding -> L x [ norm, attention, +, norm, mlp, + ] -> norm -> hidden

Parameters are a plain nested dict whose layer leaves are stacked, [layer, ...]. One
layer is a Flax module used through `init` and `apply`; the loop over layers is
`jax.lax.scan`. Masters are float32 and are cast to the compute dtype inside the loop,
one layer at a time.

Matrices start as normal numbers of deviation 0.02, those that write to the residual
stream divided by sqrt(2 L) (GPT-2's rule: L layers add 2 L terms to the stream), and
norm scales as ones.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.attention import attention, cached_attention
from realjax.core.arrays import Array, Float, Int, Key, PyTree
from realjax.models import cache as cache_lib
from realjax.models import rotary
from realjax.models.attention import Attend, Attention
from realjax.models.axes import CACHE, RESIDUAL, Axes, Constrain, unconstrained
from realjax.models.cache import Cache
from realjax.models.config import ModelConfig
from realjax.models.mlp import GatedMLP
from realjax.models.norm import RMSNorm
from realjax.models.projection import PRODUCT

INIT_DEVIATION = 0.02


class Parameter(NamedTuple):
    """Shape and logical axes of one parameter; its master is float32."""

    shape: tuple[int, ...]
    axes: Axes


def abstract_parameters(config: ModelConfig) -> PyTree:
    """Return the parameter tree with a `Parameter` in the place of every array."""
    layers, width, mlp_width = config.num_layers, config.width, config.mlp_width
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim

    def matrix(shape: tuple[int, ...], *axes: str) -> dict[str, Parameter]:
        return {"kernel": Parameter((layers, *shape), ("layer", *axes))}

    def norm() -> dict[str, Parameter]:
        return {"scale": Parameter((layers, width), ("layer", "norm"))}

    key_value = ((width, kv_heads, head_dim), "embed", "kv_heads", "head_dim")
    tree: dict[str, Any] = {
        "embedding": Parameter((config.vocab_size, width), ("vocab", "embed")),
        "layers": {
            "attention_norm": norm(),
            "attention": {
                "query": matrix((width, heads, head_dim), "embed", "heads", "head_dim"),
                "key": matrix(*key_value),
                "value": matrix(*key_value),
                "output": matrix(
                    (heads, head_dim, width), "heads", "head_dim", "embed"
                ),
            },
            "mlp_norm": norm(),
            "mlp": {
                "gate": matrix((width, mlp_width), "embed", "mlp"),
                "up": matrix((width, mlp_width), "embed", "mlp"),
                "down": matrix((mlp_width, width), "mlp", "embed"),
            },
        },
        "final_norm": {"scale": Parameter((width,), ("norm",))},
    }
    if config.head == "scalar":
        # Cut by width it would cut the hidden states, which are not.
        tree["score"] = {"kernel": Parameter((width, 1), ("norm", None))}
    elif not config.tie_embeddings:
        tree["head"] = {
            "kernel": Parameter((width, config.vocab_size), ("embed", "vocab"))
        }
    return tree


class Block(nn.Module):
    """One layer of the stack."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rotation: rotary.Rotation, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Add attention, then the feed-forward layer, to the residual stream."""
        config = self.config
        deviation = INIT_DEVIATION / math.sqrt(2 * config.num_layers)
        shared: dict[str, Any] = {
            "kernel_init": nn.initializers.normal(INIT_DEVIATION),
            "output_init": nn.initializers.normal(deviation),
            "dtype": self.dtype,
            "constrain": self.constrain,
        }

        def norm(name: str) -> RMSNorm:
            return RMSNorm(config.norm_epsilon, self.dtype, name=name)

        with jax.named_scope("attention"):
            update, memory = Attention(config, name="attention", **shared)(
                norm("attention_norm")(x), rotation, attend
            )
            x = self.constrain(x + update, RESIDUAL)
        with jax.named_scope("mlp"):
            mlp = GatedMLP(config.mlp_width, name="mlp", **shared)
            x = self.constrain(x + mlp(norm("mlp_norm")(x)), RESIDUAL)
        return x, memory


def init_parameters(config: ModelConfig, key: Key[Array, ""]) -> PyTree:
    """Draw the parameters of a new model, float32.

    Under `jax.jit` with `out_shardings` every device makes its own part, of the same
    numbers.
    """
    embedding_key, layers_key, head_key = jax.random.split(key, 3)
    token = jnp.zeros((1, 1, config.width))
    rotation = rotary.rotation(config, jnp.zeros((1, 1), jnp.int32))

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
        return query, None  # Initialisation only needs the shape.

    def layer(key: Array) -> PyTree:
        return Block(config).init(key, token, rotation, attend)["params"]

    def normal(key: Array, *shape: int) -> Array:
        return INIT_DEVIATION * jax.random.normal(key, shape, jnp.float32)

    tree = {
        "embedding": normal(embedding_key, config.vocab_size, config.width),
        "layers": jax.vmap(layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": {"scale": jnp.ones(config.width, jnp.float32)},
    }
    if config.head == "scalar":
        tree["score"] = {"kernel": normal(head_key, config.width, 1)}
    elif not config.tie_embeddings:
        tree["head"] = {"kernel": normal(head_key, config.width, config.vocab_size)}
    return tree


def hidden_states(
    parameters: PyTree,
    config: ModelConfig,
    tokens: Int[Array, "R S"],
    positions: Int[Array, "R S"],
    segment_ids: Int[Array, "R S"],
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    constrain: Constrain = unconstrained,
) -> Float[Array, "R S D"]:
    """Run the model over packed rows; a token sees the earlier ones of its segment.

    Args:
        parameters: tree of `abstract_parameters(config)`.
        config: of the model.
        tokens: ids; anything in [0, V) on padding.
        positions: place of each token in its own sequence, from 0.
        segment_ids: 1, 2, … for the sequences of a row; 0 is padding.
        dtype: of the activations and of the matrix products.
        remat: what the backward pass computes anew: "none" keeps everything, "block"
            keeps the input of every layer, "dots" keeps the results of the products
            with weights.
        constrain: gives an activation the sharding of its logical axes.

    Returns:
        Hidden states after the final norm; finite but meaningless on padding.
    """
    rotation = rotary.rotation(config, positions)
    block = Block(config, dtype, constrain)

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
        return attention(query, key, value, segment_ids=segment_ids), None

    def layer(x: Array, weights: PyTree) -> tuple[Array, None]:
        return _apply(block, weights, x, rotation, attend)

    x = constrain(_embed(parameters, tokens, dtype), RESIDUAL)
    x, _ = jax.lax.scan(_rematerialized(layer, remat), x, parameters["layers"])
    return _final_norm(parameters, config, x, dtype)


def extend(
    parameters: PyTree,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    *,
    start: Int[Array, ""],
    first_slot: Int[Array, " B"],
    dtype: DTypeLike = jnp.float32,
    constrain: Constrain = unconstrained,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Run the model over the next T tokens of every sequence, with a cache.

    With start = 0 and T = P this reads right-aligned prompts; with T = 1 it is one
    step of decoding. Key slot j is visible to the token at slot i of sequence b if and
    only if first_slot[b] <= j <= i.

    Args:
        parameters: tree of `abstract_parameters(config)`.
        config: of the model.
        tokens: ids of the tokens at slots start to start + T.
        positions: place of each token in its own sequence, slot - first_slot; anything
            before the first slot.
        cache: keys and values of the slots before `start`.
        start: slot of the first token given.
        first_slot: slot of each sequence's first token.
        dtype: of the activations and of the matrix products.
        constrain: gives an activation the sharding of its logical axes.

    Returns:
        Hidden states after the final norm (meaningless before the first slot), and the
        cache with the new slots written.
    """
    rotation = rotary.rotation(config, positions)
    block = Block(config, dtype, constrain)

    def layer(carry: tuple[Array, Cache], indexed: tuple[PyTree, Array]):
        x, cache = carry
        weights, index = indexed

        def attend(query: Array, key: Array, value: Array) -> tuple[Array, Cache]:
            written = cache_lib.write(cache, index, start, key, value)
            written = Cache(*(constrain(stack, CACHE) for stack in written))
            keys, values = cache_lib.layer_of(written, index)
            attended = cached_attention(
                query, keys, values, start=start, first_slot=first_slot
            )
            return attended, written

        return _apply(block, weights, x, rotation, attend), None

    x = constrain(_embed(parameters, tokens, dtype), RESIDUAL)
    # The cache is in the carry: as scanned inputs and outputs it would be copied whole.
    (x, cache), _ = jax.lax.scan(
        layer, (x, cache), (parameters["layers"], jnp.arange(config.num_layers))
    )
    return _final_norm(parameters, config, x, dtype), cache


def _apply(module: nn.Module, parameters: PyTree, *inputs: Any) -> Any:
    return module.apply({"params": parameters}, *inputs)


def _embed(parameters: PyTree, tokens: Array, dtype: DTypeLike) -> Array:
    return jnp.take(parameters["embedding"], tokens, axis=0, mode="clip").astype(dtype)


def _final_norm(
    parameters: PyTree, config: ModelConfig, x: Array, dtype: DTypeLike
) -> Array:
    return _apply(RMSNorm(config.norm_epsilon, dtype), parameters["final_norm"], x)


def _rematerialized(layer: Callable, remat: str) -> Callable:
    if remat == "none":
        return layer
    if remat == "block":
        return jax.checkpoint(layer, prevent_cse=False)
    if remat == "dots":
        policy = jax.checkpoint_policies.save_only_these_names(PRODUCT)
        return jax.checkpoint(layer, prevent_cse=False, policy=policy)
    raise ValueError(f"remat is {remat!r}; it must be 'none', 'block' or 'dots'.")
