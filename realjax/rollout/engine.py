"""The rollout engine: completions of many prompts in few slots, over a pool of pages.

    prompts ──▶ rows ──▶ slots ──▶ rows ──▶ Rollout
                 ▲         │ launches of a few steps; a slot whose row has ended
                 └─────────┘ takes the next row

The host runs ahead of the device. It reads which rows have ended one launch late, so
that the device always has work; a slot idles for a few steps, a batch never waits for
its longest row. A row's draws depend on its own key and the place in its completion,
and on nothing else: not on the batch, its order, the slot, the mesh or other rows.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from realjax.core.arrays import Array, Bool, Int, Key, PyTree
from realjax.functions.packed import ModelProgram
from realjax.models import pages as pages_lib
from realjax.models.pages import Pool
from realjax.parallel.sharding import AXES, num_parts
from realjax.rl.sampling import Sampling
from realjax.rollout.programs import Programs, Shapes
from realjax.rollout.rows import Rollout, Rows
from realjax.rollout.scheduler import (
    Chunk,
    Copies,
    Launch,
    Scheduler,
    chunk_shapes,
)
from realjax.rollout.session import LentPool, OnProgress, OnTokens, Session, Work
from realjax.rollout.settings import Settings
from realjax.rollout.shard import Prefix, Row, Shard, room_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Carried:
    """Completions that a later rollout goes on with.

    They keep the tokens and log-probabilities they have, and draw what they would have
    drawn; keys and values are computed anew.

    Attributes:
        rows: their state, on the devices.
        lengths, prompt_lengths, limits: [C], of prompt and completion so far, of the
            prompt, and at most; 0 for an empty row.
        has_ended: [C], of rows that only wait for the others of their group.
    """

    rows: Rows
    lengths: Int[np.ndarray, " C"]
    prompt_lengths: Int[np.ndarray, " C"]
    limits: Int[np.ndarray, " C"]
    has_ended: Bool[np.ndarray, " C"]


class _Waiting(NamedTuple):
    """A row to be sampled: its number, its prompt's number, and tokens."""

    row: int
    prompt: int
    prompt_length: int
    length: int
    limit: int


def _waiting(
    lengths: np.ndarray, limits: np.ndarray, group: int, carried: Carried | None
) -> list[_Waiting]:
    """List carried rows that have not ended, then the rows of the prompts."""
    waiting, first = [], 0
    if carried is not None:
        first = len(carried.lengths)
        for row in np.flatnonzero((carried.lengths > 0) & ~carried.has_ended).tolist():
            waiting.append(
                _Waiting(
                    row,
                    -1 - row // group,  # Apart from the prompts that are new.
                    int(carried.prompt_lengths[row]),
                    int(carried.lengths[row]),
                    int(carried.limits[row]),
                )
            )
    for prompt, (length, limit) in enumerate(
        zip(lengths.tolist(), limits.tolist(), strict=True)
    ):
        for sample in range(group if length else 0):
            row = first + prompt * group + sample
            waiting.append(_Waiting(row, prompt, length, length, length + limit))
    return waiting


