"""Tests of `realjax/core/partition.py`."""

import itertools

import numpy as np
import pytest

from realjax.core.partition import balanced_partition


def spread(weights, parts) -> float:
    sums = [sum(weights[start:stop]) for start, stop in parts]
    return max(sums) - min(sums)


def best_spread(weights, num_parts: int, min_size: int) -> float:
    """By trying every partition."""
    spreads = []
    for inner in itertools.combinations(range(1, len(weights)), num_parts - 1):
        parts = list(itertools.pairwise((0, *inner, len(weights))))
        if all(stop - start >= min_size for start, stop in parts):
            spreads.append(spread(weights, parts))
    return min(spreads)


def test_partition_of_a_list_by_hand():
    # 4 | 1 2 1 | 3 1: sums 4, 4, 4.
    assert balanced_partition([4, 1, 2, 1, 3, 1], 3) == [(0, 1), (1, 4), (4, 6)]


def test_partition_that_reals_dynamic_program_misses_is_optimal():
    # ReaL's partition of these lengths has a spread of 592.
    weights = [411, 168, 538, 225, 842, 468, 880, 344, 412, 473, 398]
    assert spread(weights, balanced_partition(weights, 5)) == 586


@pytest.mark.parametrize("largest", [2, 20, 1000])
def test_partition_is_as_good_as_brute_force(largest):
    rng = np.random.default_rng(largest)
    for _ in range(150):
        size = int(rng.integers(1, 11))
        num_parts = int(rng.integers(1, min(size, 5) + 1))
        min_size = int(rng.integers(1, size // num_parts + 1))
        weights = rng.integers(0, largest, size)
        if not weights.any():
            continue
        parts = balanced_partition(weights, num_parts, min_size=min_size)
        assert [start for start, _ in parts] == [0] + [stop for _, stop in parts[:-1]]
        assert parts[-1][1] == size
        assert all(stop - start >= min_size for start, stop in parts)
        assert spread(weights, parts) == best_spread(weights, num_parts, min_size)


def test_partition_of_fractions_is_as_good_as_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = rng.random(9)
        parts = balanced_partition(weights, 3)
        assert spread(weights, parts) == pytest.approx(best_spread(weights, 3, 1))


def test_weights_of_zero_are_split_by_count():
    assert balanced_partition([0] * 6, 3) == [(0, 2), (2, 4), (4, 6)]


def test_every_item_can_be_its_own_part():
    assert balanced_partition([5, 0, 9], 3) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("weights", "num_parts", "min_size", "message"),
    [
        ([1, 2], 3, 1, "2 items do not make 3 parts of at least 1"),
        ([1, 2, 3], 2, 2, "3 items do not make 2 parts of at least 2"),
        ([1, 2], 0, 1, "0 parts"),
        ([1, -2], 1, 1, "at least 0"),
        ([1, np.nan], 1, 1, "finite"),
    ],
)
def test_impossible_partitions_are_refused(weights, num_parts, min_size, message):
    with pytest.raises(ValueError, match=message):
        balanced_partition(weights, num_parts, min_size=min_size)
