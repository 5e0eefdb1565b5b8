"""Groups of integers: exact sums, ranges, equal shares."""

import numpy as np

from realjax.realloc.grouping import deal, lookup, spread, sum_by


def test_sums_beyond_the_floats_are_exact():
    big = 2**53
    sums = sum_by(np.array([1, 1, 0]), np.array([big, 1, 5]), 3)
    assert sums.tolist() == [5, big + 1, 0]


def test_a_lookup_says_where_a_value_stands_or_minus_one():
    keys = np.array([7, 3, 9])
    assert lookup(keys, np.array([9, 7, 4, 3, 10])).tolist() == [2, 0, -1, 1, -1]
    assert lookup(np.array([], int), np.array([1])).tolist() == [-1]


def test_ranges_are_written_out_one_after_the_other():
    ranges, numbers = spread(np.array([5, 0, 9]), np.array([2, 0, 1]))
    assert ranges.tolist() == [0, 0, 2]
    assert numbers.tolist() == [5, 6, 9]


def test_items_are_dealt_in_equal_shares():
    # Six of 10 to three takers, two each; then 3 and 1 to two takers.
    groups = np.array([0] * 6 + [1, 1])
    sizes = np.array([10] * 6 + [3, 1])
    takers = deal(groups, sizes, np.array([3, 2]))
    assert takers.tolist() == [0, 0, 1, 1, 2, 2, 0, 1]


def test_shares_differ_by_an_item_at_most():
    generator = np.random.default_rng(0)
    for _ in range(50):
        sizes = generator.integers(1, 100, generator.integers(1, 60))
        num_takers = int(generator.integers(1, 9))
        takers = deal(np.zeros(len(sizes), int), sizes, np.array([num_takers]))
        shares = sum_by(takers, sizes, num_takers)
        assert takers.min() >= 0 and takers.max() < num_takers
        assert (np.abs(shares - sizes.sum() / num_takers) <= sizes.max()).all()


def test_terabytes_do_not_overflow():
    # 2^12 items of 2^33 bytes to 2^12 takers: the products pass 64 bits in bytes.
    num = 2**12
    sizes = np.full(num, 2**33 + 2**20)
    takers = deal(np.zeros(num, int), sizes, np.array([num]))
    assert takers.tolist() == list(range(num))
