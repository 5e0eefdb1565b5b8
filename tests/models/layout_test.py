"""Layouts of stored tensors: parts of ours are parts of theirs."""

import itertools

import numpy as np
import pytest

from realjax.models.layout import Stored, read_box, stored_shape, to_stored

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
    assert Stored("x.{layer}.w", ()).names(2) == ["x.0.w", "x.1.w"]
    assert Stored("x.w", ()).names(2) == ["x.w"]
