"""The same numbers without packing, microbatches or a cache: one row a sequence."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, PyTree
from realjax.data.packing import Packing, pack
from realjax.functions.packed import ModelProgram
from realjax.models import heads, transformer
from realjax.models.config import ModelConfig
from realjax.parallel import (
    Allocation,
    make_mesh,
    parameter_shardings,
    partition_for,
    rows_sharding,
)
from realjax.testing import tiny_model


def sharp_parameters(config: ModelConfig, seed: int = 0) -> PyTree:
    """New parameters that make much of a token: logits and scores of about 2.

    The same numbers whatever the padding.
    """
    generator = np.random.default_rng(seed)

    def draw(path: tuple, leaf: transformer.Parameter) -> Array:
        noise = generator.standard_normal(leaf.real_shape, np.float32)
        name = jax.tree_util.keystr(path)
        is_head = "head" in name or "score" in name
        drawn = (0.4 if is_head else 0.1) * noise
        if "scale" in name:
            drawn = drawn + (config.norm != "gemma")
        sizes = zip(leaf.real_shape, leaf.shape, strict=True)
        return jnp.pad(drawn, [(0, padded - size) for size, padded in sizes])

    return jax.tree_util.tree_map_with_path(
        draw,
        transformer.abstract_parameters(config),
        is_leaf=lambda node: isinstance(node, transformer.Parameter),
    )


def mesh_of(text: str) -> jax.sharding.Mesh:
    """The mesh of an allocation, on the first devices."""
    return make_mesh(Allocation.parse(text))


def model_on(text: str, config: ModelConfig | None = None, **options) -> ModelProgram:
    """A tiny model as a function compiled for an allocation knows it."""
    allocation = Allocation.parse(text)
    return ModelProgram(
        config=config or tiny_model(),
        partition=partition_for(make_mesh(allocation), options=allocation.options),
        options=allocation.options,
        **options,
    )


def parameters_on(text: str, config: ModelConfig, parameters: PyTree) -> PyTree:
    """A copy of the parameters as an allocation keeps them."""
    abstract = transformer.abstract_parameters(config)
    allocation = Allocation.parse(text)
    shardings = parameter_shardings(
        abstract, make_mesh(allocation), options=allocation.options
    )
    return jax.device_put(jax.tree.map(np.asarray, parameters), shardings)


def batch_on(text: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """Arrays whose rows are split over data and fsdp."""
    mesh = mesh_of(text)
    return {
        key: jax.device_put(value, rows_sharding(mesh, len(value)))
        for key, value in arrays.items()
    }


def pack_groups(
    lengths: Sequence[int] | np.ndarray,
    groups: Sequence[Sequence[int]],
    *,
    unit: int = 1,
    width: int = 24,
    num_shards: int = 1,
) -> list[Packing]:
    """One microbatch for each group of rows, all of the same shape."""
    packings = []
    for group in groups:
        chosen = np.zeros_like(lengths)
        chosen[list(group)] = np.asarray(lengths)[list(group)]
        (packing,) = pack(
            chosen,
            row_length=width,
            num_rows=-(-len(chosen) // num_shards) * num_shards,
            max_sequences=len(chosen),
            width=width,
            num_shards=num_shards,
            unit=unit,
        )
        packings.append(packing)
    return packings


def pack_all(
    lengths: Sequence[int] | np.ndarray,
    *,
    num_rows: int = 4,
    row_length: int = 24,
    width: int = 24,
    **options,
) -> list[Packing]:
    """As many microbatches as it takes."""
    options = {"max_sequences": 8, **options}
    return pack(
        np.asarray(lengths),
        row_length=row_length,
        num_rows=num_rows,
        width=width,
        **options,
    )


@functools.partial(jax.jit, static_argnums=1)
def plain_hidden(parameters: PyTree, config: ModelConfig, tokens: Array) -> Array:
    """Hidden states [B, T, D]; what follows a sequence is behind what it sees."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return transformer.hidden_states(
        parameters, config, tokens, positions, jnp.ones_like(tokens)
    )


@functools.partial(jax.jit, static_argnums=1)
def plain_logits(parameters: PyTree, config: ModelConfig, tokens: Array) -> Array:
    """Logits [B, T, V] of the token after each."""
    hidden = plain_hidden(parameters, config, tokens)
    return heads.logits(parameters, config, hidden)


@functools.partial(jax.jit, static_argnums=1)
def plain_scalars(parameters: PyTree, config: ModelConfig, tokens: Array) -> Array:
    """What a scalar head says after each token, [B, T]."""
    return heads.scalars(parameters, plain_hidden(parameters, config, tokens))


def log_softmax(logits: np.ndarray, is_kept: np.ndarray | None = None) -> np.ndarray:
    """Over the tokens kept, in float64; -inf for the others."""
    logits = np.asarray(logits, np.float64)
    if is_kept is not None:
        logits = np.where(is_kept, logits, -np.inf)
    highest = logits.max(axis=-1, keepdims=True)
    total = np.exp(logits - highest).sum(axis=-1, keepdims=True)
    return logits - highest - np.log(total)


def plain_logprobs(
    parameters: PyTree,
    config: ModelConfig,
    tokens: np.ndarray,
    lengths: np.ndarray,
    *,
    temperature: float = 1.0,
    is_kept: np.ndarray | None = None,
) -> np.ndarray:
    """Log-probability of each token but the first, [B, T] float64; 0 on padding."""
    logits = np.asarray(plain_logits(parameters, config, tokens), np.float64)
    ahead = log_softmax(
        logits[:, :-1] / temperature, None if is_kept is None else is_kept[:, 1:]
    )
    found = np.zeros(tokens.shape)
    found[:, 1:] = np.take_along_axis(ahead, tokens[:, 1:, None], axis=2)[:, :, 0]
    return np.where(np.arange(tokens.shape[1]) < lengths[:, None], found, 0.0)
