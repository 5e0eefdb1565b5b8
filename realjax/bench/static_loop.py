"""The rival of the engine: one compiled loop for a batch, until its longest row ends.

    prefill of all prompts ──▶ draw ──▶ (one token of every row ──▶ draw) × longest - 1

What a static batch can do: no slots, no pages to look up, no word with the host. Its
keys and values are a pool of one page a row, as wide as the row, which is a dense
cache. Draws are those of the engine, so it writes the same tokens.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, Bool, Float, Int, Key, PyTree
from realjax.functions.packed import ModelProgram
from realjax.models import heads, pages, transformer
from realjax.models.pages import Pool
from realjax.rl.sampling import Sampling, sample


class _State(NamedTuple):
    """What the loop carries; the last token of a row is not in the pool yet."""

    length: Int[Array, ""]
    pool: Pool
    tokens: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]
    has_ended: Bool[Array, " B"]


class StaticLoop:
    """Samples a batch of prompts of one length in one compiled program.

    Args:
        program: the model, on one device.
        sampling: how tokens are drawn; temperature and filters.
        width: T, tokens of prompt and completion together.
    """

    def __init__(self, program: ModelProgram, sampling: Sampling, *, width: int):
        """Compiles nothing yet."""
        self.program, self.sampling, self.width = program, sampling, width
        self._generate = jax.jit(self._all)

    def cache_bytes(self, batch: int) -> int:
        """Count the bytes of keys and values of a batch."""
        program = self.program
        return batch * pages.page_bytes(program.config, self.width, program.dtype)

    def __call__(
        self,
        parameters: PyTree,
        prompts: Mapping[str, np.ndarray],
        key: Key[Array, ""],
        max_new_tokens: Int[np.ndarray, " B"],
    ) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
        """Samples one completion of each prompt.

        Args:
            parameters: of the model.
            prompts: "prompts" [B, P] and "ids" [B]; all are P tokens long.
            key: as the engine's.
            max_new_tokens: of each row, at least 1.

        Returns:
            Tokens of prompt and completion, zeros after them, and log-probabilities.
        """
        ids = prompts["ids"]
        return self._generate(parameters, prompts["prompts"], ids, key, max_new_tokens)

    def _all(self, parameters, prompts, ids, key, limits):
        (batch, start), width = prompts.shape, self.width
        keys = jax.vmap(
            lambda data_id: jax.random.fold_in(jax.random.fold_in(key, data_id), 0)
        )(ids)
        dtype = jnp.dtype(self.program.dtype)
        pool = pages.empty(self.program.config, batch, width, dtype)
        hidden, pool = self._extend(parameters, prompts, pool, jnp.int32(0))
        empty = _State(
            length=jnp.int32(start),
            pool=pool,
            tokens=jnp.pad(prompts, ((0, 0), (0, width - start))),
            logprobs=jnp.zeros((batch, width), jnp.float32),
            has_ended=jnp.zeros(batch, bool),
        )
        draw = functools.partial(self._draw, parameters, keys, start, limits)

        def step(state: _State) -> _State:
            last = jax.lax.dynamic_slice_in_dim(state.tokens, state.length - 1, 1, 1)
            hidden, pool = self._extend(parameters, last, state.pool, state.length - 1)
            return draw(state._replace(pool=pool), hidden)

        state = jax.lax.while_loop(
            lambda state: ~jnp.all(state.has_ended), step, draw(empty, hidden)
        )
        return state.tokens, state.logprobs

    def _draw(self, parameters, keys, start, limits, state: _State, hidden) -> _State:
        """The next token of every row; nothing is written for those that have ended."""
        logits = heads.logits(parameters, self.program.config, hidden[:, -1])
        number, is_alive = state.length - start, ~state.has_ended
        folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
        draw = sample(logits, folded, self.sampling)
        put = functools.partial(
            jax.lax.dynamic_update_index_in_dim, index=state.length, axis=1
        )
        return state._replace(
            length=state.length + 1,
            tokens=put(state.tokens, jnp.where(is_alive, draw.tokens, 0)),
            logprobs=put(state.logprobs, jnp.where(is_alive, draw.logprobs, 0.0)),
            has_ended=state.has_ended | (number + 1 >= limits),
        )

    def _extend(self, parameters, tokens, pool: Pool, start):
        batch, count = tokens.shape
        of_rows = functools.partial(jnp.full, (batch,), dtype=jnp.int32)
        return transformer.extend(
            parameters,
            self.program.config,
            tokens,
            pool,
            table=jnp.arange(batch, dtype=jnp.int32)[:, None],
            first_page=of_rows(0),
            start=of_rows(start),
            counts=of_rows(count),
            lengths=of_rows(start + count),
            num_pages=jnp.int32(1),
            dtype=jnp.dtype(self.program.dtype),
        )
