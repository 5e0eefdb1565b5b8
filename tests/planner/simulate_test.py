"""Tests of `realjax/planner/simulate.py`: against one device at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.planner.copies import AXES, Layouts, copy_loads, copy_work
from realjax.planner.simulate import STEPS, Options, Problem, price
from realjax.planner.strategies import factorizations
from realjax.realloc.hosts import Hosts
from realjax.realloc.layouts import Layout
from realjax.realloc.routes import route

NUM_DEVICES, NODE = 8, 4


def problem(
    generator, num_calls, num_options, *, memory=3.0, is_serial=False, num_ahead=0
):
    shape = (num_calls, num_options)
    power = generator.integers(0, 4, shape)
    size = 2**power
    start = size * (generator.integers(0, NUM_DEVICES, shape) // size)
    # Each factor of two goes to one axis, or to data.
    axes = dict.fromkeys(AXES, 1)
    for bit in range(3):
        axis = generator.integers(0, 5, shape)
        for index, name in enumerate(AXES):
            axes[name] = axes[name] * np.where((axis == index) & (bit < power), 2, 1)
    numbers = lambda: jnp.asarray(generator.random(shape), jnp.float32)
    some = lambda: numbers() * jnp.asarray(generator.random(shape) < 0.3)
    options = Options(
        start=jnp.asarray(start),
        size=jnp.asarray(size),
        **{name: jnp.asarray(count) for name, count in axes.items()},
        seconds=numbers(),
        static_bytes=numbers(),
        working_bytes=numbers(),
        copy_bytes=numbers(),
        parked_bytes=some(),
        reload_seconds=some(),
        offload_seconds=some(),
        column=jnp.broadcast_to(jnp.arange(num_options), shape),
    )
    home = [generator.integers(0, index + 1) for index in range(num_calls)]
    home = [home[h] for h in home]  # A home is its own.
    lower = lambda: np.tril(generator.random((num_calls, num_calls)) < 0.4, -1)
    shares = lower() & (np.array(home)[:, None] == home)
    shares &= (np.arange(num_calls) != home)[None]
    is_ahead = np.arange(num_calls) >= num_calls - num_ahead
    reads = lower()
    # What comes last is made for the step after, and reads nothing of its own.
    reads |= (generator.random(reads.shape) < 0.4) & is_ahead[None]
    reads &= ~is_ahead[:, None]
    return Problem(
        options=options,
        reads=jnp.asarray(reads),
        is_ahead=jnp.asarray(is_ahead),
        home=jnp.asarray(home),
        casts=jnp.asarray(generator.random(num_calls) < 0.5),
        shares=jnp.asarray(shares),
        is_serial=jnp.asarray(is_serial),
        concurrent_devices=jnp.asarray(2 if is_serial else 0),
        devices_per_node=jnp.asarray(NODE),
        num_arrays=jnp.asarray(generator.integers(1, 4, num_calls)),
        memory=jnp.float32(0.02),
        link=jnp.float32(0.1),
        network=jnp.float32(0.7),
        host=jnp.float32(0.3),
        piece_seconds=jnp.float32(0.01),
        memory_bytes=jnp.float32(memory),
    )


class Machine:
    """The same by a clock for every device, and bytes on every one."""

    def __init__(self, one: Problem, plan):
        one = jax.tree.map(np.asarray, one)
        self.one, self.count = one, len(plan)
        pick = lambda x: np.array([x[call, n] for call, n in enumerate(plan)])
        self.of = Options(*(pick(x) for x in one.options))
        self.home = np.asarray(one.home)
        self.places = [
            set(range(a, a + n))
            for a, n in zip(self.of.start, self.of.size, strict=True)
        ]
        self.beside = [
            one.is_ahead[call] and (call == h or not self.places[call] & self.places[h])
            for call, h in enumerate(self.home)
        ]
        lies = list(zip(*self.of[:6], strict=True))
        work = copy_work(
            Options(*(jnp.asarray(x[self.home]) for x in self.of)).layouts,
            Options(*map(jnp.asarray, self.of)).layouts,
            copy_bytes=jnp.asarray(self.of.copy_bytes),
            num_arrays=jnp.asarray(one.num_arrays),
            devices_per_node=jnp.asarray(one.devices_per_node),
        )
        self.copies, self.last = {}, list(range(self.count))
        for call in range(self.count):
            source = self.home[call]
            if call == source or (lies[call] == lies[source] and not one.casts[call]):
                continue
            taken = [
                maker
                for maker in range(call)
                if one.shares[call, maker] and lies[call] == lies[maker]
            ]
            for maker in taken:
                self.last[maker] = call
            if not taken:
                seconds = (
                    work.network[call] * one.network
                    + work.link[call] * one.link
                    + work.memory[call] * one.memory
                )
                if one.concurrent_devices:
                    turns = min(self.of.size[call], NODE) / one.concurrent_devices
                    seconds *= turns
                self.copies[call] = float(
                    seconds + work.pieces[call] * one.piece_seconds
                )

    def memory(self, is_early):
        most = 0.0
        # A copy for a call beside the training of its role is made before that.
        first = [self.home[c] if self.beside[c] else c for c in range(self.count)]
        for moment in range(self.count):
            for device in range(NUM_DEVICES):
                here = lambda call, device=device: device in self.places[call]
                held = sum(
                    self.of.static_bytes[c] for c in range(self.count) if here(c)
                )
                held += sum(
                    self.of.copy_bytes[c]
                    for c in self.copies
                    if here(c)
                    and moment <= self.last[c]
                    and (is_early or first[c] <= moment)
                )
                working = self.of.working_bytes[moment] if here(moment) else 0.0
                copying = 0.0
                if moment in self.copies and here(self.home[moment]):
                    copying = self.of.parked_bytes[self.home[moment]]
                most = max(most, held + max(working, copying))
        return most

    def run(self, is_early):
        """Ends of steps."""
        is_serial = bool(self.one.is_serial)
        ends, free, ended = np.zeros(self.count), np.zeros(NUM_DEVICES), []

        def reload(call):
            if call == self.home[call]:
                return self.of.reload_seconds[call]
            if call in self.copies:
                return self.one.host * self.of.parked_bytes[self.home[call]]
            return 0.0

        for _ in range(STEPS):
            if self.one.is_ahead.any():
                free[:] = np.maximum(free, ends.max())
            changed = ends + self.of.offload_seconds
            new, copied = np.zeros(self.count), np.zeros(self.count)

            def devices_of(calls):
                if is_serial:
                    return range(NUM_DEVICES)
                return set().union(*(self.places[call] for call in calls))

            def free_for(calls):
                return max(free[device] for device in devices_of(calls))

            def take(calls, ready, seconds):
                end = max(ready, free_for(calls)) + seconds
                for device in devices_of(calls):
                    free[device] = end
                return end

            early = [call for call in self.copies if is_early or self.beside[call]]
            for call in early:
                both = {call, self.home[call]}
                ready = changed[self.home[call]] + reload(call)
                copied[call] = take(both, ready, self.copies[call])
            for call in range(self.count):
                both = {call, self.home[call]}
                issued = free_for(both) + reload(call)
                if call in self.copies and call not in early:
                    copied[call] = take(both, issued, self.copies[call])
                is_alone = self.one.is_ahead[call] and not self.beside[call]
                parents = [
                    new[p] for p in range(call) if self.one.reads[call, p] or is_alone
                ]
                parents += [
                    ends[p] for p in range(call, self.count) if self.one.reads[call, p]
                ]
                ready = max([*parents, ends[self.home[call]], copied[call]])
                if call == self.home[call]:
                    at_hand = changed[call] + reload(call)
                    ready = max(ready, at_hand if is_early else issued)
                new[call] = take({call}, ready, self.of.seconds[call])
            ends = new
            ended.append(new.max())
        return ended


@pytest.mark.parametrize(("num_calls", "num_ahead"), [(1, 0), (3, 0), (6, 0), (6, 2)])
@pytest.mark.parametrize("is_serial", [False, True])
def test_prices_are_those_of_a_simulation_device_by_device(
    num_calls, num_ahead, is_serial
):
    generator = np.random.default_rng(num_calls)
    # So that about half of the plans have room for copies from the beginning.
    memory = 0.6 * num_calls
    one = problem(
        *(generator, num_calls, 12),
        memory=memory,
        is_serial=is_serial,
        num_ahead=num_ahead,
    )
    plans = generator.integers(0, 12, (60, num_calls))
    found = price(one, jnp.asarray(plans))
    for index, plan in enumerate(plans):
        machine = Machine(one, plan)
        is_early = machine.memory(True) <= memory
        assert bool(found.is_early[index]) == is_early
        np.testing.assert_allclose(
            found.memory_bytes[index], machine.memory(is_early), rtol=1e-5
        )
        copies = [machine.copies.get(call, 0.0) for call in range(num_calls)]
        np.testing.assert_allclose(found.copy_seconds[index], copies, rtol=1e-5)
        ended = machine.run(is_early)
        np.testing.assert_allclose(
            found.seconds[index], ended[-1] - ended[-2], rtol=1e-4, atol=1e-5
        )


def calls_apart(places, reads=False):
    """Two calls of one and two seconds, whose roles live where they are."""
    column = lambda *values: jnp.asarray(values, jnp.float32)[:, None]
    (first, second) = places
    zeros, ones = column(0, 0), jnp.ones((2, 1), jnp.int32)
    options = Options(
        start=jnp.asarray([[first[0]], [second[0]]]),
        size=jnp.asarray([[first[1]], [second[1]]]),
        **dict.fromkeys(AXES, ones),
        seconds=column(1, 2),
        static_bytes=column(10, 20),
        working_bytes=column(5, 3),
        copy_bytes=zeros,
        parked_bytes=zeros,
        reload_seconds=zeros,
        offload_seconds=zeros,
        column=jnp.zeros((2, 1), jnp.int32),
    )
    return Problem(
        options=options,
        reads=jnp.asarray([[False, False], [reads, False]]),
        is_ahead=jnp.asarray([False, False]),
        home=jnp.asarray([0, 1]),
        casts=jnp.asarray([False, False]),
        shares=jnp.zeros((2, 2), bool),
        is_serial=jnp.asarray(False),
        concurrent_devices=jnp.asarray(0),
        devices_per_node=jnp.asarray(8),
        num_arrays=jnp.asarray([1, 1]),
        memory=jnp.float32(0),
        link=jnp.float32(0),
        network=jnp.float32(0),
        host=jnp.float32(0),
        piece_seconds=jnp.float32(0),
        memory_bytes=jnp.float32(100),
    )


def test_calls_apart_overlap_and_calls_on_the_same_devices_do_not():
    plan = jnp.zeros((1, 2), jnp.int32)
    apart = price(calls_apart([(0, 4), (4, 4)]), plan)
    assert (apart.seconds[0], apart.memory_bytes[0]) == (2, 23)
    together = price(calls_apart([(0, 8), (0, 8)]), plan)
    # 10 and 20 at all times, and 5 or 3 in turn.
    assert (together.seconds[0], together.memory_bytes[0]) == (3, 35)
    within = price(calls_apart([(0, 8), (4, 2)]), plan)
    assert (within.seconds[0], within.memory_bytes[0]) == (3, 35)


def test_calls_apart_wait_for_each_other_where_launches_do():
    one = calls_apart([(0, 4), (4, 4)])._replace(is_serial=jnp.asarray(True))
    assert price(one, jnp.zeros((1, 2), jnp.int32)).seconds[0] == 3


def test_steps_follow_each_other_without_a_pause():
    # The second reads from the first, and the first of the next step runs beside it.
    one = calls_apart([(0, 4), (4, 4)], reads=True)
    assert price(one, jnp.zeros((1, 2), jnp.int32)).seconds[0] == 2


def trained_ahead(places):
    """A training of one second, and a rollout of two that it reads a step later."""
    one = calls_apart(places)
    return one._replace(
        reads=jnp.asarray([[False, True], [False, False]]),
        is_ahead=jnp.asarray([False, True]),
        home=jnp.asarray([0, 0]),
        casts=jnp.asarray([False, True]),
    )


def test_a_rollout_a_step_ahead_runs_beside_the_training_and_else_in_turn():
    plan = jnp.zeros((1, 2), jnp.int32)
    apart = price(trained_ahead([(0, 4), (4, 4)]), plan)
    assert apart.seconds[0] == 2
    assert apart.begin[0].tolist() == [0, 0]
    together = price(trained_ahead([(0, 8), (0, 8)]), plan)
    assert together.seconds[0] == 3
    # On some of the training's devices it could not begin before, either.
    within = price(trained_ahead([(0, 8), (4, 4)]), plan)
    assert within.seconds[0] == 3


def test_the_copy_for_a_rollout_ahead_is_held_while_its_role_is_trained():
    plan = jnp.zeros((1, 2), jnp.int32)
    one = trained_ahead([(0, 4), (4, 4)])
    copies = jnp.asarray([[0.0], [7.0]], jnp.float32)
    one = one._replace(options=one.options._replace(copy_bytes=copies))
    assert price(one, plan).memory_bytes[0] == 20 + 3 + 7
    # Seconds a byte of the links: the training waits until its masters were read.
    slow = one._replace(link=jnp.float32(0.1))
    found = price(slow, plan)
    assert found.begin[0, 0] == pytest.approx(float(found.copy_end[0, 1]))
    assert found.seconds[0] == pytest.approx(2 + float(found.copy_seconds[0, 1]))


def test_what_comes_back_from_the_host_while_others_run_takes_no_time():
    plan = jnp.zeros((1, 2), jnp.int32)
    one = calls_apart([(0, 8), (0, 8)])
    parked = jnp.asarray([[0.0], [0.9]], jnp.float32)
    one = one._replace(options=one.options._replace(reload_seconds=parked))
    assert price(one, plan).seconds[0] == 3
    # Without the room for it, it comes when the call before has ended.
    tight = price(one._replace(memory_bytes=jnp.float32(30)), plan)
    assert tight.seconds[0] == pytest.approx(3.9)


MESH = ("stage", "data", "fsdp", "expert", "tensor")


def placed(generator, num_devices, node):
    """A range of devices and a strategy on it, as sizes of the axes of a mesh."""
    size = 2 ** int(generator.integers(0, num_devices.bit_length()))
    found = [f for f in factorizations(size, 5) if f[3] * f[4] <= node]
    start = size * int(generator.integers(0, num_devices // size))
    return start, found[generator.integers(len(found))]


@pytest.mark.parametrize(("num_devices", "node"), [(8, 8), (16, 4)])
def test_copies_bring_a_device_what_routes_say(num_devices, node):
    generator, shape = np.random.default_rng(0), (64, 64, 64, 64)
    found, exact = [], []
    for _ in range(100):
        ends = [placed(generator, num_devices, node) for _ in range(2)]
        layouts = [
            Layout(
                devices=tuple(range(start, start + int(np.prod(sizes)))),
                mesh_shape=sizes,
                spec=((0,), (3,), (2,), (4,)),  # layer, expert, width, mlp
            )
            for start, sizes in ends
        ]
        way = route(*layouts, shape, np.int8, hosts=Hosts.uniform(node))
        loads = way.loads
        stage, _, fsdp, expert, tensor = ends[1][1]
        part = np.prod(shape) / (stage * fsdp * expert * tensor)
        exact.append(
            (
                max(loads.received_across.max(), loads.sent_across.max()) / part,
                max(loads.received_within.max(), loads.sent_within.max()) / part,
            )
        )
        options = [
            Layouts(
                jnp.asarray(start),
                jnp.asarray(int(np.prod(sizes))),
                *(jnp.asarray(sizes[MESH.index(axis)]) for axis in AXES),
            )
            for start, sizes in ends
        ]
        work = copy_work(*options, copy_bytes=1, num_arrays=1, devices_per_node=node)
        if way.kind in ("slice", "put"):
            pieces = len(way.boxes) * way.destination_holders.shape[1]
            num_nodes = -(-options[1].size // node)
            assert work.pieces == pieces / num_nodes
        loads = copy_loads(*options, jnp.asarray(node))
        found.append((float(loads.across), float(loads.within)))
    exact, found = np.array(exact), np.array(found)
    # A few copies between uneven parts of nodes are not as in closed form.
    error = np.abs(found - exact).sum(0) / np.maximum(exact.sum(0), 1e-9)
    assert error[0] < 0.1
    assert error[1] < 0.2 if node < num_devices else error[1] < 0.05
    assert (np.abs(found - exact) < 0.3).all(1).mean() > 0.8
