"""Layouts of stored tensors: parts of ours are parts of theirs."""

import itertools

import numpy as np
import pytest

from realjax.models.layout import (
    Stored,
    join_parts,
    read_box,
    read_parameter,
    stored_shape,
    to_stored,
)

CASES = {
    "as it is": (Stored("x", ((0,), (1,))), (4, 6)),
    "transposed": (Stored("x", ((1,), (0,))), (4, 6)),
    "query": (Stored("x.{layer}", ((1, 2), (0,))), (4, 3, 2)),
    "output": (Stored("x.{layer}", ((2,), (0, 1))), (3, 2, 4)),
}


def test_a_query_kernel_is_stored_with_its_heads_merged_as_rows():
    stored, shape = CASES["query"]
    kernel = np.arange(24).reshape(shape)
    matrix = to_stored(stored, kernel)
    assert matrix.shape == stored_shape(stored, shape) == (6, 4)
    # Row 2·h + k is coordinate k of head h; columns are inputs.
    np.testing.assert_array_equal(matrix[2 * 2 + 1], kernel[:, 2, 1])


@pytest.mark.parametrize("case", CASES)
def test_every_part_is_read_as_it_was_stored(case):
    stored, shape = CASES[case]
    array = np.arange(np.prod(shape)).reshape(shape)
    matrix = to_stored(stored, array)
    ranges = [
        [
            slice(None),
            *(slice(a, b) for a, b in itertools.combinations(range(n + 1), 2)),
        ]
        for n in shape
    ]
    for box in itertools.product(*ranges):
        part = read_box(stored, shape, box, matrix.__getitem__)
        np.testing.assert_array_equal(part, array[box])


def test_no_more_is_read_than_the_heads_asked_for():
    stored, shape = CASES["query"]
    read = []

    def note(box):
        read.append(box)
        return np.zeros([s.stop - s.start for s in box])

    read_box(stored, shape, (slice(0, 2), slice(1, 2), slice(None)), note)
    # Head 1 is rows 2 and 3; inputs 0 and 1 are columns.
    assert read == [(slice(2, 4), slice(0, 2))]


def test_names_of_stacked_and_single_tensors():
    assert Stored("x.{layer}.w", ()).names((2, 9)) == ["x.0.w", "x.1.w"]
    assert Stored("x.w", ()).names((2, 9)) == ["x.w"]
    experts = Stored("x.{layer}.e.{expert}", ())
    assert experts.names((1, 2, 9)) == ["x.0.e.0", "x.0.e.1"]
    assert [experts.num_stacked, experts.is_stacked] == [2, True]


def stored_whole(stored, array):
    """The stored tensors of a stacked parameter, by name."""
    return {
        stored.item_name(index): to_stored(stored, array[index])
        for index in np.ndindex(array.shape[: stored.num_stacked])
    }


@pytest.mark.parametrize(
    "stored",
    [
        Stored("x", ((1, 2), (3, 0))),
        Stored("x.{layer}", ((2,), (0, 1))),
        Stored("x.{layer}.{expert}", ((1,), (0,))),
    ],
    ids=lambda stored: stored.name,
)
def test_what_lies_past_the_stored_shape_reads_as_zeros(stored):
    real = (2, 3, 4, 2)
    array = 1 + np.arange(np.prod(real)).reshape(real)
    padded = np.pad(array, ((0, 2), (0, 0), (0, 1), (0, 1)))
    tensors = stored_whole(stored, array)
    starts_and_stops = [(0, 4), (1, 3), (2, 4)], [(0, 3)], [(0, 5), (3, 5)], [(1, 3)]
    for bounds in itertools.product(*starts_and_stops):
        box = tuple(slice(*bound) for bound in bounds)
        part = read_parameter(
            stored, real, box, lambda name, part: tensors[name][part], np.int32
        )
        np.testing.assert_array_equal(part, padded[box])


def fused(index, dimension=1):
    """Query, key or value kernels as GPT-2 has them: [D, 3 x H x K]."""
    return Stored("attn.{layer}", ((0,), (1, 2)), (dimension, index, 3))


def test_the_parts_of_a_fused_tensor_stand_side_by_side():
    shape = (4, 3, 2)
    assert stored_shape(fused(1), shape) == (4, 18)
    arrays = [100 * part + np.arange(24).reshape(shape) for part in range(3)]
    whole = join_parts(
        {part: to_stored(fused(part), arrays[part]) for part in range(3)}, fused(0)
    )
    # Column 6·part + 2·h + k is coordinate k of head h of that part.
    np.testing.assert_array_equal(whole[:, 6 * 2 + 2 * 1 + 1], arrays[2][:, 1, 1])
    box = (slice(1, 3), slice(1, 2), slice(None))
    for part in range(3):
        found = read_box(fused(part), shape, box, whole.__getitem__)
        np.testing.assert_array_equal(found, arrays[part][box])


def test_a_fused_tensor_is_read_only_where_the_part_is():
    read = []

    def note(box):
        read.append(box)
        return np.zeros([s.stop - s.start for s in box])

    read_box(fused(2), (4, 3, 2), (slice(0, 4), slice(0, 1), slice(None)), note)
    assert read == [(slice(0, 4), slice(12, 14))]


def test_a_fused_bias_has_one_dimension():
    bias = [Stored("b.{layer}", ((0, 1),), (0, part, 3)) for part in range(3)]
    whole = np.arange(12)
    part = read_box(bias[1], (2, 2), (slice(None), slice(None)), whole.__getitem__)
    np.testing.assert_array_equal(part, [[4, 5], [6, 7]])


def test_a_part_that_no_parameter_is_is_named():
    with pytest.raises(ValueError, match=r"no parameter is its part 1"):
        join_parts({0: np.zeros((4, 6)), 2: np.zeros((4, 6))}, fused(0))
