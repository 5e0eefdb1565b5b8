"""Tests of `realjax/data/packing.py`."""

import numpy as np
import pytest

from realjax.data.packing import pack

GRID = [
    # lengths up to, row_length, num_rows, max_sequences, num_shards, unit
    (16, 16, 4, 8, 1, 1),
    (16, 32, 4, 12, 2, 1),
    (9, 40, 8, 64, 8, 2),
    (5, 24, 6, 10, 3, 5),
]


def pack_grid(seed, longest, row_length, num_rows, max_sequences, num_shards, unit):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, 8 * unit)
    packings = pack(
        lengths,
        row_length=row_length,
        num_rows=num_rows,
        max_sequences=max_sequences,
        width=20,
        num_shards=num_shards,
        unit=unit,
    )
    return lengths, packings


def test_two_rows_by_hand():
    # Longest first: 3 opens row 0, 2 goes to the emptier row 1, 1 to the row with
    # fewest tokens that has room, which is row 1 again.
    (packing,) = pack([2, 0, 3, 1], row_length=4, num_rows=2, max_sequences=4, width=3)
    np.testing.assert_array_equal(packing.sequences, [0, 2, 3, 4])
    np.testing.assert_array_equal(packing.source_sequence, [[2, 2, 2, 4], [0, 0, 3, 4]])
    np.testing.assert_array_equal(packing.source_token, [[0, 1, 2, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(packing.segment_ids, [[1, 1, 1, 0], [1, 1, 2, 0]])
    np.testing.assert_array_equal(
        packing.places, [[4, 5, 8], [0, 1, 2], [6, 8, 8], [8, 8, 8]]
    )
    assert packing.num_tokens == 6


@pytest.mark.parametrize("grid", GRID)
@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_packed_once_and_found_again(grid, seed):
    lengths, packings = pack_grid(seed, *grid)
    tokens = np.arange(len(lengths) * 20).reshape(-1, 20)
    padded = np.pad(tokens, ((0, 1), (0, 0)), constant_values=-1)
    seen = []
    for packing in packings:
        rows = padded[packing.source_sequence, packing.source_token]
        rows = np.where(packing.segment_ids > 0, rows, -1)
        flat = np.append(rows.ravel(), -1)
        for sequence, found in zip(
            packing.sequences, flat[packing.places], strict=True
        ):
            length = lengths[sequence] if sequence < len(lengths) else 0
            np.testing.assert_array_equal(found[length:], -1)
            if length:
                np.testing.assert_array_equal(found[:length], tokens[sequence, :length])
                seen.append(sequence)
        assert (
            packing.num_tokens
            == (rows >= 0).sum()
            == (packing.places < rows.size).sum()
        )
    assert sorted(seen) == np.flatnonzero(lengths).tolist()


@pytest.mark.parametrize("grid", GRID)
def test_shapes_depend_on_the_sizes_asked_for_only(grid):
    _, row_length, num_rows, max_sequences, _, _ = grid
    for seed in range(3):
        for packing in pack_grid(seed, *grid)[1]:
            assert packing.sequences.shape == (max_sequences,)
            assert packing.places.shape == (max_sequences, 20)
            for field in ("source_sequence", "source_token", "segment_ids"):
                assert getattr(packing, field).shape == (num_rows, row_length)
                assert getattr(packing, field).dtype == np.int32


@pytest.mark.parametrize("grid", GRID)
def test_segments_are_contiguous_and_positions_count_from_zero(grid):
    for packing in pack_grid(0, *grid)[1]:
        for segments, positions in zip(
            packing.segment_ids, packing.source_token, strict=True
        ):
            filled = segments > 0
            assert not np.diff(filled.astype(int)).clip(0).any()  # padding at the end
            assert set(np.diff(segments[filled])) <= {0, 1}
            for segment in range(1, segments.max() + 1):
                here = positions[segments == segment]
                np.testing.assert_array_equal(here, np.arange(len(here)))


def test_units_share_a_microbatch_and_adjacent_slots():
    lengths, packings = pack_grid(1, 9, 24, 2, 6, 1, 2)
    assert len(packings) > 2
    for packing in packings:
        filled = packing.sequences.reshape(-1, 2)
        for slot, (chosen, rejected) in enumerate(filled):
            known = {int(i) // 2 for i in (chosen, rejected) if i < len(lengths)}
            assert len(known) <= 1, f"slots {slot} hold two units"
            assert chosen == len(lengths) or chosen % 2 == 0
            assert rejected == len(lengths) or rejected % 2 == 1


def test_a_unit_keeps_the_slot_of_its_empty_sequence():
    (packing,) = pack(
        [0, 2, 0, 0, 1, 0], row_length=4, num_rows=1, max_sequences=6, width=2, unit=2
    )
    np.testing.assert_array_equal(packing.sequences, [6, 1, 4, 6, 6, 6])


def test_shards_get_nearly_equal_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 33, 48)
    (packing,) = pack(
        lengths, row_length=64, num_rows=16, max_sequences=48, width=32, num_shards=4
    )
    tokens = (packing.segment_ids > 0).reshape(4, -1).sum(axis=1)
    assert tokens.max() - tokens.min() <= 2, tokens


def test_rows_that_cannot_be_spread_are_dealt_to_the_shards():
    # First fit fills both rows: 6+4 and 3+3+2+2. Emptiest row first gives 6+3 and
    # 4+3+2, and then has no room for the last 2.
    (packing,) = pack(
        [6, 4, 3, 3, 2, 2],
        row_length=10,
        num_rows=2,
        max_sequences=6,
        width=6,
        num_shards=2,
    )
    np.testing.assert_array_equal((packing.segment_ids > 0).sum(axis=1), [10, 10])


def test_first_fit_decreasing_fills_rows():
    # 6+4, 5+5 and 4+3+3: three full rows, whatever the order given.
    (packing,) = pack(
        [3, 5, 4, 6, 5, 3, 4], row_length=10, num_rows=3, max_sequences=7, width=6
    )
    assert packing.num_tokens == 30


def test_short_sequences_do_not_open_more_microbatches_than_slots_need():
    # First fit puts the four long ones into two microbatches, which are then full; the
    # twelve short ones need three more for their slots. One long and three short ones
    # each make four.
    lengths = [9] * 4 + [3] * 12
    packings = pack(lengths, row_length=18, num_rows=1, max_sequences=4, width=9)
    assert [packing.num_tokens for packing in packings] == [18] * 4


def test_nothing_to_pack_gives_no_microbatch():
    assert pack([0, 0], row_length=4, num_rows=1, max_sequences=2, width=4) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [5]}, "from 5 to 5, but must be between 0 and row_length=4"),
        ({"width": 2}, "from 3 to 3"),
        ({"lengths": [-1, 2]}, "from -1 to 2"),
        ({"num_rows": 3, "num_shards": 2}, "3 rows do not divide over 2 shards"),
        ({"lengths": [1, 1, 1], "unit": 2}, "do not divide into units of 2"),
        ({"lengths": [1, 1], "unit": 2, "max_sequences": 1}, "at least that many"),
        ({"lengths": [4, 4, 4], "unit": 3}, "have to stay together"),
        ({"num_rows": 0}, "`num_rows` is 0"),
    ],
)
def test_impossible_packings_are_refused(changes, message):
    arguments = {
        "lengths": [3],
        "row_length": 4,
        "num_rows": 2,
        "max_sequences": 4,
        "width": 4,
    }
    assert len(pack(**arguments)) == 1
    with pytest.raises(ValueError, match=message):
        pack(**{**arguments, **changes})
