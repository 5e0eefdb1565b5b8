"""The compiled programs of the rollout engine; the host decides which runs when.

    start     prompts ──▶ rows: a buffer of tokens for every completion
    prefill   some tokens of some rows ──▶ their keys and values in the pool
    copy      pages ──▶ other pages
    decode    some tokens more for the row in every slot
    finish    rows ──▶ a `Rollout`

A row's tokens, log-probabilities and state lie by row, not by slot, in the layout of
the result: what leaves a slot needs no copying, and comes back from where it is.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from realjax.core.arrays import Array, Bool, Float, Int
from realjax.functions.packed import ModelProgram
from realjax.models import heads, transformer
from realjax.models import pages as pages_lib
from realjax.models.axes import PAGES
from realjax.models.pages import Pool
from realjax.parallel.sharding import axes_spec, replicated, rows_sharding
from realjax.rl import sampling as sampling_lib
from realjax.rl.sampling import Draw, History, Sampling
from realjax.rollout import rows as rows_lib
from realjax.rollout.rows import OF_ROW, ROW, Rollout, Rows, axes_of, kept_dtype


class _Written(NamedTuple):
    """What a launch of decoding gives each slot's row, [B, steps]."""

    tokens: Int[Array, "B K"]
    logprobs: Float[Array, "B K"]
    entropy: Float[Array, "B K"]
    kept: Array | None


class _Decoding(NamedTuple):
    """What the loop over steps carries."""

    step: Int[Array, ""]
    pool: Pool
    lengths: Int[Array, " B"]
    is_alive: Bool[Array, " B"]
    recent: Int[Array, "B M"]
    history: History
    written: _Written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """What is known of all programs of an engine before tracing.

    Attributes:
        width: T, tokens of a row.
        steps: tokens a launch decodes.
        is_read: whether the host reads the tokens of every launch.
        has_kept: whether the sets of tokens that draws were made from are recorded.
    """

    width: int
    steps: int
    is_read: bool = False
    has_kept: bool = True


