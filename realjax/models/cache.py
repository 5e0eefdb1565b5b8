"""The key and value cache of generation.

    keys, values  [layer, sequence, kv head, slot, head dim]

A slot is a place in time shared by all sequences: prompts are right-aligned, so that
every sequence writes the same slot in the same step and a step is one
`dynamic_update_slice`. The slots before `first_slot` of a sequence are never seen.
Slots come after heads because XLA keeps a transposed copy of the whole cache on GPU
otherwise.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Float, Int
from realjax.models.axes import CACHE, Axes
from realjax.models.config import ModelConfig
from realjax.models.partition import WHOLE, Partition


class Cache(NamedTuple):
    """Keys and values of every layer, sequence and slot."""

    keys: Float[Array, "L B N S K"]
    values: Float[Array, "L B N S K"]

    @property
    def num_slots(self) -> int:
        """Slots of a sequence, written or not."""
        return self.keys.shape[3]


AXES: Axes = CACHE  # Of the keys and of the values.


def empty(
    config: ModelConfig,
    batch: int,
    slots: int,
    dtype: DTypeLike,
    partition: Partition = WHOLE,
) -> Cache:
    """Make a cache of zeros for `batch` sequences of up to `slots` tokens.

    It holds the key and value heads as often as the partition repeats them, so that it
    can be cut where they are.
    """
    heads = partition.num_kv_heads(config.num_kv_heads)
    shape = (config.num_layers, batch, heads, slots, config.head_dim)
    zeros = lambda: partition.constrain(jnp.zeros(shape, dtype), CACHE)
    return Cache(zeros(), zeros())


def num_bytes(config: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> int:
    """Count the bytes of `empty(config, batch, slots, dtype)`, over all devices."""
    elements = config.num_layers * batch * config.num_kv_heads * slots * config.head_dim
    return 2 * elements * jnp.dtype(dtype).itemsize


def write(
    cache: Cache,
    layer: Int[Array, ""],
    start: Int[Array, ""] | int,
    key: Float[Array, "B T N K"],
    value: Float[Array, "B T N K"],
) -> Cache:
    """Write the keys and values of T tokens of one layer at slots start to start+T."""
    zero = jnp.zeros_like(layer)
    corner = (layer, zero, zero, jnp.asarray(start, layer.dtype), zero)

    def put(stack: Array, new: Array) -> Array:
        new_BNTK = jnp.swapaxes(new, 1, 2).astype(stack.dtype)
        return jax.lax.dynamic_update_slice(stack, new_BNTK[None], corner)

    return Cache(put(cache.keys, key), put(cache.values, value))


def layer_of(
    cache: Cache, layer: Int[Array, ""]
) -> tuple[Float[Array, "B N S K"], Float[Array, "B N S K"]]:
    """Read the keys and values of one layer."""
    read = lambda stack: jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
    return read(cache.keys), read(cache.values)
