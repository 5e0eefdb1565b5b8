"""Packs sequences of unlike lengths into rows of one length, in numpy.

    batch [B, T]                    rows [R, S]           segment_ids
    0  a a a a a . .                a a a a a c c         1 1 1 1 1 2 2
    1  b b b . . . .        ->      d d d d b b b         1 1 1 1 2 2 2
    2  c c . . . . .
    3  d d d d . . .

A `Packing` says where every token of one microbatch goes and where to find it again;
its shapes depend on the sizes asked for only, so one compilation serves every batch.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from realjax.core.arrays import Int

__all__ = ["Packing", "pack"]


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of one microbatch are: all int32, all on the host.

    With B sequences in the batch, an index of B (or R*S for a place) is out of range
    on purpose: `x.at[index].get(mode="fill", fill_value=0)` reads it as zero.
    """

    sequences: Int[np.ndarray, "M"]
    """Row of the batch in each slot of the microbatch; B where the slot is empty."""
    source_sequence: Int[np.ndarray, "R S"]
    """Row of the batch the token here comes from; B where padding."""
    source_token: Int[np.ndarray, "R S"]
    """Its index in that row, which is also its position; 0 where padding."""
    segment_ids: Int[np.ndarray, "R S"]
    """1, 2, ... for the sequences of a row; 0 where padding."""
    places: Int[np.ndarray, "M T"]
    """Flat place r * S + s of token t of the slot's sequence; R * S where none."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens packed, padding left out."""
        return int((self.segment_ids > 0).sum())


def pack(
    lengths: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    num_rows: int,
    max_sequences: int,
    width: int,
    num_shards: int = 1,
    unit: int = 1,
) -> list[Packing]:
    """Packs sequences into few microbatches: first-fit-decreasing, or fewer.

    Longest first, every unit goes to the first microbatch with room. Within a
    microbatch its sequences are then spread so that shards get nearly equal tokens.

    Args:
        lengths: Tokens of each sequence of the batch; those of length 0 are left out.
        row_length: S, the tokens of a packed row.
        num_rows: R, the rows of a microbatch, over all shards.
        max_sequences: M, the slots of a microbatch.
        width: T, the tokens of a row of the batch.
        num_shards: Shards the rows are split over, in contiguous blocks.
        unit: Adjacent sequences that stay in one microbatch, in adjacent slots. A unit
            with any token takes all its slots, so slot i is always item i % unit.

    Returns:
        Microbatches; none if no sequence has a token.
    """
    lengths = np.asarray(lengths)
    _check(lengths, row_length, num_rows, max_sequences, width, num_shards, unit)
    microbatches = _assign(
        lengths.reshape(-1, unit), row_length, num_rows, max_sequences // unit
    )
    packings = []
    for microbatch in microbatches:
        units = np.array(sorted(microbatch.units))
        members = (units[:, None] * unit + np.arange(unit)).ravel()
        spread = _spread_evenly(lengths, microbatch.rows, row_length, num_shards)
        packings.append(
            _lay_out(lengths, members, spread, row_length, max_sequences, width)
        )
    return packings


@dataclasses.dataclass(eq=False)
class _Microbatch:
    """A microbatch being filled: its units, and the sequences of each of its rows."""

    units: list[int]
    rows: list[list[int]]
    room: np.ndarray

    @classmethod
    def empty(cls, num_rows: int, row_length: int) -> "_Microbatch":
        rows = [[] for _ in range(num_rows)]
        return cls([], rows, np.full(num_rows, row_length))

    def place(self, lengths: Int[np.ndarray, "U unit"], unit: int) -> bool:
        """Puts the sequences of a unit into the first rows with room, all or none."""
        size = lengths.shape[1]
        room, chosen = self.room.copy(), []
        for item in np.argsort(-lengths[unit], kind="stable").tolist():
            length = lengths[unit, item]
            if length == 0:
                break
            row = int((room >= length).argmax())
            if room[row] < length:
                return False
            room[row] -= length
            chosen.append((row, unit * size + item))
        for row, sequence in chosen:
            self.rows[row].append(sequence)
        self.units.append(unit)
        self.room = room
        return True


