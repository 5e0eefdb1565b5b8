"""Rollouts without a device: pages hold names of texts, so that a wrong one is seen.

A key depends on all tokens up to its own. Here it is a number for that text, a page is
a list of numbers, and every read is compared with the text of the row that reads.
"""

import collections
import dataclasses

import numpy as np

from realjax.rollout.rows import Rows
from realjax.rollout.scheduler import (
    Chunk,
    Copies,
    Launch,
    Scheduler,
)
from realjax.rollout.session import LentPool, New, Session
from realjax.rollout.shard import Prefix, Room, Row, Shard

NOTHING = -1
"""Name of what no text has: unwritten slots, and tokens behind the end of a row."""


_SHAPES = ([(1, 1)], [(1, 2)], [(2, 1), (4, 1), (4, 3)], [(32, 2)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Prompts, and what will come of them.

    Attributes:
        room: of each shard.
        num_shards: row shards.
        prompts: ids; an empty one is a row of padding.
        group: rows of a prompt.
        limits: the most new tokens of each prompt's rows.
        ends: new tokens after which each row ends by itself, at most its limit.
        carried: new tokens that each row has from an earlier rollout.
        stops: new tokens of which the host keeps no more, once it has read as many.
        num_shared: tokens that all prompts begin with, and share.
        is_sharing: whether a prompt's rows share its pages.
        is_refilling: whether a slot is given on before all are free.
        shapes: (tokens of a row, rows) of chunks of prefill.
    """

    room: Room
    num_shards: int
    prompts: list[list[int]]
    group: int
    limits: list[int]
    ends: list[int]
    carried: list[int]
    stops: list[int | None]
    num_shared: int
    is_sharing: bool
    is_refilling: bool
    shapes: list[tuple[int, int]]

    @property
    def per_shard(self) -> int:
        """Rows of a shard, those of padding included."""
        return -(-len(self.ends) // self.num_shards)

    def tokens_of(self, row: int) -> list[int]:
        """All a row will ever hold; what is sampled is its own alone."""
        prompt = self.prompts[row // self.group]
        return prompt + [1000 * (row + 1) + place for place in range(self.ends[row])]


def random_world(generator: np.random.Generator) -> World:
    """Draw sizes and rows; often a pool in which only one row can surely end."""
    draw = lambda low, high: int(generator.integers(low, high + 1))
    page_size, steps, is_sharing = draw(1, 6), draw(1, 6), generator.random() < 0.8
    common = generator.integers(0, 3, draw(0, 20)).tolist()
    common *= int(generator.random() < 0.6)
    longest = draw(1, 30)
    prompts = [
        []
        if generator.random() < 0.1
        else common + generator.integers(0, 3, n).tolist()
        for n in generator.integers(1, longest + 1, draw(1, 10))
    ]
    group = draw(1, 4)
    limits = generator.integers(1, draw(1, 45) + 1, len(prompts)).tolist()
    of_rows = np.repeat(limits, group)
    ends = generator.integers(1, of_rows + 1)
    ends = np.where(generator.random(len(ends)) < 0.5, of_rows, ends).tolist()
    # A row that is carried has not ended; a stop is found in what is new.
    is_carried = generator.random(len(ends)) < generator.choice([0.0, 0.0, 0.4])
    carried = np.where(is_carried, generator.integers(0, ends), 0).tolist()
    stops = [
        draw(has + 1, end) if generator.random() < 0.2 else None
        for has, end in zip(carried, ends, strict=True)
    ]
    room = Room(
        num_slots=draw(1, 8),
        num_pages=0,
        page_size=page_size,
        steps=steps,
        window=draw(1, 12) if generator.random() < 0.3 else None,
    )
    least = max(
        room.needed_pages(len(p) + n) for p, n in zip(prompts, limits, strict=True)
    )
    share = generator.choice([0.0, 0.0, 0.1, 0.3, 1.0])
    num_pages = least + int(share * least * (room.num_slots - 1))
    num_shared = 0
    if is_sharing and sum(map(bool, prompts)) > 1:
        num_shared = _num_common([p[:-1] for p in prompts if p])
        num_shared -= num_shared % page_size
    return World(
        room=dataclasses.replace(room, num_pages=num_pages),
        num_shards=draw(1, 3),
        prompts=prompts,
        group=group,
        limits=limits,
        ends=ends,
        carried=carried,
        stops=stops,
        num_shared=num_shared,
        is_sharing=is_sharing,
        is_refilling=bool(generator.random() < 0.8),
        shapes=_SHAPES[draw(0, len(_SHAPES) - 1)],
    )


def _num_common(texts: list[list[int]]) -> int:
    columns = zip(*texts, strict=False)
    equal = (len(set(column)) == 1 for column in columns)
    return next((i for i, same in enumerate(equal) if not same), min(map(len, texts)))


class WatchedShard(Shard):
    """A shard that looks at itself after rows were admitted."""

    def __init__(self, room, rows):
        """Starts with all rows waiting."""
        super().__init__(room, rows)
        self.order = [row.index for row in self.waiting]
        self.first_serials: dict[int, int] = {}
        self.num_evicted = self.num_cut_short = 0

    def admit(self) -> None:
        """Admits; nobody may wait who could be in a slot."""
        super().admit()
        for row in self.slots:
            if row is not None:
                self.first_serials.setdefault(row.index, row.serial)
        self.check_pages()
        self.check_order()
        if self.waiting and None in self.slots:
            assert self.available_pages() < self.wanted_pages(self.waiting[0])

    def _evict(self, wanted=None) -> bool:
        was_there = super()._evict(wanted)
        self.num_evicted += was_there
        return was_there

    def _preempt(self, row: Row) -> None:
        self.num_cut_short += not row.is_decoding
        super()._preempt(row)

    def available_pages(self) -> int:
        """Pages that are free, or held by prefixes alone that nobody is waiting for."""
        line = []
        prefix = self.waiting[0].prefix
        while prefix is not None:
            line.append(prefix)
            prefix = prefix.parent
        # A parent is in use while a prefix that goes on from it is.
        used = [p for p in self._present if p.num_takers - self._num_children(p) > 0]
        keeps = {id(p) for p in line}
        for prefix in used:
            keeps |= {id(prefix), id(prefix.parent)}
        held = set()
        for prefix in self._present:
            if id(prefix) in keeps:
                held |= set(prefix.pages)
        for row in self.slots:
            if row is not None:
                held |= {*row.pages, *row.reserved}
        return self.room.num_pages - len(held)

    def _num_children(self, prefix: Prefix) -> int:
        return sum(other.parent is prefix for other in self._present)

    def wanted_pages(self, row: Row) -> int:
        """Pages for a row's first launch, and of those who are there for the next."""
        room = self.room
        end = room.pages_of(min(row.length + room.steps, row.limit) - 1)
        full = row.prefix.length // room.page_size
        wanted, prefix = end - full, row.prefix
        if not prefix.is_here:
            there = 0
            if prefix.parent is not None and prefix.parent.is_here:
                there = prefix.parent.length // room.page_size
            wanted += room.pages_of(prefix.length) - there
        for other in self.slots:
            if other is not None:
                first = len(other.pages) + len(other.reserved) + other.first_page
                if not other.has_prefix:
                    first += other.prefix.length // room.page_size
                last = room.pages_of(other.limit - 1)
                wanted += min(last - first, room.pages_of(room.steps))
        return wanted

    def check_order(self) -> None:
        """Who came first is served first, also of those who gave way."""
        there = [row for row in self.slots if row is not None]
        there.sort(key=lambda row: row.serial)
        order = [row.index for row in (*there, *self.waiting)]
        assert order == sorted(order)

    def check_pages(self) -> None:
        """Every page is free, or held as often as its holders are counted."""
        holders, takers = collections.Counter(), collections.Counter()
        for prefix in self._present:
            holders.update(prefix.pages)
            takers[prefix.parent] += 1
        for row in self.slots:
            if row is None:
                continue
            assert len({*row.pages, *row.reserved}) == len(row.pages + row.reserved)
            holders.update(row.pages + row.reserved)
            if row.is_decoding:
                held = row.first_page + len(row.pages)
                assert held == self.room.pages_of(row.length - 1)
            else:
                takers[row.prefix] += 1
        waiting = collections.Counter(row.prefix for row in self.waiting)
        for prefix in self._present:
            assert prefix.num_takers == takers[prefix]
            assert prefix.num_waiting == waiting[prefix]
        free = collections.Counter(self._free)
        assert not free.keys() & holders.keys()
        assert set(free.values()) <= {1}
        assert len(free) + len(holders) == self.room.num_pages
        assert self._holders == [holders[p] for p in range(self.room.num_pages)]


class Device(LentPool):
    """What the programs do, on pages of names; it checks every read and write."""

    def __init__(self, world: World, scheduler: Scheduler):
        """Starts with nothing written."""
        self.world, self.scheduler, self.room = world, scheduler, world.room
        names: dict[tuple[int, int], int] = {}
        self.texts, self.lengths, self.ends = [], [], []
        for row in range(world.per_shard * world.num_shards):
            tokens = world.tokens_of(row) if row < len(world.ends) else []
            prompt = world.prompts[row // world.group] if tokens else []
            name, text = NOTHING, []
            for token in tokens:
                name = names.setdefault((name, token), len(names))
                text.append(name)
            self.texts.append(text)
            has = world.carried[row] if prompt else 0
            self.lengths.append(len(prompt) + has)
            self.ends.append(len(tokens) if prompt else 0)
        shape = (world.num_shards, self.room.num_pages, self.room.page_size)
        self.pages = np.full(shape, NOTHING - 1)
        self.num_chunks = self.num_copies = self.num_slid = 0
        self._chunks_in_a_row = 0

    def has_ended(self, place: int) -> bool:
        """Whether a row has; the host learns it later."""
        return self.lengths[place] >= self.ends[place]

    def _by_shard(self, table: np.ndarray) -> np.ndarray:
        return table.reshape(self.world.num_shards, -1, table.shape[-1])

    def _read(self, shard: int, place: int, line: np.ndarray, end: int) -> set[int]:
        """Check that a row sees itself up to `end`; `line` is first page and pages."""
        first_page, pages = line[0], line[1:]
        window = self.room.window or end
        seen = set()
        for position in range(max(end - window, 0), min(end, self.lengths[place])):
            column = position // self.room.page_size - first_page
            assert 0 <= column < len(pages), "a page is missing"
            page = pages[column]
            assert page >= 0, "a page is missing"
            found = self.pages[shard, page, position % self.room.page_size]
            assert found == self.texts[place][position], f"row {place} reads another"
            seen.add(int(page))
        return seen

    def _write(self, shard: int, place: int, line: np.ndarray, position: int) -> int:
        """Write what a row has there; return the page."""
        page = int(line[1 + position // self.room.page_size - line[0]])
        assert page >= 0, "what is written has no page"
        is_known = position < self.lengths[place]
        name = self.texts[place][position] if is_known else NOTHING
        self.pages[shard, page, position % self.room.page_size] = name
        return page

    def prefill(self, parameters, rows, chunk: Chunk) -> None:
        """Write tokens that are known."""
        del parameters, rows
        shards = self.scheduler.shards
        filling = sum(shard.num_filling for shard in shards)
        if self._chunks_in_a_row > 0:
            assert filling > sum(len(shard.decoding) for shard in shards)
        self._chunks_in_a_row += 1
        self.num_chunks += 1
        table = self._by_shard(chunk.table)
        assert (chunk.width, table.shape[1]) in self.scheduler.shapes
        assert (chunk.table[:, 0] >= 0).any()
        for index, lines in enumerate(table):
            used, written = [], []
            for row, start, count, *pages in lines:
                used.append(set())
                written.append(set())
                if row < 0:
                    continue
                place = index * self.world.per_shard + row
                end = start + count
                assert 0 < count <= chunk.width
                assert self.has_ended(place) or end < self.lengths[place]
                line = np.array([0, *pages[: chunk.num_pages]])
                used[-1] = self._read(index, place, line, start)
                for position in range(start, end):
                    written[-1].add(self._write(index, place, line, position))
                used[-1] |= written[-1]
            _check_apart(used, written)

    def copy(self, copies: Copies) -> None:
        """Copy pages."""
        for index, pairs in enumerate(self._by_shard(copies.pages)):
            pairs = pairs[pairs[:, 1] >= 0]
            assert (pairs >= 0).all()
            assert len(set(pairs[:, 1])) == len(pairs)
            self.pages[index, pairs[:, 1]] = self.pages[index, pairs[:, 0]]
            self.num_copies += len(pairs)

    def decode(self, parameters, rows, launch: Launch):
        """Give every row in a slot its next tokens; a report for the host."""
        del parameters
        self._chunks_in_a_row = 0
        room, steps = self.room, self.room.steps
        there = {slot: row for slot, row in launch.rows}
        assert there
        report = np.zeros((len(launch.table), 2 + 3 * steps), np.int32)
        used = [[set() for _ in range(room.num_slots)] for _ in self.scheduler.shards]
        written = [[set() for _ in range(room.num_slots)] for _ in used]
        for slot, (index_in_shard, *line) in enumerate(launch.table):
            if slot not in there:
                assert index_in_shard == -1
                continue
            shard, place_in_shard = divmod(slot, room.num_slots)
            row = there[slot]
            assert row.index == index_in_shard
            place = shard * self.world.per_shard + row.index
            line = np.array(line)
            self.num_slid += int(line[0] > 0)
            before = self.lengths[place]
            for _ in range(steps):
                if self.has_ended(place):
                    break
                end = self.lengths[place]
                seen = line[: 1 + launch.num_pages]
                page = self._write(shard, place, seen, end - 1)
                written[shard][place_in_shard].add(page)
                used[shard][place_in_shard] |= self._read(shard, place, seen, end)
                self.lengths[place] += 1
            assert self.has_ended(place) or self.lengths[place] == row.length
            report[slot, 0] = self.has_ended(place)
            report[slot, 1] = self.lengths[place]
            new = self.world.tokens_of(place)[before : self.lengths[place]]
            new = new[: self.lengths[place] - before]
            report[slot, 2 : 2 + len(new)] = new
        for of_shard in zip(used, written, strict=True):
            _check_apart(*of_shard)
        return rows, _Report(report)


class _Report:
    """An array that is on its way to the host."""

    def __init__(self, values: np.ndarray):
        self._values = values

    def copy_to_host_async(self) -> None:
        """It is there already."""

    def __array__(self, dtype=None, copy=None):
        return self._values


def _check_apart(used: list[set[int]], written: list[set[int]]) -> None:
    """What one writes no other writes or reads at the same time."""
    times = collections.Counter(page for pages in used for page in pages)
    for pages in written:
        assert all(times[page] == 1 for page in pages), "two rows, one page"


def scheduler_of(world: World) -> Scheduler:
    """Rows, prefixes and shards of a world, as an engine makes them."""
    shards = []
    for shard in range(world.num_shards):
        parent = Prefix(world.num_shared) if world.num_shared else None
        prefixes: dict[int, Prefix] = {}
        rows = []
        for index in range(world.per_shard):
            place = shard * world.per_shard + index
            prompt = place // world.group
            if place >= len(world.ends) or not world.prompts[prompt]:
                continue
            length = len(world.prompts[prompt])
            if prompt not in prefixes or not world.is_sharing:
                prefixes[prompt] = Prefix(length - 1, parent)
            limit, has = length + world.limits[prompt], world.carried[place]
            rows.append(Row(index, prefixes[prompt], length + has, limit))
        shards.append(WatchedShard(world.room, rows))
    most = max(len(p) + n for p, n in zip(world.prompts, world.limits, strict=True))
    return Scheduler(
        shards,
        num_columns=world.room.pages_of(most),
        shapes=world.shapes,
        is_refilling=world.is_refilling,
    )


@dataclasses.dataclass(frozen=True)
class Past:
    """A rollout that is over, and what the host has read of each row."""

    session: Session
    device: Device
    told: dict[int, list[int]]
    ended: list[int]


def roll_out(world: World) -> Past:
    """Run a world to its end."""
    scheduler = scheduler_of(world)
    device = Device(world, scheduler)
    told: dict[int, list[int]] = collections.defaultdict(list)

    def on_tokens(place: int, new: New) -> int | None:
        assert new.ids
        told[place] += new.ids
        count, stop = world.carried[place] + len(told[place]), world.stops[place]
        assert new.has_ended == (count == world.ends[place])
        return stop if stop is not None and count >= stop else None

    num_rows = world.per_shard * world.num_shards
    rows = Rows(*[None] * len(Rows._fields))._replace(lengths=np.zeros(num_rows))
    session = Session(
        device, {}, rows, scheduler, size=len(world.ends), on_tokens=on_tokens
    )
    ended = []
    while not session.is_done:
        ended += session.advance()
    return Past(session, device, told, ended)
