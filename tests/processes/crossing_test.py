"""Arrays cross processes bit for bit, and as few bytes as can."""

import pytest

from tests.processes import moves, pairs
from tests.processes.launch import launch


@pytest.fixture(scope="module")
def sample():
    """What two processes found: of each fact of `moves`, and of eight random pairs."""
    return launch(moves.check_all, [0], 8, num_processes=2, num_devices=4)


@pytest.mark.parametrize("fact", moves.FACTS, ids=lambda fact: fact.__name__)
def test_over_two_processes(fact, sample):
    assert [found[fact.__name__] for found, _ in sample] == [None, None]


def check_crossed(trees):
    crossed = sum(tree["crossed"] for tree in trees)
    least = sum(tree["least"] for tree in trees)
    assert 0 < least <= crossed <= 1.05 * least


def test_random_pairs_cross_two_processes_bit_for_bit(sample):
    (_, first), (_, second) = sample
    assert first == second
    check_crossed(first)


def launch_pairs(num_processes, seeds, num_pairs, chunk_bytes=None):
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
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_random_pairs_cross_processes_bit_for_bit_in_full(num_processes):
    trees = launch_pairs(num_processes, range(1, 11), 10)
    check_crossed(trees)
    # Most go in pieces; collectives are the compiler's.
    assert sum(tree["kinds"]["slice"] + tree["kinds"]["put"] for tree in trees) >= 80


@pytest.mark.slow
def test_large_arrays_cross_share_by_share():
    check_crossed(launch_pairs(2, [11], 4, chunk_bytes=300))
