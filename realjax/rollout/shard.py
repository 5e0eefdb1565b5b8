"""Slots and pages of one row shard: which completion stands where, decided on the host.

    prompt 0    [p0][p1][p2·]                 pages of the prompt, the last partly full
    row 0       [p0][p1][p7·][p9]             shares full pages, owns a copy of the last
    row 1       [p0][p1][p2·][p8]             the last row to start takes it over

Every page counts its holders and is free when there are none. A row that has to give
way is preempted: its pages are freed, its tokens stay on the device, and it comes back
by prefilling them. Nothing here touches a device, and nothing depends on time, so every
process decides alike.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from realjax.core.arrays import Int
from realjax.models.config import ModelConfig
from realjax.rollout.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """What a row shard has room for.

    Attributes:
        num_slots: completions decoded at the same time.
        num_pages: of the pool.
        page_size: tokens of a page.
        steps: tokens a launch decodes.
        window: tokens that every layer sees at most; None has no limit.
    """

    num_slots: int
    num_pages: int
    page_size: int
    steps: int
    window: int | None = None

    def pages_of(self, num_tokens: int) -> int:
        """Count the pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def needed_pages(self, limit: int) -> int:
        """Count the pages with which a row of up to `limit` tokens can always end.

        The last token is never read. One page more: the partly full page of a prompt is
        held by the prompt and by its row for a moment.
        """
        return self.pages_of(max(limit - 1, 1)) + 1


