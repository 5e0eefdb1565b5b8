"""What the calls of one step have made so far, on the devices that made it.

A key that a call on another mesh needs is sent there once, by the routes of
reallocation, and stays; keys of the data set go up from the host once a mesh.
"""

import collections
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array
from realjax.core.batch import Batch
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import handles, rows_sharding
from realjax.realloc.transfer import Traffic, move_array


class Buffer:
    """The batch of one step.

    Attributes:
        ids, samples: of each row, [B]; grow with the completions of a prompt.
        columns: text and other fields of each row.
        lengths: tokens of each row, by the key of the tokens.
        traffic: bytes of keys that moved between meshes.
        sends: how often each (key, layout) was sent; one, unless rows were repeated.
    """

    def __init__(self, batch: Batch, traffic: Traffic | None = None):
        """Starts from a batch of the data set.

        Args:
            batch: of the data set.
            traffic: counts what moves; added to. None is a new one.
        """
        self.ids, self.samples = batch.ids, batch.samples
        self.columns: Mapping[str, list] = batch.columns
        self.lengths = {"tokens": batch.lengths, "prompts": batch.lengths}
        self.traffic = traffic or Traffic()
        self.sends: collections.Counter = collections.Counter()
        self._made: dict[str, Array | np.ndarray] = {
            key: value for key, value in batch.arrays.items() if value is not None
        }
        for key, value in batch.arrays.items():  # Of other sequences beside them.
            if key.endswith("_lengths"):
                self.lengths[key.removesuffix("lengths") + "tokens"] = np.asarray(value)
        self._copies: dict[tuple, Array] = {}

    @property
    def size(self) -> int:
        """Rows."""
        return len(self.ids)

    def __contains__(self, key: str) -> bool:
        """Whether a call or the data set has given `key`."""
        return key in self._made

    def begin_step(self, traffic: Traffic) -> None:
        """Goes on in another step than it was begun in.

        Args:
            traffic: counts what moves from now on; added to.
        """
        self.traffic, self._copies = traffic, {}
        self.sends.clear()

    def put(self, key: str, value: Array | np.ndarray) -> None:
        """Adds what a call has made."""
        self._made[key] = value

    def get(self, key: str, allocation: Allocation) -> Array:
        """The key on the mesh of an allocation, rows split over data and fsdp."""
        place = (key, allocation.layout_key)
        if place not in self._copies:
            value = self._made[key]
            target = rows_sharding(make_mesh(allocation), value.shape[0])
            if isinstance(value, jax.Array) and value.sharding.is_equivalent_to(
                target, value.ndim
            ):
                self._copies[place] = value
            else:
                self.sends[place] += 1
                self._copies[place] = move_array(value, target, traffic=self.traffic)
        return self._copies[place]

    def value(self, key: str) -> Array | np.ndarray:
        """The key where it was made."""
        return self._made[key]

    def host(self, key: str) -> np.ndarray:
        """The key as NumPy, in a run of one process; waits until it is there."""
        return np.asarray(self._made[key])

    def replace(
        self,
        ids: np.ndarray,
        columns: Mapping[str, list],
        prompt_lengths: np.ndarray,
    ) -> None:
        """Make the rows those of other data, before any call has made a key.

        The prompts of the data set stay what they were; completions hold theirs.

        Args:
            ids: of the data.
            columns: of the data.
            prompt_lengths: tokens of the prompts.
        """
        self.ids, self.columns = ids, columns
        self.samples = np.zeros(len(ids), np.int32)
        self.lengths = dict.fromkeys(self.lengths, prompt_lengths)

    def repeat(self, count: int) -> None:
        """Gives every row of the data set `count` completions, in a row.

        Keys sent before this are sent anew, with the new rows, where they are needed.
        """
        if count == 1:
            return
        size = self.size
        self.ids = np.repeat(self.ids, count)
        self.samples = np.tile(np.arange(count, dtype=np.int32), size)
        self.columns = {
            name: [value for value in values for _ in range(count)]
            for name, values in self.columns.items()
        }
        self.lengths = {
            key: lengths if key == "prompts" else np.repeat(lengths, count)
            for key, lengths in self.lengths.items()
        }
        for key, value in self._made.items():
            if key == "prompts" or value.shape[0] != size:
                continue
            on_host = isinstance(value, np.ndarray)
            repeat = np.repeat if on_host else _repeat
            self._made[key] = repeat(value, count, axis=0)
            self._copies = {k: v for k, v in self._copies.items() if k[0] != key}


def _repeat(value: Any, count: int, *, axis: int) -> Array:
    """Repeat rows on the devices that hold them; elsewhere, only in name."""
    repeat = functools.partial(jnp.repeat, repeats=count, axis=axis)
    rows = value.sharding
    if rows.addressable_devices:
        return jax.jit(repeat, out_shardings=rows)(value)
    made = jax.eval_shape(repeat, value)
    return handles(jax.ShapeDtypeStruct(made.shape, made.dtype, sharding=rows))
