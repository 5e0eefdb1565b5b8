"""Arithmetic on groups of integers, which routes are counted with. Exact, no floats."""

import numpy as np


def sum_by(groups: np.ndarray, values: np.ndarray, num_groups: int) -> np.ndarray:
    """Add up integers by group (the weights of `bincount` would be floats)."""
    sums = np.zeros(num_groups, np.int64)
    np.add.at(sums, groups, values)
    return sums


def lookup(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return where each wanted value stands in the distinct keys, or -1."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys, kind="stable")
    place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    found = order[place]
    return np.where(keys[found] == wanted, found, -1)


def spread(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write out ranges one after the other.

    Returns:
        The range that each number is of, and the number: ranges 5, 6 and 9 give
        (0, 0, 1) and (5, 6, 9).
    """
    ranges = np.repeat(np.arange(len(counts)), counts)
    skipped = starts - (np.cumsum(counts) - counts)
    return ranges, np.arange(len(ranges)) + skipped[ranges]


def deal(groups: np.ndarray, sizes: np.ndarray, num_takers: np.ndarray) -> np.ndarray:
    """Deal the items of every group to its takers in equal shares, to an item.

    An item goes by its place in the running sum of sizes, so that the outcome depends
    on the order of the items alone, and is the same wherever it is worked out.

    Args:
        groups: The group of every item, in rising order.
        sizes: The size of every item, at least 1.
        num_takers: How many takers each group has.

    Returns:
        The taker of every item, counted from 0 within the group.
    """
    if not len(groups) or num_takers.max(initial=1) == 1:
        return np.zeros(len(groups), np.int64)
    # In the largest unit that they share, products of sizes stay within 64 bits.
    sizes = sizes // np.gcd.reduce(sizes)
    totals = sum_by(groups, sizes, len(num_takers))
    before = np.cumsum(sizes) - sizes - (np.cumsum(totals) - totals)[groups]
    return before * num_takers[groups] // totals[groups]