class Programs:
    """Compiles each program once for each shape.

    Args:
        program: the model.
        mesh: of the call.
        sampling: how tokens are drawn.
        eos_ids: ids that end a completion.
        shapes: of the programs.
    """

    def __init__(
        self,
        program: ModelProgram,
        mesh: jax.sharding.Mesh,
        sampling: Sampling,
        *,
        eos_ids: tuple[int, ...],
        shapes: Shapes,
    ):
        """Compiles nothing yet."""
        self.program, self.mesh, self.sampling = program, mesh, sampling
        self.eos_ids, self.shapes = eos_ids, shapes
        form = sampling_lib.kept_width(sampling, program.config.vocab_size)
        self.kept_form = form if shapes.has_kept else None
        whole = replicated(mesh)
        rows, pool = (NamedSharding(mesh, axes_spec(a, mesh)) for a in (ROW, PAGES[:3]))
        jitted = functools.partial(jax.jit, donate_argnames=("pool",))
        self.start = jax.jit(
            self._start, static_argnames=("num_rows",), out_shardings=(rows, whole)
        )
        self.prefill = jitted(
            self._prefill, static_argnames=("width",), out_shardings=pool
        )
        self.copy = jitted(self._copy, out_shardings=pool)
        self.decode = jax.jit(
            self._decode,
            donate_argnames=("pool", "rows"),
            out_shardings=(pool, rows, whole),
        )
        self.make_pool = jax.jit(
            self._make_pool,
            static_argnames=("num_pages", "page_size", "dtype"),
            out_shardings=pool,
        )
        self.finish = jax.jit(self._finish, static_argnames=("size",))
        self.empty_rows = jax.jit(
            self._empty_rows, static_argnames=("num_rows",), out_shardings=rows
        )
        self.select = jax.jit(rows_lib.select, out_shardings=rows)
        self.join = jax.jit(
            rows_lib.join, static_argnames=("num_rows",), out_shardings=rows
        )

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far."""
        jitted: tuple[Any, ...] = (
            self.start,
            self.prefill,
            self.copy,
            self.decode,
            self.finish,
            self.select,
            self.join,
        )
        return sum(one._cache_size() for one in jitted)

    def described(self, size: int) -> Rollout:
        """Shapes, types and shardings of a rollout of so many rows."""
        rows, width = rows_sharding(self.mesh, size), self.shapes.width

        def leaf(dtype, *sizes: int) -> Any:
            return jax.ShapeDtypeStruct((size, *sizes), dtype, sharding=rows)

        form = self.kept_form
        return Rollout(
            tokens=leaf(jnp.int32, width),
            completion_mask=leaf(jnp.bool_, width),
            old_logprobs=leaf(jnp.float32, width),
            is_truncated=leaf(jnp.bool_),
            lengths=leaf(jnp.int32),
            kept=form and leaf(kept_dtype(form), width, form[1]),
            entropy=leaf(jnp.float32, width),
        )

    def described_rows(self, num_rows: int) -> Rows:
        """Shapes, types and shardings of the state of so many rows."""
        rows = rows_sharding(self.mesh, num_rows)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
            jax.eval_shape(functools.partial(self._empty_rows, num_rows=num_rows)),
        )

    # -- rows ------------------------------------------------------------------------

    def _start(self, *arguments, num_rows: int) -> tuple[Rows, Int[Array, ""]]:
        return rows_lib.start(
            *arguments,
            num_rows=num_rows,
            width=self.shapes.width,
            kept_form=self.kept_form,
        )

    def _empty_rows(self, *, num_rows: int) -> Rows:
        width, form = self.shapes.width, self.kept_form
        return rows_lib.empty(num_rows, width, kept_form=form)

    def _finish(self, rows: Rows, index, cuts, is_stopped, *, size: int) -> Rollout:
        """The first rows or those of an index, as the result of a rollout."""
        if index is None:
            choose = lambda x: x[:size]
        else:
            choose = functools.partial(rows_lib.take, index=index)
        chosen = jax.tree.map(choose, (rows, cuts, is_stopped))
        rollout = rows_lib.finish(*chosen, is_end=self._is_end)
        sharding = rows_sharding(self.mesh, size)
        return jax.lax.with_sharding_constraint(rollout, sharding)

    # -- prefill and copies ----------------------------------------------------------

    def _prefill(
        self, parameters, pool: Pool, tokens, prompt_lengths, table, num_pages, *, width
    ) -> Pool:
        """Write the keys and values of tokens that are known.

        Args:
            parameters: of the model.
            pool: given away.
            tokens: of all rows.
            prompt_lengths: of all rows.
            table: row, first token, number of tokens and pages; -1 for no row.
            num_pages: columns in use.
            width: tokens of a row that there is room for.
        """
        table = self._by_row(table)
        row, start, counts, pages = table[:, 0], table[:, 1], table[:, 2], table[:, 3:]
        places = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        with jax.named_scope("prefill"):
            return self._extend(
                parameters,
                self._take(tokens, row, places),
                pool,
                pages,
                first_page=jnp.zeros_like(start),
                start=start,
                counts=jnp.where(row >= 0, counts, 0),
                lengths=self._take(prompt_lengths, row),
                num_pages=num_pages,
            )[1]

    def _copy(self, pool: Pool, pages) -> Pool:
        sources, targets = self._by_row(pages[:, 0]), self._by_row(pages[:, 1])
        partition = self.program.partition
        return pages_lib.copy_pages(pool, sources, targets, partition)

    def _make_pool(self, *, num_pages: int, page_size: int, dtype: str) -> Pool:
        program = self.program
        return pages_lib.empty(
            program.config, num_pages, page_size, dtype, program.partition
        )

    # -- decoding --------------------------------------------------------------------

    def _decode(
        self, parameters, pool: Pool, rows: Rows, table, num_pages
    ) -> tuple[Pool, Rows, Int[Array, "B C"]]:
        """Decode up to `steps` tokens for the row in every slot.

        Returns:
            The pool, the rows, and for the host, of every slot: whether its row has
            ended, its length, and if it is to read them the new tokens, and the bits of
            their log-probabilities and entropies.
        """
        steps, table = self.shapes.steps, self._by_row(table)
        row, first_page, pages = table[:, 0], table[:, 1], table[:, 2:]
        take = lambda x: self._take(x, row)
        lengths, limits, minimums = map(
            take, (rows.lengths, rows.limits, rows.minimums)
        )
        prompt_lengths = take(rows.prompt_lengths)
        is_alive = (row >= 0) & ~take(rows.has_ended)
        keys = jax.random.wrap_key_data(take(rows.keys))
        begin = lengths

        def goes_on(state: _Decoding):
            return (state.step < steps) & jnp.any(state.is_alive)

        def step(state: _Decoding) -> _Decoding:
            hidden, pool = self._extend(
                parameters,
                state.recent[:, -1:],
                state.pool,
                pages,
                first_page=first_page,
                start=state.lengths - 1,
                counts=state.is_alive.astype(jnp.int32),
                lengths=prompt_lengths,
                num_pages=num_pages,
            )
            config = self.program.config
            constrain = self.program.partition.constrain
            logits = heads.logits(parameters, config, hidden[:, 0], constrain)
            with jax.named_scope("sample"):
                draw = self._sample(
                    logits,
                    jax.vmap(jax.random.fold_in)(keys, state.lengths - prompt_lengths),
                    self._forbidden(state.recent, state.lengths < minimums),
                    state.history,
                )
            tokens = jnp.where(state.is_alive, draw.tokens, 0)
            new_lengths = state.lengths + state.is_alive
            has_ended = self._is_end(tokens) | (new_lengths >= limits)
            put = functools.partial(
                jax.lax.dynamic_update_index_in_dim, index=state.step, axis=1
            )
            kept = None if self.kept_form is None else draw.kept
            new = _Written(tokens, draw.logprobs, draw.entropy, kept)
            return _Decoding(
                step=state.step + 1,
                pool=pool,
                lengths=new_lengths,
                is_alive=state.is_alive & ~has_ended,
                recent=jnp.concatenate([state.recent[:, 1:], tokens[:, None]], axis=1),
                history=self._remember(state.history, tokens, state.is_alive),
                written=jax.tree.map(put, state.written, new),
            )

        recent, history = self._remembered(rows, row, lengths, prompt_lengths)
        size = (len(row), steps)
        state = _Decoding(
            step=jnp.int32(0),
            pool=pool,
            lengths=lengths,
            is_alive=is_alive,
            recent=recent,
            history=history,
            written=_Written(
                tokens=jnp.zeros(size, jnp.int32),
                logprobs=jnp.zeros(size, jnp.float32),
                entropy=jnp.zeros(size, jnp.float32),
                kept=rows_lib.empty_kept(self.kept_form, *size),
            ),
        )
        with jax.named_scope("decode"):
            state = jax.lax.while_loop(goes_on, step, state)
        # A row that was alive, and is not any more, has ended.
        has_ended = ~state.is_alive & (row >= 0)
        rows = self._write(rows, row, begin, state, has_ended)
        report = [has_ended.astype(jnp.int32)[:, None], state.lengths[:, None]]
        if self.shapes.is_read:
            bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.int32)
            written = state.written
            report += [written.tokens, bits(written.logprobs), bits(written.entropy)]
        return state.pool, rows, jnp.concatenate(report, axis=1)

    def _write(self, rows: Rows, row, begin, state: _Decoding, has_ended) -> Rows:
        """Put what a launch has made into its rows."""
        num_steps = self.shapes.steps
        places = begin[:, None] + jnp.arange(num_steps, dtype=jnp.int32)[None]
        is_new = places < state.lengths[:, None]
        places = jnp.where(is_new, places, self.shapes.width)  # Dropped there.

        def put_all(rows: Rows, row, places, lengths, has_ended, written: _Written):
            num_rows = len(rows.lengths)
            row = jnp.where(row >= 0, row, num_rows)
            put = lambda x, new: x.at[row[:, None], places].set(new, mode="drop")
            return rows._replace(
                **jax.tree.map(put, _outputs(rows), written)._asdict(),
                lengths=rows.lengths.at[row].set(lengths, mode="drop"),
                has_ended=rows.has_ended.at[row].set(has_ended, mode="drop"),
            )

        axes = axes_of(rows)
        locally = self.program.partition.locally(
            put_all,
            (axes, ROW, OF_ROW, ROW, ROW, axes_of(state.written)),
            axes,
        )
        return locally(rows, row, places, state.lengths, has_ended, state.written)

    def _remembered(
        self, rows: Rows, row, lengths, prompt_lengths
    ) -> tuple[Array, History]:
        """The last tokens of every slot's row, and what it holds where that matters."""
        num_recent = max(self.sampling.num_recent_tokens, 1)
        places = jnp.arange(-num_recent, 0, dtype=jnp.int32)[None] + lengths[:, None]
        recent = self._take(rows.tokens, row, jnp.maximum(places, 0))
        recent = jnp.where((places >= 0) & (row >= 0)[:, None], recent, -1)
        recent = recent.at[:, -1].set(jnp.maximum(recent[:, -1], 0))
        if not self.sampling.needs_history:
            return recent, History()
        every = jnp.arange(self.shapes.width, dtype=jnp.int32)[None]
        every = jnp.broadcast_to(every, (len(row), self.shapes.width))
        tokens = self._take(rows.tokens, row, every)
        vocab_size = self.program.config.vocab_size

        def holds(is_counted) -> Array:
            ids = jnp.where(is_counted, tokens, vocab_size)
            empty = jnp.zeros((len(row), vocab_size), jnp.bool_)
            slots = jnp.arange(len(row))[:, None]
            return empty.at[slots, ids].set(True, mode="drop")

        is_there = every < lengths[:, None]
        in_completion = is_there & (every >= prompt_lengths[:, None])
        return recent, History(holds(is_there), holds(in_completion))

    def _remember(self, history: History, tokens, is_alive) -> History:
        if not self.sampling.needs_history:
            return history
        slots = jnp.arange(len(tokens))
        ids = jnp.where(is_alive, tokens, self.program.config.vocab_size)
        return jax.tree.map(
            lambda seen: seen.at[slots, ids].set(True, mode="drop"), history
        )

    def _forbidden(self, recent, is_early) -> Bool[Array, "B V"] | None:
        """End-of-sequence ids of a completion that is too short, and bad words."""
        sampling, vocab_size = self.sampling, self.program.config.vocab_size
        forbidden = None
        if sampling.min_new_tokens > 0:
            is_end_V = self._is_end(jnp.arange(vocab_size))
            forbidden = is_early[:, None] & is_end_V[None]
        if sampling.bad_words:
            bad = sampling_lib.bad_word_tokens(recent, sampling, vocab_size)
            forbidden = bad if forbidden is None else forbidden | bad
        return forbidden

    def _sample(self, logits, keys, forbidden, history: History) -> Draw:
        """Draw for every slot, on the device that has its logits."""

        def draw(logits, keys, forbidden, history) -> tuple[Array | None, ...]:
            return tuple(
                sampling_lib.sample(
                    logits, keys, self.sampling, forbidden=forbidden, history=history
                )
            )

        inputs = (logits, keys, forbidden, history)
        out = (ROW, ROW, ROW, None if self.kept_form is None else OF_ROW)
        locally = self.program.partition.locally(draw, axes_of(inputs), out)
        return Draw(*locally(*inputs))

    def _is_end(self, tokens):
        return jnp.isin(tokens, jnp.asarray(self.eos_ids, jnp.int32))

    # -- the model and the mesh ------------------------------------------------------

    def _extend(self, parameters, tokens, pool, pages, **places):
        program = self.program
        return transformer.extend(
            parameters,
            program.config,
            tokens,
            pool,
            table=pages,
            dtype=jnp.dtype(program.dtype),
            partition=program.partition,
            **places,
        )

    def _take(self, x: Array, row: Int[Array, " B"], *places: Array) -> Array:
        """Rows of a device's own part of x [R, …], or places [B, N] in them."""

        def take(x: Array, row: Array, *places: Array) -> Array:
            index = (row, *places) if not places else (row[:, None], *places)
            return x.at[index].get(mode="fill", fill_value=0)

        axes = (axes_of(x), ROW, *map(axes_of, places))
        out = OF_ROW if places or x.ndim > 1 else ROW
        row = jnp.where(row >= 0, row, x.shape[0])
        return self.program.partition.locally(take, axes, out)(x, row, *places)

    def _by_row(self, table: Array) -> Array:
        return self.program.partition.constrain(table, axes_of(table))


def _outputs(rows: Rows) -> _Written:
    return _Written(rows.tokens, rows.logprobs, rows.entropy, rows.kept)
