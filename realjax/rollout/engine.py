"""The rollout engine: completions of many prompts in few slots, over a pool of pages.

    prompts ──▶ rows ──▶ slots ──▶ rows ──▶ Rollout
                 ▲         │ launches of a few steps; a slot whose row has ended
                 └─────────┘ takes the next row

The host runs ahead of the device. It reads which rows have ended one launch late, so
that the device always has work; a slot idles for a few steps, a batch never waits for
its longest row. A row's draws depend on its own key and the place in its completion,
and on nothing else: not on the batch, its order, the slot, the mesh or other rows.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, Int, Key, PyTree
from realjax.functions.packed import ModelProgram
from realjax.models import pages as pages_lib
from realjax.models.pages import Pool
from realjax.parallel.sharding import AXES, num_parts
from realjax.rl.sampling import Sampling
from realjax.rollout.programs import Programs, Rollout, Rows, Shapes
from realjax.rollout.scheduler import Chunk, Copies, Launch, Scheduler
from realjax.rollout.shard import Prefix, Room, Row, Shard

LAG = 1
"""Launches that run while the host waits for the report of the one before them."""

FOREVER = np.int32(2**31 - 1)

OnProgress = Callable[[int, int, int], None]
"""Told rows that have ended, rows in all, and tokens sampled."""

OnTokens = Callable[[int, Sequence[int]], int | None]
"""Told a row and its new tokens; returns how many tokens its completion keeps in all,
where it ends by them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How an engine works; results do not depend on it.

    Attributes:
        slots: completions decoded at the same time.
        pages: of the pool; 0 makes it large enough for every slot's longest row.
        page_size: tokens of a page.
        steps: tokens that a launch decodes.
        chunk_tokens: tokens of a chunk of prefill, on each row shard.
        kv_dtype: of the pool; "" is the model's.
        is_refilling: whether a slot is given on before all slots are free.
        is_sharing: whether completions share the pages of what they begin with.
    """

    slots: int
    pages: int = 0
    page_size: int = 16
    steps: int = 8
    chunk_tokens: int = 256
    kv_dtype: str = ""
    is_refilling: bool = True
    is_sharing: bool = True


@dataclasses.dataclass(kw_only=True)
class Work:
    """What a rollout took.

    Attributes:
        num_tokens: sampled, those that a stop string cut off included.
        num_steps: tokens that decoding launches had room for: slots × steps.
        num_prefilled: tokens of prompts, and of rows that came back.
        num_preempted: rows that gave way to others for want of pages.
        num_launches: of decoding.
        host_seconds: of Python, waiting for the device left out.
        seconds: in all.
        most_pages: that were held at the same time, on all shards.
        slots: row in every slot at every launch, -1 for none; kept if asked for.
        held: pages held at every launch; kept if asked for.
    """

    num_tokens: int = 0
    num_steps: int = 0
    num_prefilled: int = 0
    num_preempted: int = 0
    num_launches: int = 0
    host_seconds: float = 0.0
    seconds: float = 0.0
    most_pages: int = 0
    slots: list[np.ndarray] = dataclasses.field(default_factory=list)
    held: list[int] = dataclasses.field(default_factory=list)


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
    ):
        """Compiles nothing yet, and makes no pool."""
        self.program, self.mesh, self.sampling = program, mesh, sampling
        self.width, self.settings = width, settings
        self.num_shards = num_parts(AXES["batch"], mesh)
        self.room = self._room()
        shapes = Shapes(width=width, steps=settings.steps, is_read=is_read)
        self.programs = Programs(
            program, mesh, sampling, eos_ids=eos_ids, shapes=shapes
        )
        self.num_pools, self.work = 0, Work()
        self._pool: Pool | None = None
        self._make_pool = jax.jit(self._empty_pool)

    def _room(self) -> Room:
        settings, config = self.settings, self.program.config
        windows = {w for w in config.layer_windows}
        window = None if None in windows or not windows else max(windows)
        num_slots = -(-settings.slots // self.num_shards)
        room = Room(
            num_slots=num_slots,
            num_pages=settings.pages // self.num_shards,
            page_size=settings.page_size,
            steps=settings.steps,
            window=window,
        )
        if not settings.pages:
            enough = num_slots * room.needed_pages(self.width)
            room = dataclasses.replace(room, num_pages=enough)
        return room

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
            ValueError: it is wider than `width`, or than the pool.
        """
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
        *,
        completions_per_prompt: int = 1,
        max_new_tokens: Int[np.ndarray, " B"] | None = None,
        on_progress: OnProgress | None = None,
        on_tokens: OnTokens | None = None,
        is_traced: bool = False,
    ) -> Rollout:
        """Samples every completion of every prompt.

        Args:
            parameters: on this mesh.
            prompts: "prompts" [B, P] left-aligned, "lengths" [B] (0 for a padding row;
                on the host) and "ids" [B] of the data.
            key: of this call in this step.
            completions_per_prompt: rows of a prompt, next to each other.
            max_new_tokens: of each prompt's completions; None is the sampling's.
            on_progress: told how far it is.
            on_tokens: told new tokens; needs `is_read`.
            is_traced: whether `work` keeps what every slot did.

        Raises:
            ValueError: a row that does not fit, see `check`.
        """
        began = time.perf_counter()
        lengths = np.asarray(prompts["lengths"])
        limits = max_new_tokens
        if limits is None:
            limits = np.full(len(lengths), self.sampling.max_new_tokens, np.int32)
        for length, limit in sorted(set(zip(lengths.tolist(), limits.tolist()))):
            if length:
                self.check(length, limit)
        size = len(lengths) * completions_per_prompt
        num_rows = -(-size // self.num_shards) * self.num_shards
        places = np.arange(num_rows, dtype=np.int32)
        row_prompt = places // completions_per_prompt
        padding = np.zeros(row_prompt[-1] + 1 - len(lengths), np.int32)
        row_limits = np.append(limits, padding)[row_prompt].astype(np.int32)
        rows, shared = self.programs.start(
            prompts["prompts"],
            lengths,
            prompts["ids"],
            key,
            row_prompt,
            places % completions_per_prompt,
            row_limits,
            num_rows=num_rows,
        )
        scheduler = self._scheduler(
            np.append(lengths, padding),
            row_limits,
            row_prompt,
            int(shared) if self._can_share_all(lengths) else 0,
        )
        loop = _Loop(self, scheduler, num_rows, on_tokens, on_progress, is_traced)
        rows = loop.run(parameters, rows)
        rollout = self.programs.finish(rows, loop.cuts, loop.is_stopped, size=size)
        self.work = loop.work
        self.work.seconds = time.perf_counter() - began
        return rollout

    def _can_share_all(self, lengths: np.ndarray) -> bool:
        """Whether what several prompts begin with is prefilled once for all."""
        scaling = self.program.config.rope_scaling
        is_alike = scaling is None or not scaling.depends_on_length
        return self.settings.is_sharing and is_alike and int((lengths > 0).sum()) > 1

    def _scheduler(
        self,
        lengths: np.ndarray,
        row_limits: np.ndarray,
        row_prompt: np.ndarray,
        num_shared: int,
    ) -> Scheduler:
        size, per_shard = self.room.page_size, len(row_prompt) // self.num_shards
        shared = num_shared // size * size
        shards = []
        for index in range(self.num_shards):
            parent = Prefix(shared) if shared else None
            prefixes: dict[int, Prefix] = {}
            rows = []
            for place in range(index * per_shard, (index + 1) * per_shard):
                prompt = int(row_prompt[place])
                length = int(lengths[prompt])
                prefix = prefixes.get(prompt)
                if prefix is None or not self.settings.is_sharing:
                    prefix = prefixes[prompt] = Prefix(max(length - 1, 0), parent)
                limit = length + int(row_limits[place]) if length else 0
                rows.append(Row(place - index * per_shard, prefix, length, limit))
            shards.append(Shard(self.room, rows))
        longest = int(lengths.max(initial=0))
        return Scheduler(
            shards,
            num_columns=self.room.pages_of(self.width),
            chunk_tokens=self.settings.chunk_tokens,
            longest_chunk=longest,
            is_refilling=self.settings.is_refilling,
        )

    def take_pool(self) -> Pool:
        """The pool, which its caller gives back by `keep_pool`; made when it is not there."""
        pool, self._pool = self._pool, None
        if pool is None:
            self.num_pools += 1
            pool = self._make_pool()
        return pool

    def keep_pool(self, pool: Pool) -> None:
        """Keeps the pool for the next rollout."""
        self._pool = pool

    def drop_pool(self) -> None:
        """Frees the pool's memory; the next rollout makes another."""
        self._pool = None

    def _empty_pool(self) -> Pool:
        return pages_lib.empty(
            self.program.config,
            self.room.num_pages * self.num_shards,
            self.room.page_size,
            jnp.dtype(self.kv_dtype),
            self.program.partition,
        )


class _Loop:
    """One rollout: launches work and reads reports."""

    def __init__(
        self, engine, scheduler, num_rows, on_tokens, on_progress, is_traced: bool
    ):
        self.engine, self.scheduler = engine, scheduler
        self.on_tokens, self.on_progress = on_tokens, on_progress
        self.is_traced = is_traced
        self.work = Work()
        self.cuts = np.full(num_rows, FOREVER, np.int32)
        self.is_stopped = np.zeros(num_rows, bool)
        self._per_shard = num_rows // len(scheduler.shards)
        self._lengths = np.zeros(num_rows, np.int64)  # As reported.
        self._prompts = np.zeros(num_rows, np.int64)
        self._is_over = np.ones(num_rows, bool)
        for index, shard in enumerate(scheduler.shards):
            for row in shard.waiting:
                place = index * self._per_shard + row.index
                self._lengths[place] = self._prompts[place] = row.length
                self._is_over[place] = False
        self._total = int((~self._is_over).sum())
        self._reports: collections.deque = collections.deque()
        self._waited = 0.0

    def run(self, parameters: PyTree, rows: Rows) -> Rows:
        """Launches until every row has ended."""
        began = time.perf_counter()
        engine, programs = self.engine, self.engine.programs
        pool = engine.take_pool()
        while not self.scheduler.is_done:
            for item in self.scheduler.work():
                match item:
                    case Chunk():
                        pool = programs.prefill(
                            parameters,
                            pool,
                            rows.tokens,
                            rows.prompt_lengths,
                            item.table,
                            np.int32(item.num_pages),
                            width=item.width,
                        )
                    case Copies():
                        pool = programs.copy(pool, item.pages)
                    case Launch():
                        pool, rows, report = programs.decode(
                            parameters, pool, rows, item.table, np.int32(item.num_pages)
                        )
                        report.copy_to_host_async()
                        self._note(item)
                        self._reports.append((report, item.rows))
            while len(self._reports) > LAG:
                self._read()
        while self._reports:
            self._read()
        engine.keep_pool(pool)
        shards = self.scheduler.shards
        self.work.num_prefilled = sum(s.num_prefilled for s in shards)
        self.work.num_preempted = sum(s.num_preempted for s in shards)
        self.work.host_seconds = time.perf_counter() - began - self._waited
        return rows

    def _note(self, launch: Launch) -> None:
        work, room = self.work, self.scheduler.room
        work.num_launches += 1
        work.num_steps += len(launch.table) * room.steps
        held = sum(room.num_pages - s.num_free_pages for s in self.scheduler.shards)
        work.most_pages = max(work.most_pages, held)
        if self.is_traced:
            slots = np.full(len(launch.table), -1, np.int32)
            for slot, row in launch.rows:
                slots[slot] = self._place(slot, row)
            work.slots.append(slots)
            work.held.append(held)

    def _place(self, slot: int, row: Row) -> int:
        """A row's number in the rollout."""
        return slot // self.scheduler.room.num_slots * self._per_shard + row.index

    def _read(self) -> None:
        """Takes note of what the oldest launch in flight did."""
        report, rows = self._reports.popleft()
        began = time.perf_counter()
        found = np.asarray(report)
        self._waited += time.perf_counter() - began
        num_new = 0
        for slot, row in rows:
            place = self._place(slot, row)
            has_ended, length = found[slot, 0], int(found[slot, 1])
            if self._is_over[place]:
                continue  # Its last launch was issued before that was known.
            before, self._lengths[place] = self._lengths[place], length
            num_new += length - int(before)
            if self.on_tokens is not None and length > before:
                tokens = found[slot, 2 : 2 + length - before].tolist()
                kept = self.on_tokens(place, tokens)
                if kept is not None:
                    self.cuts[place] = self._prompts[place] + kept
                    self.is_stopped[place] = has_ended = True
            if has_ended:
                self._is_over[place] = True
                if not row.has_ended:
                    shard = self.scheduler.shards[slot // self.scheduler.room.num_slots]
                    shard.end(row)
        self.work.num_tokens += num_new
        if self.on_progress is not None:
            done = self._total - int((~self._is_over).sum())
            self.on_progress(done, self._total, self.work.num_tokens)
