"""A rollout under way: the host launches work and reads which rows have ended."""

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from realjax.core.arrays import Array, Int, PyTree
from realjax.models.pages import Pool
from realjax.rollout.programs import Programs
from realjax.rollout.rows import Rollout, Rows
from realjax.rollout.scheduler import Chunk, Copies, Launch, Scheduler
from realjax.rollout.shard import Row

LAG = 1
"""Launches that run while the host waits for the report of the one before them."""

FOREVER = np.int32(2**31 - 1)

OnProgress = Callable[[int, int, int], None]
"""Told rows that have ended, rows in all, and tokens sampled."""


class New(NamedTuple):
    """What a row has got, up to its end if that was in sight."""

    ids: list[int]
    logprobs: list[float]
    entropy: list[float]
    has_ended: bool


OnTokens = Callable[[int, New], int | None]
"""Told a row and what it has got; where the row ends by that although it has not ended
itself, returns how many tokens its completion keeps in all."""


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


class LentPool:
    """A pool, and the programs that take it and give it back."""

    def __init__(self, programs: Programs, pool: Pool):
        self.programs, self.pool = programs, pool

    def prefill(self, parameters: PyTree, rows: Rows, chunk: Chunk) -> None:
        """Launch a chunk of prefill."""
        self.pool = self.programs.prefill(
            parameters,
            self.pool,
            rows.tokens,
            rows.prompt_lengths,
            chunk.table,
            np.int32(chunk.num_pages),
            width=chunk.width,
        )

    def copy(self, copies: Copies) -> None:
        """Launch copies of pages."""
        self.pool = self.programs.copy(self.pool, copies.pages)

    def decode(
        self, parameters: PyTree, rows: Rows, launch: Launch
    ) -> tuple[Rows, Array]:
        """Launch steps of decoding; the rows, and a report for the host."""
        self.pool, rows, report = self.programs.decode(
            parameters, self.pool, rows, launch.table, np.int32(launch.num_pages)
        )
        return rows, report


class Session:
    """One rollout under way: launches work, reads reports, and knows who has ended.

    Attributes:
        rows: the state of all completions, on the devices.
        work: what it took so far.
        has_ended: of every row, as far as it is known; rows of padding have.
    """

    def __init__(
        self,
        pool: LentPool,
        parameters: PyTree,
        rows: Rows,
        scheduler: Scheduler,
        *,
        size: int,
        on_tokens: OnTokens | None = None,
        on_progress: OnProgress | None = None,
        is_traced: bool = False,
    ):
        """Launches nothing yet.

        Args:
            pool: of the engine.
            parameters: of the model.
            rows: their state at the beginning.
            scheduler: with the rows that wait in its shards.
            size: rows that are wanted; those after them only fill up the shards.
            on_tokens: told what rows have got.
            on_progress: told how far it is.
            is_traced: whether `work` keeps what every slot did.
        """
        self._pool, self._parameters, self.rows = pool, parameters, rows
        self.scheduler, self.work, self._size = scheduler, Work(), size
        self._on_tokens, self._on_progress = on_tokens, on_progress
        self._is_traced, num_rows = is_traced, rows.lengths.shape[0]
        self._cuts = np.full(num_rows, FOREVER, np.int32)
        self._is_stopped = np.zeros(num_rows, bool)
        self._per_shard = num_rows // len(scheduler.shards)
        self._lengths = np.zeros(num_rows, np.int64)  # As reported.
        self._prompt_lengths = np.zeros(num_rows, np.int64)
        self.has_ended = np.ones(num_rows, bool)
        for index, shard in enumerate(scheduler.shards):
            for row in shard.waiting:
                place = index * self._per_shard + row.index
                self._lengths[place] = row.length
                self._prompt_lengths[place] = row.prefix.length + 1
                self.has_ended[place] = False
        self._total = int((~self.has_ended).sum())
        self._reports: collections.deque = collections.deque()
        self._ended: list[int] = []
        self._began, self._waited = time.perf_counter(), 0.0

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return self.scheduler.is_done and not self._reports

    def advance(self) -> list[int]:
        """Launch the next steps of decoding and what they need first.

        Returns:
            The rows that are now known to have ended.
        """
        for item in self.scheduler.next_items():
            match item:
                case Chunk():
                    self._pool.prefill(self._parameters, self.rows, item)
                case Copies():
                    self._pool.copy(item)
                case Launch():
                    self.rows, report = self._pool.decode(
                        self._parameters, self.rows, item
                    )
                    report.copy_to_host_async()
                    self._note(item)
                    self._reports.append((report, item.rows))
        while len(self._reports) > (0 if self.scheduler.is_done else LAG):
            self._read()
        return self._take_ended()

    def drain(self) -> list[int]:
        """Read the reports of what is launched, and launch nothing; as `advance`."""
        while self._reports:
            self._read()
        return self._take_ended()

    def results(self, index: Int[np.ndarray, " K"] | None = None) -> Rollout:
        """Return rows as they are now, cut where a stop string ended them.

        Args:
            index: which, -1 for an empty row; None is all.
        """
        size = self._size if index is None else len(index)
        return self._pool.programs.finish(
            self.rows, index, self._cuts, self._is_stopped, size=size
        )

    def lengths(self, index: Int[np.ndarray, " K"]) -> Int[np.ndarray, " K"]:
        """Return tokens of prompt and completion of rows, as reported; 0 for -1."""
        found = np.minimum(self._lengths, self._cuts)[index]
        return np.where(index < 0, 0, found).astype(np.int32)

    def _take_ended(self) -> list[int]:
        ended, self._ended = self._ended, []
        shards, work = self.scheduler.shards, self.work
        work.num_prefilled = sum(shard.num_prefilled for shard in shards)
        work.num_preempted = sum(shard.num_preempted for shard in shards)
        work.seconds = time.perf_counter() - self._began
        work.host_seconds = work.seconds - self._waited
        return ended

    def _note(self, launch: Launch) -> None:
        work, room = self.work, self.scheduler.room
        work.num_launches += 1
        work.num_steps += len(launch.table) * room.steps
        work.most_pages = max(work.most_pages, launch.num_held)
        if self._is_traced:
            slots = np.full(len(launch.table), -1, np.int32)
            for slot, row in launch.rows:
                slots[slot] = self._place(slot, row)
            work.slots.append(slots)
            work.held.append(launch.num_held)

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
            if self.has_ended[place]:
                continue  # Its last launch was issued before that was known.
            before, self._lengths[place] = self._lengths[place], length
            num_new += length - int(before)
            if self._on_tokens is not None:
                new = _new(found[slot], length - int(before))
                kept = self._on_tokens(place, new)
                if kept is not None:
                    self._cuts[place] = self._prompt_lengths[place] + kept
                    self._is_stopped[place] = has_ended = True
            if has_ended:
                self.has_ended[place] = True
                self._ended.append(place)
                if not row.has_ended:
                    shard = self.scheduler.shards[slot // self.scheduler.room.num_slots]
                    shard.end(row)
        self.work.num_tokens += num_new
        if self._on_progress is not None:
            done = self._total - int((~self.has_ended).sum())
            self._on_progress(done, self._total, self.work.num_tokens)


def _new(line: np.ndarray, count: int) -> New:
    """Read a slot's line of a report, see `Programs.decode`."""
    tokens, *floats = np.split(line[2:], 3)
    logprobs, entropy = (part[:count].view(np.float32).tolist() for part in floats)
    return New(tokens[:count].tolist(), logprobs, entropy, bool(line[0]))
