"""What to launch next: a chunk of prefill or some steps of decoding, on all shards.

    admit ──▶ chunk of prefill ──▶ copies of pages ──▶ launch of decoding ──▶ …
       ▲                                                        │
       └──────── rows that ended, known some launches late ◀────┘

Shapes are static: a chunk is one of a few (rows, tokens), a launch has all slots.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from realjax.core.arrays import Int
from realjax.rollout.shard import Row, Shard

SHORTEST_CHUNK = 32
"""Fewest tokens of a row that a chunk has room for."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Prompts to prefill; lines of row, first token, number of tokens and pages."""

    width: int
    table: Int[np.ndarray, "B M"]
    num_pages: int


@dataclasses.dataclass(frozen=True)
class Copies:
    """Pages to copy: from, to; -1 where there is none."""

    pages: Int[np.ndarray, "C 2"]


@dataclasses.dataclass(frozen=True)
class Launch:
    """Steps of decoding.

    Attributes:
        table: row, first page and pages of every slot; -1 where there is none.
        num_pages: columns in use.
        rows: who is in which slot.
        num_held: pages held on all shards.
    """

    table: Int[np.ndarray, "B M"]
    num_pages: int
    rows: tuple[tuple[int, Row], ...] = ()
    num_held: int = 0


def chunk_shapes(longest: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """List (tokens of a row, rows) that chunks may have, narrow ones first.

    Tokens are powers of two; rows are one, or as many as make a whole chunk.

    Args:
        longest: tokens of the longest prompt.
        chunk_tokens: tokens of a whole chunk.
    """
    width, shapes = SHORTEST_CHUNK, []
    while True:
        most = max(chunk_tokens // width, 1)
        shapes += [(width, rows) for rows in sorted({1, most})]
        if width >= min(longest, chunk_tokens):
            return shapes
        width *= 2


class Scheduler:
    """Decides what is launched; knows lengths, and no token.

    Attributes:
        shards: rows, slots and pages of each row shard.
        num_steps: row steps that decoding launches had room for so far.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        num_columns: int,
        shapes: Sequence[tuple[int, int]],
        is_refilling: bool = True,
    ):
        """Takes shards of equal room.

        Args:
            shards: with their rows waiting.
            num_columns: pages of the longest row.
            shapes: of chunks on each shard, see `chunk_shapes`.
            is_refilling: whether a slot is given on before all are free.
        """
        self.shards, self.room = shards, shards[0].room
        self.num_columns, self.is_refilling = num_columns, is_refilling
        self.shapes = shapes
        self.num_launches = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to launch."""
        return all(shard.is_done for shard in self.shards)

    def next_items(self) -> Iterator[Chunk | Copies | Launch]:
        """What to launch up to the next launch of decoding, that included."""
        if self.is_refilling or not any(any(s.slots) for s in self.shards):
            for shard in self.shards:
                shard.admit()
        while (chunk := self._chunk()) is not None:
            yield chunk
            copies = [shard.settle() for shard in self.shards]
            if any(copies):
                yield self._copies(copies)
            # While more rows wait for their prompts than decode, prompts go first.
            filling = sum(shard.num_filling for shard in self.shards)
            if filling <= sum(len(shard.decoding) for shard in self.shards):
                break
        copies = [shard.settle() for shard in self.shards]
        if any(copies):
            yield self._copies(copies)
        launch = self._launch()
        if launch is not None:
            yield launch

    def _chunk(self) -> Chunk | None:
        most = max(rows for _, rows in self.shapes)
        pending = [shard.pending(most) for shard in self.shards]
        if not any(pending):
            return None
        longest = max(tokens[0] for tokens in pending if tokens)
        wanted = max(map(len, pending))
        width, rows = self._shape(longest, wanted)
        table = np.full(
            (len(self.shards), rows, 3 + self.num_columns), -1, dtype=np.int32
        )
        table[:, :, 1:3] = 0
        num_pages = 0
        for shard, lines in zip(self.shards, table, strict=True):
            segments = shard.take_segments(width, rows)
            for line, segment in zip(lines, segments, strict=False):
                line[:3] = segment.row, segment.start, segment.count
                line[3 : 3 + len(segment.pages)] = segment.pages
                end = self.room.pages_of(segment.start + segment.count)
                num_pages = max(num_pages, end)
        return Chunk(width, table.reshape(-1, table.shape[-1]), num_pages)

    def _shape(self, longest: int, wanted: int) -> tuple[int, int]:
        """The smallest shape with room for some tokens and rows, or the largest."""
        widths = [width for width, _ in self.shapes]
        width = next((w for w in widths if w >= longest), widths[-1])
        rows = [rows for w, rows in self.shapes if w == width]
        return width, next((r for r in rows if r >= wanted), rows[-1])

    def _copies(self, copies: list[list[tuple[int, int]]]) -> Copies:
        pages = np.full((len(self.shards), self.room.num_slots, 2), -1, np.int32)
        for lines, pairs in zip(pages, copies, strict=True):
            if pairs:
                lines[: len(pairs)] = pairs
        return Copies(pages.reshape(-1, 2))

    def _launch(self) -> Launch | None:
        for shard in self.shards:
            shard.grow()
        if not any(shard.decoding for shard in self.shards):
            return None
        tables = [shard.table(self.num_columns) for shard in self.shards]
        rows = tuple(
            (index * self.room.num_slots + row.slot, row)
            for index, shard in enumerate(self.shards)
            for row in shard.decoding
        )
        num_pages = max(len(row.pages) for _, row in rows)
        num_held = sum(
            self.room.num_pages - shard.num_free_pages for shard in self.shards
        )
        launch = Launch(np.concatenate(tables), num_pages, rows, num_held)
        for shard in self.shards:
            shard.advance()
        self.num_launches += 1
        return launch