def room_of(
    config: ModelConfig, settings: Settings, *, width: int, num_shards: int
) -> Room:
    """Return what each row shard of an engine has room for.

    Args:
        config: of the model.
        settings: of the engine; those of slots and pages are of all shards together.
        width: tokens of the longest row.
        num_shards: row shards.
    """
    windows = [window for window in config.layer_windows if window is not None]
    room = Room(
        num_slots=-(-settings.slots // num_shards),
        num_pages=settings.pages // num_shards,
        page_size=settings.page_size,
        steps=settings.steps,
        # Where one layer sees everything, everything is kept.
        window=max(windows) if len(windows) == config.num_layers else None,
    )
    if settings.pages:
        return room
    enough = room.num_slots * room.needed_pages(width)
    return dataclasses.replace(room, num_pages=enough)


@dataclasses.dataclass(eq=False)
class Prefix:
    """Tokens [0, length) of a prompt, or of all prompts, as keys and values in pages.

    Attributes:
        length: tokens that are prefilled; all of a prompt but the last.
        parent: what it goes on from, with full pages only.
        num_waiting: rows that have yet to take it.
        pages: of all its tokens, the parent's included; empty while it is not there.
        done: tokens whose prefill is issued.
        num_takers: rows in slots that wait until it is done.
    """

    length: int
    parent: "Prefix | None" = None
    num_waiting: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    done: int = 0
    num_takers: int = 0
    is_here: bool = False

    @property
    def is_done(self) -> bool:
        """Whether all its tokens are in its pages, the parent's included."""
        if not self.is_here or self.done < self.length:
            return False
        return self.parent is None or self.parent.is_done


@dataclasses.dataclass(eq=False)
class Row:
    """One completion.

    Attributes:
        index: of the row in its shard.
        prefix: its prompt, all but the last token.
        length: tokens so far, of prompt and completion, unless it has ended.
        limit: the most tokens of both.
        first_page: index in the sequence of the first of `pages`.
        reserved: pages that will follow those of the prefix.
        done: tokens whose keys are in `pages`, or will be by what is issued, until it
            decodes.
        has_prefix: whether it has taken its prefix.
        is_decoding: whether it is in the launches.
        serial: rises with every entry into a slot.
    """

    index: int
    prefix: Prefix
    length: int
    limit: int
    has_ended: bool = False
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    reserved: list[int] = dataclasses.field(default_factory=list)
    first_page: int = 0
    done: int = 0
    has_prefix: bool = False
    is_decoding: bool = False
    serial: int = -1


@dataclasses.dataclass(frozen=True)
class Segment:
    """Some tokens of a row's buffer, to be prefilled into pages."""

    row: int
    start: int
    count: int
    pages: list[int]


class Shard:
    """Rows, slots and pages of one row shard.

    Attributes:
        num_preempted: rows that had to give way so far.
        num_prefilled: tokens prefilled so far.
    """

    def __init__(self, room: Room, rows: Iterable[Row]):
        """Starts with all rows waiting and all pages free."""
        self.room = room
        self.waiting = collections.deque(row for row in rows if row.limit > 0)
        for row in self.waiting:
            row.prefix.num_waiting += 1
        self.slots: list[Row | None] = [None] * room.num_slots
        self.decoding: list[Row] = []  # In order of their serials.
        self._filling: list[Row] = []  # In slots, not decoding yet; in the same order.
        self._free = list(range(room.num_pages - 1, -1, -1))
        self._holders = [0] * room.num_pages
        self._copies: list[tuple[int, int]] = []
        self._present: list[Prefix] = []
        self._num_entries = 0
        self._table = np.zeros((room.num_slots, 0), np.int32)
        self._stale: set[int] = set()  # Slots whose line of the table is old.
        self.num_preempted = self.num_prefilled = 0

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return not self.waiting and all(row is None for row in self.slots)

    @property
    def num_filling(self) -> int:
        """Rows in slots whose prompts are not prefilled yet."""
        return len(self._filling)

    @property
    def num_free_pages(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    # -- entering slots --------------------------------------------------------------

    def admit(self) -> None:
        """Give free slots to waiting rows, first come first served, if pages last."""
        if not self.waiting or None not in self.slots:
            return
        spoken_for = sum(
            self._num_growing(row) for row in self.slots if row is not None
        )
        while self.waiting and None in self.slots:
            row = self.waiting[0]
            if not self._has_pages(row, spoken_for):
                return
            self.waiting.popleft()
            self._enter(row, self.slots.index(None))
            row.prefix.num_waiting -= 1
            spoken_for += self._num_growing(row)

    def _num_growing(self, row: Row) -> int:
        """Pages that a row in a slot takes at most for one launch more."""
        room = self.room
        held = row.first_page + len(row.pages) + len(row.reserved)
        if not row.has_prefix:
            held += row.prefix.length // room.page_size
        return min(room.pages_of(row.limit - 1) - held, room.pages_of(room.steps))

    def _has_pages(self, row: Row, spoken_for: int) -> bool:
        """Whether a row can enter and all others can go on; alone it always can."""
        room, prefix = self.room, row.prefix
        needed = self._num_own_pages(row) + spoken_for
        while prefix is not None and not prefix.is_here:
            held = 0 if prefix.parent is None else prefix.parent.length
            needed += room.pages_of(prefix.length) - held // room.page_size
            prefix = prefix.parent
        while len(self._free) < needed and self._evict(row.prefix):
            pass
        return len(self._free) >= needed

    def _num_own_pages(self, row: Row) -> int:
        """Pages after the full ones of its prompt, for its next launch."""
        end = min(row.length + self.room.steps, row.limit) - 1
        return self.room.pages_of(end) - row.prefix.length // self.room.page_size

    def _enter(self, row: Row, slot: int) -> None:
        self._bring(row.prefix)
        row.prefix.num_takers += 1
        self.slots[slot], row.slot = row, slot
        self._num_entries += 1
        row.serial = self._num_entries
        row.reserved = self._take(self._num_own_pages(row))
        row.pages, row.first_page, row.done = [], 0, 0
        row.has_prefix = row.is_decoding = False
        self._filling.append(row)

    def _bring(self, prefix: Prefix) -> None:
        """Give a prefix its pages, unless it has them."""
        if prefix.is_here:
            return
        shared: list[int] = []
        if prefix.parent is not None:
            self._bring(prefix.parent)
            prefix.parent.num_takers += 1
            shared = prefix.parent.pages
        for page in shared:
            self._holders[page] += 1
        count = self.room.pages_of(prefix.length) - len(shared)
        prefix.pages = [*shared, *self._take(count)]
        prefix.done = 0 if prefix.parent is None else prefix.parent.length
        prefix.is_here = True
        self._present.append(prefix)

    def _drop(self, prefix: Prefix) -> None:
        """Free a prefix's pages, but for those that rows hold."""
        if not prefix.is_here:
            return
        self._release(prefix.pages)
        prefix.pages, prefix.done, prefix.is_here = [], 0, False
        self._present.remove(prefix)
        if prefix.parent is not None:
            prefix.parent.num_takers -= 1

    def _evict(self, wanted: Prefix | None = None) -> bool:
        """Drop a prefix that no row in a slot waits for; False if there is none."""
        for prefix in self._present:
            if prefix.num_takers == 0 and prefix not in _line(wanted):
                self._drop(prefix)
                return True
        return False

    # -- prefill ---------------------------------------------------------------------

    def pending(self, count: int) -> list[int]:
        """Tokens to prefill of up to `count` things that can be prefilled now."""
        jobs = itertools.islice(self._jobs(), count)
        return [end - start for _, _, start, end in jobs]

    def take_segments(self, width: int, count: int) -> list[Segment]:
        """Issue up to `count` segments of up to `width` tokens."""
        segments = []
        for owner, row, start, end in list(itertools.islice(self._jobs(), count)):
            end = min(end, start + width)
            segments.append(Segment(row.index, start, end - start, list(owner.pages)))
            owner.done = end
            self.num_prefilled += end - start
        return segments

    def _jobs(self) -> Iterator[tuple[Prefix | Row, Row, int, int]]:
        """Who needs tokens [start, end) of which row's buffer, in order of entry."""
        seen = set()
        for row in self._filling:
            prefix = row.prefix
            if prefix.is_done:
                self._take_prefix(row)
                if row.done < row.length - 1:
                    yield row, row, row.done, row.length - 1
                continue
            while prefix.parent is not None and not prefix.parent.is_done:
                prefix = prefix.parent  # What goes on from it waits.
            if prefix not in seen:
                seen.add(prefix)
                yield prefix, row, prefix.done, prefix.length

    def _take_prefix(self, row: Row) -> None:
        """Hand a prefilled prefix to a row: full pages shared, the rest its own."""
        if row.has_prefix:
            return
        prefix, row.has_prefix = row.prefix, True
        full = prefix.length // self.room.page_size
        row.pages = [*prefix.pages[:full], *row.reserved]
        row.reserved = []
        for page in row.pages[:full]:
            self._holders[page] += 1
        row.done = full * self.room.page_size
        if row.length - 1 > prefix.length:
            return  # It comes back, and prefills the rest anew.
        row.done = prefix.length
        if full == len(prefix.pages):
            return
        tail = prefix.pages[full]
        if prefix.num_waiting == 0 and prefix.num_takers == 1:
            self._release([row.pages[full]])
            self._holders[tail] += 1
            row.pages[full] = tail
        else:
            self._copies.append((tail, row.pages[full]))

    def settle(self) -> list[tuple[int, int]]:
        """Let rows decode whose prefill is issued; pages (from, to) to copy first."""
        ready = [row for row in self._filling if self._is_ready(row)]
        for row in ready:
            self.decoding.append(row)
            row.is_decoding = True
            row.prefix.num_takers -= 1
            self._drop_unused(row.prefix)
            self._stale.add(row.slot)
        if ready:
            self._filling = [row for row in self._filling if not row.is_decoding]
            self.decoding.sort(key=lambda row: row.serial)
        copies, self._copies = self._copies, []
        return copies

    def _is_ready(self, row: Row) -> bool:
        """Whether the prefill of all that a row has is issued; it takes its prompt."""
        if not row.prefix.is_done:
            return False
        self._take_prefix(row)
        return row.done >= row.length - 1

    def _drop_unused(self, prefix: Prefix) -> None:
        if prefix.num_waiting == 0 and prefix.num_takers == 0:
            self._drop(prefix)

    # -- decoding --------------------------------------------------------------------

    def grow(self) -> None:
        """Give every decoding row the pages of the next launch, the oldest first.

        Where pages are short, prefixes that nobody uses go first, then the youngest
        rows.
        """
        room = self.room
        for row in list(self.decoding):
            if row.slot < 0:
                continue  # It gave way to an older one.
            end = room.pages_of(min(row.length + room.steps, row.limit) - 1)
            missing = end - row.first_page - len(row.pages)
            while missing > len(self._free) and row.slot >= 0:
                if not self._evict():
                    in_slots = (r for r in self.slots if r is not None)
                    self._preempt(max(in_slots, key=lambda r: r.serial))
            if row.slot >= 0 and missing > 0:
                row.pages += self._take(missing)
                self._stale.add(row.slot)

    def advance(self) -> list[Row]:
        """Count a launch; return the rows that have surely ended with it."""
        room, ended = self.room, []
        for row in self.decoding:
            row.length = min(row.length + room.steps, row.limit)
            if row.length >= row.limit:
                ended.append(row)
            elif room.window is not None:
                self._slide(row, room.window)
        for row in ended:
            self.end(row)
        return ended

    def _slide(self, row: Row, window: int) -> None:
        """Free the pages that no later token sees."""
        first = max(row.length - window, 0) // self.room.page_size
        behind = first - row.first_page
        if behind > 0:
            self._release(row.pages[:behind])
            del row.pages[:behind]
            row.first_page = first
            self._stale.add(row.slot)

    def end(self, row: Row) -> None:
        """Take note that a row has ended, wherever it is; free what it holds."""
        row.has_ended = True
        if row.slot >= 0:
            self._leave_slot(row)
        elif row in self.waiting:  # It was preempted before this was known.
            self.waiting.remove(row)
            row.prefix.num_waiting -= 1
            self._drop_unused(row.prefix)

    def _leave_slot(self, row: Row) -> None:
        self.slots[row.slot] = None
        self._stale.add(row.slot)
        self._release(row.pages + row.reserved)
        row.pages, row.reserved, row.slot = [], [], -1
        if row.is_decoding:
            self.decoding.remove(row)
            row.is_decoding = False
        else:
            self._filling.remove(row)
            row.prefix.num_takers -= 1
            self._drop_unused(row.prefix)

    def _preempt(self, row: Row) -> None:
        self.num_preempted += 1
        row.prefix.num_waiting += 1  # First, so that its prefix is not dropped.
        self._leave_slot(row)
        self.waiting.appendleft(row)

    def table(self, num_columns: int) -> Int[np.ndarray, "B M"]:
        """Row, first page and pages of every slot; -1 where there is none."""
        if self._table.shape[1] != num_columns + 2:
            self._table = np.full((len(self.slots), num_columns + 2), -1, np.int32)
            self._stale = set(range(len(self.slots)))
        for slot in self._stale:
            row, line = self.slots[slot], self._table[slot]
            line[:] = -1
            if row is not None and row.is_decoding:
                line[0], line[1] = row.index, row.first_page
                line[2 : 2 + len(row.pages)] = row.pages
        self._stale.clear()
        return self._table

    # -- pages -----------------------------------------------------------------------

    def _take(self, count: int) -> list[int]:
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def _release(self, pages: list[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)


def _line(prefix: Prefix | None) -> list[Prefix]:
    """A prefix and what it goes on from."""
    line = []
    while prefix is not None:
        line.append(prefix)
        prefix = prefix.parent
    return line
