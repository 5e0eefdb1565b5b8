"""Slots and pages on random worlds, without a device: nothing is lost or mixed up."""

import collections

import numpy as np
import pytest

from realjax.rollout import session as session_lib
from tests.rollout.simulated import Past, World, random_world, roll_out


def check_end(world: World, past: Past) -> None:
    """Every row has all its tokens, and no page is anyone's."""
    session, device = past.session, past.device
    places = [p for p, n in enumerate(world.ends) if world.prompts[p // world.group]]
    for place in places:
        prompt = len(world.prompts[place // world.group])
        stop, new = world.stops[place], prompt + world.carried[place]
        if stop is None:
            assert device.has_ended(place)
            assert past.told[place] == world.tokens_of(place)[new:]
        else:
            assert device.lengths[place] >= prompt + stop
            assert len(past.told[place]) >= stop - world.carried[place]
    assert sorted(past.told) == sorted(past.ended) == places
    assert session.has_ended.all()
    for shard in session.scheduler.shards:
        shard.check_pages()
        assert all(row is None for row in shard.slots)
        # A prompt goes with its last row; what all prompts share may stay.
        assert all(p.num_waiting == 0 for p in shard._present)
        assert all(p.length == world.num_shared for p in shard._present)
        starts = [shard.first_serials[index] for index in shard.order]
        assert starts == sorted(starts)
    assert session.work.num_tokens == sum(map(len, past.told.values()))


def check_worlds(seeds: range) -> collections.Counter:
    seen = collections.Counter()
    for seed in seeds:
        world = random_world(np.random.default_rng(seed))
        try:
            past = roll_out(world)
            check_end(world, past)
        except BaseException as error:
            error.add_note(f"seed {seed}: {world}")
            raise
        shards = past.session.scheduler.shards
        seen["preempted"] += past.session.work.num_preempted > 0
        seen["copied"] += past.device.num_copies > 0
        seen["slid"] += past.device.num_slid > 0
        seen["evicted"] += any(shard.num_evicted for shard in shards)
        seen["cut short"] += any(shard.num_cut_short for shard in shards)
        seen["stopped"] += any(stop is not None for stop in world.stops)
        seen["carried"] += any(world.carried)
        seen["chunks"] += past.device.num_chunks > 3
    return seen


def test_every_row_reads_its_own_tokens_and_ends():
    seen = check_worlds(range(160))
    # All of it happened, often.
    assert len(seen) == 8
    assert min(seen.values()) > 2, seen


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_row_of_thousands_of_worlds_ends(part):
    check_worlds(range(1000 * (part + 1), 1000 * (part + 2)))


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 2, 5])
def test_a_host_that_learns_of_ends_later_corrupts_nothing(lag, monkeypatch):
    monkeypatch.setattr(session_lib, "LAG", lag)
    check_worlds(range(5000, 5500))
