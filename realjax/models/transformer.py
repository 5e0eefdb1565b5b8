"""The decoder-only transformer: all of some rows, or what comes next.

    tokens -> embedding -> L x [ norm, attention, +, norm, mlp, + ] -> norm -> hidden

One layer is a Flax module used through `init` and `apply`; the loop over the stacked
layers is `jax.lax.scan`, or whatever the partition puts in its place. Masters are
float32 and are cast to the compute dtype inside the loop, one layer at a time.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.attention import attention
from pallas_kernels.paged_attention import paged_attention
from realjax.core.arrays import Array, Float, Int, PyTree, UInt
from realjax.models import block as block_lib
from realjax.models import pages as pages_lib
from realjax.models import rotary
from realjax.models.axes import (
    EMBEDDED,
    KEY_VALUE,
    OF_ROWS,
    OF_TOKENS,
    PAGE_TABLE,
    QUERY,
    RESIDUAL,
    SCALAR,
)
from realjax.models.block import INIT_DEVIATION, LAYER_INPUT, Block
from realjax.models.config import ModelConfig
from realjax.models.moe import RouterSums, router_sums
from realjax.models.norm import Norm
from realjax.models.pages import Pool
from realjax.models.parameters import (
    Parameter,
    abstract_parameters,
    init_parameters,
)
from realjax.models.partition import WHOLE, Partition
from realjax.models.projection import PRODUCT

__all__ = [
    "INIT_DEVIATION",
    "REMATS",
    "Parameter",
    "abstract_parameters",
    "extend",
    "hidden_states",
    "init_parameters",
    "run",
]

REMATS = {
    "none": "keeps everything",
    "block": "keeps the input of every layer",
    "dots": "keeps the results of the products with weights",
    "offload": "keeps the input of every layer, in host memory",
}
"""What the forward pass keeps for the backward pass; the rest is computed anew."""


class _Rows(NamedTuple):
    """What a layer needs to know of the rows, whichever layer it is."""

    segment_ids: Int[Array, "R S"]
    rotations: tuple[rotary.Rotation, ...]
    noise_keys: UInt[Array, "R S W"] | None


def hidden_states(
    parameters: PyTree,
    config: ModelConfig,
    tokens: Int[Array, "R S"],
    positions: Int[Array, "R S"],
    segment_ids: Int[Array, "R S"],
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    partition: Partition = WHOLE,
) -> Float[Array, "R S D"]:
    """Run the model over packed rows, as `run` does, and return the hidden states."""
    return run(
        parameters,
        config,
        tokens,
        positions,
        segment_ids,
        dtype=dtype,
        remat=remat,
        partition=partition,
    )[0]


def run(
    parameters: PyTree,
    config: ModelConfig,
    tokens: Int[Array, "R S"],
    positions: Int[Array, "R S"],
    segment_ids: Int[Array, "R S"],
    *,
    noise_keys: UInt[Array, "R S W"] | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    partition: Partition = WHOLE,
) -> tuple[Float[Array, "R S D"], RouterSums | None]:
    """Run the model over packed rows; a token sees the earlier ones of its segment.

    Args:
        parameters: tree of `abstract_parameters(config)`.
        config: of the model.
        tokens: ids; anything in [0, V) on padding.
        positions: place of each token in its own sequence, from 0.
        segment_ids: 1, 2, … for the sequences of a row; 0 is padding.
        noise_keys: data of a random key for each token, for the jitter of routers and
            the dropout of adapters; None is none.
        dtype: of the activations and of the matrix products.
        remat: one of `REMATS`.
        partition: how the work is split.

    Returns:
        Hidden states after the final norm, finite but meaningless on padding; and for a
        mixture of experts the sums of its routers, [L] and [L, E].
    """
    block = Block(config, dtype, partition)
    rotations = ()
    if config.positions == "rotary":
        lengths = _lengths(positions, segment_ids)
        rotations = _rotations(config, positions, lengths)

    def layer(x: Array, of_layer: PyTree, rows: _Rows) -> tuple[Array, Any]:
        weights, traits = of_layer

        def attend_on_device(query, key, value, segment_ids, traits) -> Array:
            options = _attention_options(config, traits)
            return attention(query, key, value, segment_ids=segment_ids, **options)

        attend = partition.locally(
            attend_on_device,
            (QUERY, KEY_VALUE, KEY_VALUE, OF_TOKENS, _axes_of_traits(traits)),
            QUERY,
        )

        new, _, routing = _apply(
            block,
            weights,
            x,
            block_lib.rotation(rows.rotations, traits),
            lambda *heads: (attend(*heads, rows.segment_ids, traits), None),
            rows.segment_ids,
            _fold_in(rows.noise_keys, traits.index),
        )
        sums = None
        if routing is not None and config.moe is not None:
            sums = router_sums(routing, rows.segment_ids, config.moe)
        if traits.is_real is None:
            return new, sums
        keep = functools.partial(jnp.where, traits.is_real)
        return keep(new, x), jax.tree.map(lambda s: keep(s, 0.0), sums)

    x = _embed(parameters, config, tokens, positions, dtype, partition)
    x, sums = partition.run_layers(
        _rematerialized(layer, remat),
        partition.constrain(x, RESIDUAL),
        _stacked(parameters, config),
        _Rows(segment_ids, rotations, noise_keys),
    )
    if sums is not None:
        sums = jax.tree.map(lambda s: s[: config.num_layers], sums)
    return _final_norm(parameters, config, x, dtype), sums


def extend(
    parameters: PyTree,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    pool: Pool,
    *,
    table: Int[Array, "B M"],
    first_page: Int[Array, " B"],
    start: Int[Array, " B"],
    counts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    num_pages: Int[Array, ""],
    dtype: DTypeLike = jnp.float32,
    partition: Partition = WHOLE,
) -> tuple[Float[Array, "B T D"], Pool]:
    """Run the model over the next tokens of every row, with pages of earlier ones.

    With T = 1 this is one step of decoding, with more a chunk of prompts; rows are at
    places of their own. A token sees those of its row, from first_page[b] pages on, up
    to itself, and in layers with a window no farther back than that.

    Args:
        parameters: tree of `abstract_parameters(config)`.
        config: of the model.
        tokens: ids; anything in [0, V) on padding.
        pool: keys and values of the tokens before `start`.
        table: pages of each row, those of the new tokens included; -1 is none. On a
            mesh the rows divide over the axes of rows, and ids count within a part.
        first_page: pages of each row before those in its table. Whatever is left out
            must be out of all windows.
        start: position of each row's first token given.
        counts: tokens given of each row; 0 for a row that waits. The rest is padding,
            writes nothing and takes no room of experts.
        lengths: of each sequence's prompt, which is known from its first token on; for
            rotary embeddings that look at lengths.
        num_pages: columns of the table in use by any row.
        dtype: of the activations and of the matrix products.
        partition: how the work is split; the layers are always scanned.

    Returns:
        Hidden states after the final norm (finite but meaningless on padding), and the
        pool with the new tokens written.
    """
    block = Block(config, dtype, partition)
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = start[:, None] + place
    segment_ids = (place < counts[:, None]).astype(jnp.int32)
    rotations = ()
    if config.positions == "rotary":
        # What is known of a sequence's length when its token is written for the first
        # time: rows that come back write the same keys again.
        known = jnp.maximum(lengths[:, None], positions + 1)
        rotations = _rotations(config, positions, known)

    def attend_on_device(
        query, key, value, pool, traits, table, first_page, start, counts, num_pages
    ) -> tuple[Array, Pool]:
        where = (table, first_page, start)
        pool = pages_lib.write(pool, traits.index, *where, counts, key, value)
        attended = paged_attention(
            query,
            *pool,
            layer=traits.index,
            table=table,
            first_page=first_page,
            start=start,
            num_pages=num_pages,
            **_attention_options(config, traits),
        )
        return attended, pool

    rows = (table, first_page, start, counts, num_pages)
    rows_axes = (PAGE_TABLE, OF_ROWS, OF_ROWS, OF_ROWS, SCALAR)
    pool_axes = pages_lib.axes_of(pool)

    def layer(carry: tuple[Array, Pool], index: Array):
        x, pool = carry
        weights, traits = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False),
            _stacked(parameters, config),
        )
        of_traits = _axes_of_traits(traits)
        attend = partition.locally(
            attend_on_device,
            (QUERY, KEY_VALUE, KEY_VALUE, pool_axes, of_traits, *rows_axes),
            (QUERY, pool_axes),
        )
        x, pool, _ = _apply(
            block,
            weights,
            x,
            block_lib.rotation(rotations, traits),
            lambda *heads: attend(*heads, pool, traits, *rows),
            segment_ids,
        )
        return (x, pool), None

    x = _embed(parameters, config, tokens, positions, dtype, partition)
    # The pool is in the carry: as scanned inputs and outputs it would be copied whole.
    # Layers that only pad the stack are not run.
    carry = (partition.constrain(x, RESIDUAL), pool)
    (x, pool), _ = jax.lax.scan(layer, carry, jnp.arange(config.num_layers))
    return _final_norm(parameters, config, x, dtype), pool


def _stacked(
    parameters: PyTree, config: ModelConfig
) -> tuple[PyTree, block_lib.Traits]:
    """Return what differs from layer to layer: weights and traits."""
    traits = jax.tree.map(jnp.asarray, block_lib.traits(config))
    return parameters["layers"], traits


def _axes_of_traits(traits: block_lib.Traits) -> PyTree:
    """Return the axes of one layer's traits: every device has them whole."""
    return jax.tree.map(lambda _: SCALAR, traits)


