"""Tests of `realjax/planner/simulate.py`: against one device at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.planner.simulate import STEPS, Options, Problem, price

NUM_DEVICES, NODE = 8, 4


def problem(generator, num_calls, num_options):
    size = 2 ** generator.integers(0, 4, (num_calls, num_options))
    start = size * (generator.integers(0, NUM_DEVICES, size.shape) // size)
    numbers = lambda: jnp.asarray(generator.random(size.shape), jnp.float32)
    options = Options(
        start=jnp.asarray(start),
        size=jnp.asarray(size),
        seconds=numbers(),
        static_bytes=numbers(),
        working_bytes=numbers(),
        copy_bytes=numbers(),
        # Options of unlike sizes never lie alike.
        layout=jnp.asarray(generator.integers(0, 3, size.shape) + 10 * size),
    )
    home = [generator.integers(0, index + 1) for index in range(num_calls)]
    home = [home[h] for h in home]  # A home is its own.
    reads = np.tril(generator.random((num_calls, num_calls)) < 0.4, -1)
    return Problem(
        options=options,
        reads=jnp.asarray(reads),
        home=jnp.asarray(home),
        devices_per_node=jnp.asarray(NODE),
        link=jnp.float32(0.1),
        network=jnp.float32(0.7),
        hop_seconds=jnp.float32(0.01),
        memory_bytes=jnp.float32(3.0),
    )


def by_device(one: Problem, plan):
    """The same by a clock for every device, and bytes on every one."""
    pick = lambda x: [float(x[call, number]) for call, number in enumerate(plan)]
    start, size = (np.int64(pick(x)) for x in one.options[:2])
    seconds, static, working, copy = (pick(x) for x in one.options[2:6])
    layout, home = pick(one.options.layout), np.asarray(one.home)
    places = [set(range(a, a + n)) for a, n in zip(start, size, strict=True)]
    copies = []
    for call in range(len(plan)):
        source = home[call]
        if places[source] == places[call] and layout[source] == layout[call]:
            copies.append(0.0)
            continue
        both = places[source] | places[call]
        is_within = len({device // NODE for device in range(min(both), max(both) + 1)})
        rate = one.link if is_within == 1 else one.network
        moved = max(copy[call], copy[call] * size[call] / size[source])
        copies.append(moved * float(rate) + float(one.hop_seconds))
    free, ends, ended = np.zeros(NUM_DEVICES), np.zeros(len(plan)), []
    for _ in range(STEPS):
        new = np.zeros(len(plan))
        for call in range(len(plan)):
            parents = [new[p] for p in range(call) if one.reads[call, p]]
            begin = max([*parents, ends[home[call]], *(free[d] for d in places[call])])
            new[call] = begin + copies[call] + seconds[call]
            for device in places[call]:
                free[device] = new[call]
        ends = new
        ended.append(new.max())
    held = []
    for device in range(NUM_DEVICES):
        here = [call for call in range(len(plan)) if device in places[call]]
        busy = [working[c] + (copy[c] if copies[c] else 0.0) for c in here]
        held.append(sum(static[c] for c in here) + max(busy, default=0.0))
    return ended[-1] - ended[-2], max(held), copies


@pytest.mark.parametrize("num_calls", [1, 3, 6])
def test_prices_are_those_of_a_simulation_device_by_device(num_calls):
    generator = np.random.default_rng(num_calls)
    one = problem(generator, num_calls, 12)
    plans = generator.integers(0, 12, (60, num_calls))
    found = price(one, jnp.asarray(plans))
    for index, plan in enumerate(plans):
        seconds, memory, copies = by_device(one, plan)
        np.testing.assert_allclose(found.seconds[index], seconds, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.memory_bytes[index], memory, rtol=1e-5)
        np.testing.assert_allclose(found.copy_seconds[index], copies, rtol=1e-5)


def two_calls(places, reads=False):
    """Two calls of one and two seconds, whose roles live where they are."""
    column = lambda *values: jnp.asarray(values, jnp.float32)[:, None]
    (first, second) = places
    zeros = column(0, 0)
    options = Options(
        start=jnp.asarray([[first[0]], [second[0]]]),
        size=jnp.asarray([[first[1]], [second[1]]]),
        seconds=column(1, 2),
        static_bytes=column(10, 20),
        working_bytes=column(5, 3),
        copy_bytes=zeros,
        layout=jnp.zeros((2, 1), jnp.int32),
    )
    return Problem(
        options=options,
        reads=jnp.asarray([[False, False], [reads, False]]),
        home=jnp.asarray([0, 1]),
        devices_per_node=jnp.asarray(8),
        link=jnp.float32(0),
        network=jnp.float32(0),
        hop_seconds=jnp.float32(0),
        memory_bytes=jnp.float32(100),
    )


def test_calls_apart_overlap_and_calls_on_the_same_devices_do_not():
    plan = jnp.zeros((1, 2), jnp.int32)
    apart = price(two_calls([(0, 4), (4, 4)]), plan)
    assert (apart.seconds[0], apart.memory_bytes[0]) == (2, 23)
    together = price(two_calls([(0, 8), (0, 8)]), plan)
    # 10 and 20 at all times, and 5 or 3 in turn.
    assert (together.seconds[0], together.memory_bytes[0]) == (3, 35)
    within = price(two_calls([(0, 8), (4, 2)]), plan)
    assert (within.seconds[0], within.memory_bytes[0]) == (3, 35)


def test_steps_follow_each_other_without_a_pause():
    # The second reads from the first, and the first of the next step runs beside it.
    found = price(two_calls([(0, 4), (4, 4)], reads=True), jnp.zeros((1, 2), jnp.int32))
    assert found.seconds[0] == 2
