"""Contiguous partitions of nearly equal weight: minibatches, stages of layers."""

from collections.abc import Sequence

import numpy as np

__all__ = ["balanced_partition"]


def balanced_partition(
    weights: Sequence[int] | Sequence[float] | np.ndarray,
    num_parts: int,
    *,
    min_size: int = 1,
) -> list[tuple[int, int]]:
    """Cuts a list into contiguous parts whose sums are as equal as can be.

    Minimises (largest sum - smallest sum), exactly. For a floor on every part, a
    dynamic program finds the smallest possible largest sum; the floor then rises just
    above the smallest sum that solution has, until no partition is left that could be
    better. (ReaL keeps one best partition per prefix, which is not always optimal.)

    Args:
        weights: Non-negative weights, such as tokens per sequence.
        num_parts: How many parts.
        min_size: The fewest items a part may have.

    Returns:
        `(start, stop)` of each part, in order.
    """
    weights = np.asarray(weights)
    _check_partition(weights, num_parts, min_size)
    if not weights.any():
        weights = np.ones_like(weights)
    sums = np.concatenate([[0], np.cumsum(weights)])
    mean = float(sums[-1]) / num_parts

    cuts = _near_even_cuts(sums, num_parts, min_size)
    spread = _spread(sums, cuts)
    floor = mean - spread
    # A better partition has all its sums in (mean - spread, mean + spread).
    while spread > 0 and floor < mean:
        found = _lowest_ceiling(sums, num_parts, min_size, floor, mean + spread)
        if found is None:
            break
        if _spread(sums, found) < spread:
            cuts, spread = found, _spread(sums, found)
        floor = max(float(np.diff(sums[found]).min()), mean - spread)
    return list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))


def _spread(sums: np.ndarray, cuts: np.ndarray) -> float:
    parts = np.diff(sums[cuts])
    return float(parts.max() - parts.min())


def _near_even_cuts(sums: np.ndarray, num_parts: int, min_size: int) -> np.ndarray:
    """Cuts where the running sum is nearest to even shares: the first guess."""
    last = len(sums) - 1
    cuts = [0]
    for part in range(1, num_parts):
        share = sums[-1] * part / num_parts
        after = int(np.searchsorted(sums, share))
        before = max(after - 1, 0)
        near = before if share - sums[before] < sums[after] - share else after
        lowest, highest = cuts[-1] + min_size, last - (num_parts - part) * min_size
        cuts.append(min(max(near, lowest), highest))
    return np.array([*cuts, last])


def _lowest_ceiling(
    sums: np.ndarray, num_parts: int, min_size: int, floor: float, ceiling: float
) -> np.ndarray | None:
    """Cuts with the smallest largest sum, all sums in (floor, ceiling), or None."""
    ends = np.arange(len(sums))
    first = np.searchsorted(sums, sums - ceiling, side="left")
    last = np.searchsorted(sums, sums - floor, side="right") - 1
    last = np.minimum(last, ends - min_size)
    band = int((last - first).max()) + 1
    if band < 1:
        return None
    starts = first[:, None] + np.arange(band)
    inside = starts <= last[:, None]
    starts = np.where(inside, starts, 0)
    part = (sums[:, None] - sums[starts]).astype(np.float64)
    part[~inside | (part <= floor) | (part >= ceiling)] = np.inf

    largest = np.full(len(sums), np.inf)
    largest[0] = 0.0
    choices = []
    for _ in range(num_parts):
        candidates = np.maximum(largest[starts], part)
        choice = candidates.argmin(axis=1)
        largest = candidates[ends, choice]
        choices.append(starts[ends, choice])
    if not np.isfinite(largest[-1]):
        return None
    cuts = [len(sums) - 1]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return np.array(cuts[::-1])


def _check_partition(weights: np.ndarray, num_parts: int, min_size: int):
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(
            f"Weights to partition are {np.array2string(weights, threshold=8)} "
            f"of shape {weights.shape}. "
            "They must be one list of finite numbers of at least 0."
        )
    if num_parts < 1 or min_size < 1 or len(weights) < num_parts * min_size:
        raise ValueError(
            f"{len(weights)} items do not make {num_parts} parts of at least "
            f"{min_size}. Ask for fewer parts, or give more items."
        )
