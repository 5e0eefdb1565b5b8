"""Arrays cross processes bit for bit, and as few bytes as can."""

import pytest

from tests.processes import pairs
from tests.processes.launch import launch


def check_pairs(num_processes, seeds, num_pairs, chunk_bytes=None):
    found = launch(
        pairs.random_pairs,
        list(seeds),
        num_pairs,
        chunk_bytes,
        num_processes=num_processes,
        num_devices=8 // num_processes,
        timeout_seconds=560,
    )
    assert all(process == found[0] for process in found)
    crossed = sum(tree["crossed"] for tree in found[0])
    least = sum(tree["least"] for tree in found[0])
    assert 0 < least <= crossed <= 1.05 * least


def test_random_pairs_cross_two_processes_bit_for_bit():
    check_pairs(2, [0], 8)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_random_pairs_cross_processes_bit_for_bit_in_full(num_processes):
    check_pairs(num_processes, range(1, 11), 10)


@pytest.mark.slow
def test_large_arrays_cross_share_by_share():
    check_pairs(2, [11], 4, chunk_bytes=300)
