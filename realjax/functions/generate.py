"""Generate: prefill and decoding in one compiled loop, ids and log-probabilities out.

Prompts stand right-aligned in the cache, so every row writes the same slot in the same
step and the loop body is one token for all rows:

    slot      0 1 2 3 4 | 5 6 7 …          P = 5 prompt slots, then one a step
    row 0     · · A B C | d e $            first_slot 2, ends at $
    row 1     D E F G H | i j k …          first_slot 0

The loop ends when every row has ended. A row's draws depend on its own key, folded
with the position in its completion, and on nothing else: not on the batch, its order,
the wave it runs in or the mesh.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, Bool, Float, Int, Key, PyTree
from realjax.functions.function import Generate
from realjax.functions.packed import ModelProgram
from realjax.models import cache as cache_lib
from realjax.models import heads, transformer
from realjax.parallel.sharding import rows_sharding
from realjax.rl import sampling as sampling_lib


class Rollout(NamedTuple):
    """Completions of a wave, one row each; tokens [prompt, completion, padding]."""

    tokens: Int[Array, "B T"]
    completion_mask: Bool[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    is_truncated: Bool[Array, " B"]
    lengths: Int[Array, " B"]
    kept: Array | None


class _Decoding(NamedTuple):
    """What the loop carries; outputs are indexed by the position in the completion."""

    step: Int[Array, ""]
    logits: Float[Array, "B V"]
    cache: cache_lib.Cache
    has_ended: Bool[Array, " B"]
    num_tokens: Int[Array, " B"]
    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    kept: Array | None


class GenerateProgram:
    """The compiled form of one `Generate` on one mesh.

    Args:
        spec: sampling and completions per prompt.
        program: the model.
        mesh: of the call.
        eos_ids: ids that end a completion.
        num_rows: completions sampled at the same time; more go in waves.
        width: T, tokens of prompt and completion together.
    """

    def __init__(
        self,
        spec: Generate,
        program: ModelProgram,
        mesh: jax.sharding.Mesh,
        *,
        eos_ids: tuple[int, ...],
        num_rows: int,
        width: int,
    ):
        """Compiles nothing yet: there is one program for each prompt width."""
        self.spec, self.program, self.mesh = spec, program, mesh
        self.eos_ids, self.num_rows, self.width = eos_ids, num_rows, width
        self._rows = rows_sharding(mesh, num_rows)
        self._wave = jax.jit(self._generate, out_shardings=self._rows)
        self._join = jax.jit(self._join_waves, static_argnums=1)

    def num_waves(self, num_prompts: int) -> int:
        """Waves that the completions of so many prompts take."""
        return -(-num_prompts * self.spec.completions_per_prompt // self.num_rows)

    def described(self, num_prompts: int) -> Rollout:
        """Shapes, types and shardings of all completions of so many prompts."""
        size = num_prompts * self.spec.completions_per_prompt
        rows = rows_sharding(self.mesh, size)

        def leaf(dtype, *sizes: int) -> Any:
            return jax.ShapeDtypeStruct((size, *sizes), dtype, sharding=rows)

        config = self.program.config
        form = sampling_lib.kept_width(self.spec.sampling, config.vocab_size)
        return Rollout(
            tokens=leaf(jnp.int32, self.width),
            completion_mask=leaf(jnp.bool_, self.width),
            old_logprobs=leaf(jnp.float32, self.width),
            is_truncated=leaf(jnp.bool_),
            lengths=leaf(jnp.int32),
            kept=form and leaf(_kept_dtype(form), self.width, form[1]),
        )

    def wave(
        self,
        parameters: PyTree,
        prompts: Mapping[str, np.ndarray | Array],
        key: Key[Array, ""],
        index: int,
    ) -> Rollout:
        """Samples the completions of one wave.

        Args:
            parameters: on this mesh.
            prompts: "prompts" [B, P] left-aligned, "lengths" [B] (0 for a padding row;
                on the host) and "ids" [B] of the data.
            key: of this call in this step.
            index: which wave. Rows in order are prompt 0's completions, prompt 1's, …

        Raises:
            ValueError: a prompt and its longest completion are wider than `width`.
        """
        group, sampling = self.spec.completions_per_prompt, self.spec.sampling
        longest = int(np.max(prompts["lengths"], initial=0))
        if longest + sampling.max_new_tokens > self.width:
            raise ValueError(
                f"A prompt of {longest} tokens and a completion of up to "
                f"{sampling.max_new_tokens} do not fit into rows of {self.width}. "
                "Make `width` their sum, or lower max_new_tokens."
            )
        rows = np.arange(index * self.num_rows, (index + 1) * self.num_rows)
        return self._wave(
            parameters,
            prompts["prompts"],
            prompts["lengths"],
            prompts["ids"],
            key,
            (rows // group).astype(np.int32),
            (rows % group).astype(np.int32),
        )

    def join(self, waves: list[Rollout], num_prompts: int) -> Rollout:
        """All completions in order, without the rows that only filled a wave."""
        size = num_prompts * self.spec.completions_per_prompt
        if len(waves) == 1 and size == self.num_rows:
            return waves[0]
        return self._join(waves, size)

    def _join_waves(self, waves: list[Rollout], size: int) -> Rollout:
        rows = rows_sharding(self.mesh, size)
        return jax.tree.map(
            lambda *parts: jax.lax.with_sharding_constraint(
                jnp.concatenate(parts)[:size], rows
            ),
            *waves,
        )

    def __call__(
        self,
        parameters: PyTree,
        prompts: Mapping[str, np.ndarray | Array],
        key: Key[Array, ""],
    ) -> Rollout:
        """Samples every completion of every prompt, [B * completions_per_prompt, T]."""
        size = prompts["prompts"].shape[0]
        waves = [
            self.wave(parameters, prompts, key, index)
            for index in range(self.num_waves(size))
        ]
        return self.join(waves, size)

    def _generate(
        self, parameters, prompts, lengths, ids, key, row_prompt, row_sample
    ) -> Rollout:
        """Prefill, the decoding loop, and the layout of its results."""
        take = functools.partial(
            jnp.take, indices=row_prompt, axis=0, mode="fill", fill_value=0
        )
        prompts, lengths, ids = take(prompts), take(lengths), take(ids)
        keys = jax.vmap(
            lambda data_id, sample: jax.random.fold_in(
                jax.random.fold_in(key, data_id), sample
            )
        )(ids, row_sample)
        slots = prompts.shape[1]
        first_slot = slots - lengths
        with jax.named_scope("prefill"):
            aligned = _shift_rows(prompts, first_slot, slots)
            positions = jnp.arange(slots)[None, :] - first_slot[:, None]
            cache = self._empty_cache(prompts.shape[0], slots)
            hidden, cache = self._extend(
                parameters, aligned, positions, cache, 0, first_slot
            )
            logits = self._logits(parameters, hidden[:, -1])
        state = self._start(logits, cache, lengths)
        with jax.named_scope("decode"):
            state = jax.lax.while_loop(
                self._goes_on,
                functools.partial(
                    self._step, parameters, keys=keys, first_slot=first_slot
                ),
                state,
            )
        return self._layout(prompts, lengths, state)

    def _empty_cache(self, batch: int, prompt_slots: int) -> cache_lib.Cache:
        limit = prompt_slots + self.spec.sampling.max_new_tokens
        program = self.program
        dtype = jnp.dtype(program.dtype)
        return cache_lib.empty(program.config, batch, limit, dtype, program.partition)

    def _extend(self, parameters, tokens, positions, cache, start, first_slot):
        program = self.program
        return transformer.extend(
            parameters,
            program.config,
            tokens,
            jnp.maximum(positions, 0),
            cache,
            start=start,
            first_slot=first_slot,
            dtype=jnp.dtype(program.dtype),
            partition=program.partition,
        )

    def _logits(self, parameters, hidden):
        constrain = self.program.partition.constrain
        return heads.logits(parameters, self.program.config, hidden, constrain)

    def _start(self, logits, cache, lengths) -> _Decoding:
        batch, vocab_size = logits.shape
        limit = self.spec.sampling.max_new_tokens
        form = sampling_lib.kept_width(self.spec.sampling, vocab_size)
        kept = None
        if form is not None:
            dtype = _kept_dtype(form)
            empty = -1 if dtype == jnp.int32 else 0
            kept = jnp.full((batch, limit, form[1]), empty, dtype)
        return _Decoding(
            step=jnp.int32(0),
            logits=logits,
            cache=cache,
            has_ended=lengths == 0,
            num_tokens=jnp.zeros_like(lengths),
            tokens=jnp.zeros((batch, limit), jnp.int32),
            logprobs=jnp.zeros((batch, limit), jnp.float32),
            kept=kept,
        )

    def _goes_on(self, state: _Decoding):
        limit = self.spec.sampling.max_new_tokens
        return (state.step < limit) & ~jnp.all(state.has_ended)

    def _step(self, parameters, state: _Decoding, *, keys, first_slot) -> _Decoding:
        """Draws one token for every row and runs the model on it."""
        sampling = self.spec.sampling
        step, is_alive = state.step, ~state.has_ended
        with jax.named_scope("sample"):
            draw = sampling_lib.sample(
                state.logits,
                jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step),
                sampling,
                forbidden=self._forbidden(state.logits, step),
            )
        tokens = jnp.where(is_alive, draw.tokens, 0)
        has_ended = state.has_ended | self._is_end(tokens) & is_alive
        slots = state.cache.num_slots - sampling.max_new_tokens
        position = slots + step
        hidden, cache = self._extend(
            parameters,
            tokens[:, None],
            (position - first_slot)[:, None],
            state.cache,
            position,
            first_slot,
        )
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=step, axis=1)
        return _Decoding(
            step=step + 1,
            logits=self._logits(parameters, hidden[:, 0]),
            cache=cache,
            has_ended=has_ended,
            num_tokens=state.num_tokens + is_alive,
            tokens=put(state.tokens, tokens),
            logprobs=put(state.logprobs, jnp.where(is_alive, draw.logprobs, 0.0)),
            kept=None if state.kept is None else put(state.kept, draw.kept),
        )

    def _is_end(self, tokens):
        return jnp.isin(tokens, jnp.asarray(self.eos_ids, jnp.int32))

    def _forbidden(self, logits, step):
        """End-of-sequence ids, while a completion is shorter than its minimum."""
        if self.spec.sampling.min_new_tokens == 0:
            return None
        is_end_V = self._is_end(jnp.arange(logits.shape[1]))
        is_early = step < self.spec.sampling.min_new_tokens
        return jnp.broadcast_to(is_end_V & is_early, logits.shape)

    def _layout(self, prompts, lengths, state: _Decoding) -> Rollout:
        """Prompt and completion next to each other from index 0 on."""
        width, place = self.width, jnp.arange(self.width)[None, :]
        total = lengths + state.num_tokens
        in_prompt = place < lengths[:, None]
        mask = ~in_prompt & (place < total[:, None])
        last = jnp.take_along_axis(
            state.tokens, jnp.maximum(state.num_tokens - 1, 0)[:, None], axis=1
        )[:, 0]
        move = functools.partial(_shift_rows, shift=lengths, width=width)
        tokens = jnp.where(
            in_prompt,
            _shift_rows(prompts, jnp.zeros_like(lengths), width),
            jnp.where(mask, move(state.tokens), 0),
        )
        kept = None
        if state.kept is not None:
            empty = -1 if state.kept.dtype == jnp.int32 else 0
            kept = jnp.where(
                mask[:, :, None], move(state.kept), jnp.asarray(empty, state.kept.dtype)
            )
        return Rollout(
            tokens=tokens,
            completion_mask=mask,
            old_logprobs=jnp.where(mask, move(state.logprobs), 0.0),
            is_truncated=~self._is_end(last) & (lengths > 0),
            lengths=total,
            kept=kept,
        )


def _kept_dtype(form: tuple[str, int]) -> Any:
    """Of the sets that a sampler records: ids, or words of bits."""
    return jnp.int32 if form[0] == "ids" else jnp.uint32


def _shift_rows(x: Array, shift: Int[Array, " B"], width: int) -> Array:
    """Row b of x [B, N, …] moved right by shift[b], cut or padded to `width`."""
    source = jnp.arange(width)[None, :] - shift[:, None]
    source = jnp.clip(source, 0, x.shape[1] - 1)
    source = source.reshape(source.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, source, axis=1)