class Engine:
    """Samples completions on one mesh; keeps its pool from one rollout to the next.

    Args:
        program: the model.
        mesh: of the call.
        sampling: how tokens are drawn.
        eos_ids: ids that end a completion.
        width: T, tokens of prompt and completion together.
        settings: slots, pages and launches.
        is_read: whether the host reads tokens, for `on_tokens`.
        has_kept: whether the sets of tokens that draws were made from are recorded, for
            training.

    Attributes:
        num_pools: pools made so far.
        work: what the last rollout took.
    """

    def __init__(
        self,
        program: ModelProgram,
        mesh: jax.sharding.Mesh,
        sampling: Sampling,
        *,
        eos_ids: tuple[int, ...],
        width: int,
        settings: Settings,
        is_read: bool = False,
        has_kept: bool = True,
    ):
        """Compiles nothing yet, and makes no pool."""
        self.program, self.mesh, self.sampling = program, mesh, sampling
        self.width, self.settings = width, settings
        self.num_shards = num_parts(AXES["batch"], mesh)
        self.room = room_of(
            program.config, settings, width=width, num_shards=self.num_shards
        )
        shapes = Shapes(
            width=width, steps=settings.steps, is_read=is_read, has_kept=has_kept
        )
        self.programs = Programs(
            program, mesh, sampling, eos_ids=eos_ids, shapes=shapes
        )
        self.num_pools, self.work = 0, Work()
        self._pool: Pool | None = None

    @property
    def kv_dtype(self) -> str:
        """Of the pool."""
        return self.settings.kv_dtype or self.program.dtype

    @property
    def pool_bytes(self) -> int:
        """Of the pool, on all devices together."""
        partition = self.program.partition
        page = pages_lib.page_bytes(
            self.program.config, self.room.page_size, self.kv_dtype, partition
        )
        return page * self.room.num_pages * self.num_shards

    def check(self, prompt_length: int, max_new_tokens: int) -> None:
        """Refuse a row that can never end.

        Raises:
            ValueError: it is wider than `width` or than the pool, or gets no token.
        """
        if max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; a completion has at least 1."
            )
        length = prompt_length + max_new_tokens
        if length > self.width:
            raise ValueError(
                f"A prompt of {prompt_length} tokens and a completion of up to "
                f"{max_new_tokens} do not fit into rows of {self.width}. "
                "Make `width` their sum, or lower max_new_tokens."
            )
        needed = self.room.needed_pages(length)
        if needed > self.room.num_pages:
            raise ValueError(
                f"A prompt of {prompt_length} tokens and a completion of up to "
                f"{max_new_tokens} take {needed} pages of {self.room.page_size} tokens,"
                f" and the pool has {self.room.num_pages} for each row shard. Give it "
                "more pages, or lower max_new_tokens."
            )

    def __call__(
        self,
        parameters: PyTree,
        prompts: Mapping[str, np.ndarray | Array],
        key: Key[Array, ""],
        **options: Any,
    ) -> Rollout:
        """Sample every completion of every prompt; see `session` for the arguments."""
        with self.session(parameters, prompts, key, **options) as session:
            while not session.is_done:
                session.advance()
            return session.results()

    @contextlib.contextmanager
    def session(
        self,
        parameters: PyTree,
        prompts: Mapping[str, np.ndarray | Array],
        key: Key[Array, ""],
        *,
        completions_per_prompt: int = 1,
        max_new_tokens: Int[np.ndarray, " B"] | None = None,
        min_new_tokens: Int[np.ndarray, " B"] | None = None,
        carried: Carried | None = None,
        on_progress: OnProgress | None = None,
        on_tokens: OnTokens | None = None,
        is_traced: bool = False,
    ) -> Iterator[Session]:
        """Begin a rollout, to be advanced until it is done.

        Args:
            parameters: on this mesh.
            prompts: "prompts" [B, P] left-aligned, "lengths" [B] (0 for a padding row;
                on the host) and "ids" [B] of the data.
            key: of this call in this step.
            completions_per_prompt: rows of a prompt, next to each other.
            max_new_tokens: of each prompt's completions; None is the sampling's.
            min_new_tokens: the same; at most the sampling's.
            carried: rows of an earlier rollout to go on with; they come first.
            on_progress: told how far it is.
            on_tokens: told new tokens; needs `is_read`.
            is_traced: whether `work` keeps what every slot did.

        Raises:
            ValueError: a row that does not fit, see `check`.
        """
        lengths, limits = np.asarray(prompts["lengths"]), max_new_tokens
        if limits is None:
            limits = np.full(len(lengths), self.sampling.max_new_tokens, np.int32)
        for length, limit in sorted(
            {*zip(lengths.tolist(), limits.tolist(), strict=True)}
        ):
            if length:
                self.check(length, limit)
        minimums = min_new_tokens
        if minimums is None:
            minimums = np.minimum(limits, self.sampling.min_new_tokens)
        if (minimums > np.minimum(limits, self.sampling.min_new_tokens)).any():
            raise ValueError(
                f"min_new_tokens has {int(minimums.max())}; each is at most the"
                f" sampling's, {self.sampling.min_new_tokens}, and at most the same"
                " prompt's max_new_tokens."
            )
        bounds = np.stack([minimums, limits], axis=1).astype(np.int32)
        rows, shared, size = self._start(
            prompts, key, completions_per_prompt, bounds, carried
        )
        waiting = _waiting(lengths, limits, completions_per_prompt, carried)
        is_shared = carried is None and self._can_share_all(lengths)
        scheduler = self._scheduler(
            waiting, rows.lengths.shape[0], int(shared) if is_shared else 0
        )
        with self._borrowed_pool() as pool:
            session = Session(
                pool,
                parameters,
                rows,
                scheduler,
                size=size,
                on_tokens=on_tokens,
                on_progress=on_progress,
                is_traced=is_traced,
            )
            self.work = session.work
            yield session

    def warm_up(
        self,
        parameters: PyTree,
        prompts: Mapping[str, np.ndarray | Array],
        *,
        completions_per_prompt: int = 1,
    ) -> None:
        """Compiles all that a rollout of such prompts may launch; nothing is sampled.

        Args:
            parameters: on this mesh.
            prompts: as in a rollout; their shapes count.
            completions_per_prompt: rows of a prompt.
        """
        num_prompts, longest = prompts["prompts"].shape
        bounds = np.ones((num_prompts, 2), np.int32)
        rows, _, size = self._start(
            prompts, jax.random.key(0), completions_per_prompt, bounds, None
        )
        shapes, num_columns = self.chunk_shapes(longest), self.num_columns

        def idle(num_rows: int, columns: int) -> np.ndarray:
            return np.full((num_rows * self.num_shards, columns), -1, np.int32)

        with self._borrowed_pool() as pool:
            for width, count in shapes:
                table = idle(count, 3 + num_columns)
                pool.prefill(parameters, rows, Chunk(width, table, 0))
            pool.copy(Copies(idle(self.room.num_slots, 2)))
            launch = Launch(idle(self.room.num_slots, 2 + num_columns), 0)
            rows, _ = pool.decode(parameters, rows, launch)
        num_rows = rows.lengths.shape[0]
        cuts, is_stopped = np.zeros(num_rows, np.int32), np.zeros(num_rows, bool)
        finish = self.programs.finish
        jax.block_until_ready(finish(rows, None, cuts, is_stopped, size=size))

    def _start(
        self, prompts, key, completions_per_prompt: int, bounds, carried
    ) -> tuple[Rows, Array, int]:
        """Lay out the rows; also the tokens all prompts share, and the rows wanted."""
        size = len(bounds) * completions_per_prompt
        num_rows = self.filled(size)
        places = np.arange(num_rows, dtype=np.int32)
        row_limits = np.zeros((num_rows, 2), np.int32)
        row_limits[:size] = np.repeat(bounds, completions_per_prompt, axis=0)
        rows, shared = self.programs.start(
            prompts["prompts"],
            prompts["lengths"],
            prompts["ids"],
            key,
            places // completions_per_prompt,
            places % completions_per_prompt,
            row_limits,
            num_rows=num_rows,
        )
        if carried is not None:
            size += len(carried.lengths)
            num_rows = self.filled(len(carried.lengths) + num_rows)
            rows = self.programs.join(carried.rows, rows, num_rows=num_rows)
        return rows, shared, size

    def filled(self, num_rows: int) -> int:
        """Rows with those that only fill up the shards."""
        return -(-num_rows // self.num_shards) * self.num_shards

    def _can_share_all(self, lengths: np.ndarray) -> bool:
        """Whether what several prompts begin with is prefilled once for all."""
        scaling = self.program.config.rope_scaling
        is_alike = scaling is None or not scaling.depends_on_length
        return self.settings.is_sharing and is_alike and int((lengths > 0).sum()) > 1

    def _scheduler(
        self, waiting: Sequence[_Waiting], num_rows: int, num_shared: int
    ) -> Scheduler:
        room, per_shard = self.room, num_rows // self.num_shards
        shared = num_shared // room.page_size * room.page_size
        parents = [Prefix(shared) if shared else None for _ in range(self.num_shards)]
        prefixes: dict[tuple[int, int], Prefix] = {}
        rows: list[list[Row]] = [[] for _ in range(self.num_shards)]
        for one in waiting:
            shard, index = divmod(one.row, per_shard)
            place = (shard, one.prompt)
            if place not in prefixes or not self.settings.is_sharing:
                prefixes[place] = Prefix(one.prompt_length - 1, parents[shard])
            rows[shard].append(Row(index, prefixes[place], one.length, one.limit))
        longest = max((one.prompt_length for one in waiting), default=0)
        return Scheduler(
            [Shard(room, rows_of_shard) for rows_of_shard in rows],
            num_columns=self.num_columns,
            shapes=self.chunk_shapes(longest),
            is_refilling=self.settings.is_refilling,
        )

    @property
    def num_columns(self) -> int:
        """Pages of the longest row."""
        return self.room.pages_of(self.width)

    def chunk_shapes(self, longest: int) -> list[tuple[int, int]]:
        """List (tokens of a row, rows of a shard) of chunks of such prompts."""
        return chunk_shapes(longest, self.settings.chunk_tokens)

    @contextlib.contextmanager
    def _borrowed_pool(self) -> Iterator[LentPool]:
        """The pool, to launch programs on; made if it is not there.

        What fails in between may have given it away: the next rollout makes another.
        """
        pool, self._pool = self._pool, None
        if pool is None:
            self.num_pools += 1
            pool = self.programs.make_pool(**self.pool_shape)
        lent = LentPool(self.programs, pool)
        yield lent
        self._pool = lent.pool

    def drop_pool(self) -> None:
        """Frees the pool's memory; the next rollout makes another."""
        self._pool = None

    @property
    def pool_shape(self) -> dict[str, Any]:
        """Pages of all shards, tokens of a page, and type."""
        return {
            "num_pages": self.room.num_pages * self.num_shards,
            "page_size": self.room.page_size,
            "dtype": self.kv_dtype,
        }