def _assign(
    lengths: Int[np.ndarray, "U unit"], row_length: int, num_rows: int, max_units: int
) -> list[_Microbatch]:
    """Chooses the units of each microbatch, and rows that hold them."""
    totals = lengths.sum(axis=1)
    order = np.argsort(-totals, kind="stable")
    order = order[totals[order] > 0].tolist()
    first_fit = _first_fit(lengths, order, row_length, num_rows, max_units)
    # Short sequences come last and can run out of slots, not of room: spreading them
    # over fewer microbatches from the start may do better.
    fewest = max(
        -(-int(totals.sum()) // (num_rows * row_length)), -(-len(order) // max_units)
    )
    for count in range(fewest, len(first_fit)):
        even = [_Microbatch.empty(num_rows, row_length) for _ in range(count)]
        if _fill_evenly(even, lengths, order, max_units):
            return even
    return first_fit


def _first_fit(
    lengths: Int[np.ndarray, "U unit"],
    order: list[int],
    row_length: int,
    num_rows: int,
    max_units: int,
) -> list[_Microbatch]:
    """Every unit into the first microbatch with room, opening one where none has."""
    found: list[_Microbatch] = []
    left = np.zeros(len(order), np.int64)  # tokens each may still take; 0 = closed
    for unit in order:
        total = lengths[unit].sum()
        for index in np.flatnonzero(left >= total).tolist():
            if found[index].place(lengths, unit):
                break
        else:
            index = len(found)
            found.append(_Microbatch.empty(num_rows, row_length))
            left[index] = num_rows * row_length
            if not found[index].place(lengths, unit):
                raise ValueError(
                    f"Sequences of {lengths[unit].tolist()} tokens have to stay "
                    f"together and do not fit into {num_rows} rows of {row_length}. "
                    "Raise `num_rows` or `row_length`."
                )
        left[index] = 0 if len(found[index].units) == max_units else left[index] - total
    return found


def _fill_evenly(
    microbatches: list[_Microbatch],
    lengths: Int[np.ndarray, "U unit"],
    order: list[int],
    max_units: int,
) -> bool:
    """Every unit into the emptiest microbatch with a slot; False if one has no room."""
    left = np.array([int(microbatch.room.sum()) for microbatch in microbatches])
    for unit in order:
        index = int(left.argmax())
        if not microbatches[index].place(lengths, unit):
            return False
        left[index] -= lengths[unit].sum()
        if len(microbatches[index].units) == max_units:
            left[index] = -1
    return True


def _spread_evenly(
    lengths: np.ndarray,
    rows: list[list[int]],
    row_length: int,
    num_shards: int,
) -> list[list[int]]:
    """The same sequences over the same rows, with nearly equal tokens a shard.

    The longest sequence left goes to the emptiest row of the emptiest shard that has
    room for it. Where that does not fit, the rows as found are dealt to the shards.
    """
    num_rows = len(rows)
    shard_of = np.arange(num_rows) // (num_rows // num_shards)
    used = np.zeros(num_rows, np.int64)
    spread: list[list[int]] = [[] for _ in range(num_rows)]
    sequences = sorted((s for row in rows for s in row), key=lambda s: (-lengths[s], s))
    for sequence in sequences:
        fits = np.flatnonzero(used + lengths[sequence] <= row_length)
        if not fits.size:
            return _deal_rows(lengths, rows, num_shards)
        of_shard = np.bincount(shard_of, used, minlength=num_shards)[shard_of[fits]]
        row = int(fits[np.lexsort((used[fits], of_shard))[0]])
        spread[row].append(sequence)
        used[row] += lengths[sequence]
    return spread


def _deal_rows(
    lengths: np.ndarray, rows: list[list[int]], num_shards: int
) -> list[list[int]]:
    """Fullest row first, to the emptiest shard that still takes a row."""
    shards: list[list[list[int]]] = [[] for _ in range(num_shards)]
    tokens = [0] * num_shards
    for row in sorted(rows, key=lambda row: -lengths[row].sum()):
        open_shards = [
            j for j in range(num_shards) if len(shards[j]) < len(rows) // num_shards
        ]
        shard = min(open_shards, key=lambda j: tokens[j])
        shards[shard].append(row)
        tokens[shard] += int(lengths[row].sum())
    return [row for shard in shards for row in shard]


def _lay_out(
    lengths: np.ndarray,
    members: np.ndarray,
    rows: list[list[int]],
    row_length: int,
    max_sequences: int,
    width: int,
) -> Packing:
    """Writes the index arrays of one microbatch; `members` are its slots in order."""
    num_rows, num_sequences = len(rows), len(lengths)
    shape = (num_rows, row_length)
    sequences = np.full(max_sequences, num_sequences, np.int32)
    source_sequence = np.full(shape, num_sequences, np.int32)
    source_token = np.zeros(shape, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    places = np.full((max_sequences, width), num_rows * row_length, np.int32)

    sequences[: len(members)] = np.where(lengths[members] > 0, members, num_sequences)
    slots = {sequence: slot for slot, sequence in enumerate(members.tolist())}
    for r, row in enumerate(rows):
        start = 0
        for segment, sequence in enumerate(row, start=1):
            tokens = np.arange(lengths[sequence])
            here = slice(start, start + len(tokens))
            source_sequence[r, here] = sequence
            source_token[r, here] = tokens
            segment_ids[r, here] = segment
            places[slots[sequence], : len(tokens)] = r * row_length + start + tokens
            start += len(tokens)
    return Packing(
        sequences=sequences,
        source_sequence=source_sequence,
        source_token=source_token,
        segment_ids=segment_ids,
        places=places,
    )


def _check(
    lengths: np.ndarray,
    row_length: int,
    num_rows: int,
    max_sequences: int,
    width: int,
    num_shards: int,
    unit: int,
):
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"`lengths` has shape {lengths.shape} and dtype {lengths.dtype}. "
            "It must be one list of integers."
        )
    sizes = {
        "row_length": row_length,
        "num_rows": num_rows,
        "num_shards": num_shards,
        "unit": unit,
        "width": width,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}. It must be at least 1.")
    if num_rows % num_shards:
        raise ValueError(
            f"{num_rows} rows do not divide over {num_shards} shards. "
            f"Make `num_rows` a multiple of {num_shards}."
        )
    if len(lengths) % unit or max_sequences < unit:
        raise ValueError(
            f"{len(lengths)} sequences in slots of {max_sequences} do not divide into "
            f"units of {unit}. Pad the batch to a multiple of `unit`, and give a "
            "microbatch at least that many slots."
        )
    longest = int(lengths.max(initial=0))
    if longest > min(row_length, width) or lengths.min(initial=0) < 0:
        raise ValueError(
            f"Sequence lengths run from {lengths.min()} to {longest}, but must be "
            f"between 0 and row_length={row_length} (and width={width}). Raise "
            "`row_length`, or shorten the sequences."
        )