def _attention_options(config: ModelConfig, traits: block_lib.Traits) -> dict[str, Any]:
    options = {
        "window": block_lib.window(config, traits),
        "scale": block_lib.attention_scale(config, traits),
        "soft_cap": config.attention_soft_cap,
    }
    return {name: value for name, value in options.items() if value is not None}


def _rotations(
    config: ModelConfig, positions: Array, lengths: Array
) -> tuple[rotary.Rotation, ...]:
    """Return the rotation of all layers, or those without and with a window."""
    whole = rotary.rotation(config, positions, lengths)
    if config.local_rope_theta is None or config.window is None:
        return (whole,)
    local = rotary.rotation(config, positions, lengths, is_local=True)
    return (whole, local) if len(set(config.layer_windows)) > 1 else (local,)


def _lengths(positions: Array, segment_ids: Array) -> Array:
    """Return the length of each token's sequence: its last position, plus 1."""
    ahead = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    num_places = positions.shape[1]
    places = jnp.broadcast_to(jnp.arange(num_places), positions.shape)
    last = jnp.where(segment_ids != ahead, places, num_places)
    last = jax.lax.cummin(last, axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1


def _fold_in(noise_keys: Array | None, index: Array) -> Array | None:
    """Return each token's noise key for a layer."""
    if noise_keys is None:
        return None
    fold = lambda key: jax.random.key_data(
        jax.random.fold_in(jax.random.wrap_key_data(key), index)
    )
    return jax.vmap(jax.vmap(fold))(noise_keys)


def _apply(module: nn.Module, parameters: PyTree, *inputs: Any) -> Any:
    return module.apply({"params": parameters}, *inputs)


def _embed(
    parameters: PyTree,
    config: ModelConfig,
    tokens: Array,
    positions: Array,
    dtype: DTypeLike,
    partition: Partition,
) -> Array:
    take = functools.partial(jnp.take, axis=0, mode="clip")
    x = take(parameters["embedding"], tokens).astype(dtype)
    if config.is_embedding_scaled:
        x = x * jnp.asarray(math.sqrt(config.width), dtype)
    if config.positions == "learned":
        x = x + take(parameters["position_embedding"], positions).astype(dtype)
    # First cut as the embedding is: what then changes is the cut, forward and backward,
    # and no device has the gradients of all rows in their full width.
    return partition.constrain(x, EMBEDDED)


def _final_norm(
    parameters: PyTree, config: ModelConfig, x: Array, dtype: DTypeLike
) -> Array:
    norm = Norm(config.norm, config.norm_epsilon, dtype)
    return _apply(norm, parameters["final_norm"], x)


def _rematerialized(layer: Callable, remat: str) -> Callable:
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    if remat == "block":
        policy = None
    elif remat == "dots":
        policy = policies.save_only_these_names(PRODUCT)
    elif remat == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        known = ", ".join(map(repr, REMATS))
        raise ValueError(f"remat is {remat!r}; it must be one of {known}.")
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)
