"""Seconds and memory of many plans at once.

A plan is one option a call. Calls are issued in one order, the graph's, and devices
take them as they are issued. So a call begins when what it reads is there and its
devices have ended all that was issued for them before:

    step begins ─ copies that memory has room for ─ call ─ copy ─ call ─ copy ─ call …

As in `dataflow.schedule`, copies of parameters, and what comes back from host memory,
are issued at the beginning of a step if all of them fit beside the calls until they are
needed; else each comes right before its call. A copy takes the devices of both its
ends. Traffic with the host takes no time of the devices, but its call waits for it.

Ranges of devices are within each other or apart (`strategies`), so that what two calls
share is a comparison of numbers, whatever the number of devices. The same holds for
memory: a device holds what all ranges around it hold, and the most is in one that no
smaller range is within.

Steps follow each other without a pause; the seconds of one are those between the ends
of two steps in a row, once the first ones are over.

A call that runs a step ahead comes last in the order, and what it makes is read in the
step after. It reads parameters as they are when its step begins, so it runs beside the
call that changes them, where that has other devices; where it has not, such a call
waits for all others, as the thread that issues them does. As that thread waits for
what was drawn, too, such steps do not begin before all of the last one has ended.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, Bool, Float, Int
from realjax.planner.copies import AXES, Layouts, copy_work

STEPS = 4
"""Steps that are simulated, of which the last two count."""

FEWEST = 256
"""Plans that are simulated at a time, at least."""

PAIRS_AT_A_TIME = 100_000
"""Pairs of calls, of all plans that are simulated at a time: a table of them stays in a
core's cache."""


class Options(NamedTuple):
    """What every option of every call is and takes; C calls of at most O options.

    What does not depend on where an option's devices begin is the same for many, and
    stands once: in one of at most S columns.

    Attributes:
        start: the first of its range of devices.
        size: devices of that.
        tensor, expert, fsdp, stage: parts that its parameters are cut into.
        seconds: of the call, without copies.
        static_bytes: that its devices hold at all times because of it.
        working_bytes: that they hold while it runs.
        copy_bytes: of its parameters on one device, where they lie elsewhere.
        parked_bytes: of parameters that its devices get back from host memory when
            another call copies them; 0 where they stay.
        reload_seconds: until what the call itself needs of its role is back from host
            memory.
        offload_seconds: until what it has changed is in host memory.
        column: where all but `start` stand of an option.
    """

    start: Int[Array, "C O"]
    size: Int[Array, "C S"]
    tensor: Int[Array, "C S"]
    expert: Int[Array, "C S"]
    fsdp: Int[Array, "C S"]
    stage: Int[Array, "C S"]
    seconds: Float[Array, "C S"]
    static_bytes: Float[Array, "C S"]
    working_bytes: Float[Array, "C S"]
    copy_bytes: Float[Array, "C S"]
    parked_bytes: Float[Array, "C S"]
    reload_seconds: Float[Array, "C S"]
    offload_seconds: Float[Array, "C S"]
    column: Int[Array, "C O"]

    def of(self, plans: Int[Array, "C P"]) -> "Options":
        """Return those of plans, by the number of each call's option; all [C, P]."""
        pick = lambda x, numbers: jnp.take_along_axis(x, numbers, 1)
        column = pick(self.column, plans)
        of_shapes = self._asdict()
        start, _ = of_shapes.pop("start"), of_shapes.pop("column")
        found = {name: pick(x, column) for name, x in of_shapes.items()}
        return Options(start=pick(start, plans), column=column, **found)

    @property
    def layouts(self) -> Layouts:
        """Where they have parameters, and how."""
        return Layouts(*self[: len(Layouts._fields)])


class Problem(NamedTuple):
    """What does not depend on the plan.

    Attributes:
        options: of the calls, in the order in which they are issued.
        reads: whether call i reads what call j writes: in the same step where j < i,
            else in the step before.
        is_ahead: whether a call runs a step ahead.
        home: for each call the one where its role's parameters live; itself if there.
        casts: whether a call needs them in another type than they have there.
        shares: whether call i can take the copy that call j < i had, if it lies as
            call i needs it: of the same role, not changed in between.
        is_serial: whether calls wait for each other wherever they are.
        concurrent_devices: of a node, whose work truly runs at the same time; 0 is all.
        devices_per_node: a copy between nodes goes over the network.
        num_arrays: of the parameters of each call's role.
        memory, link, network, host: seconds a byte.
        piece_seconds: of a piece of a copy, beside its bytes.
        memory_bytes: of a device.
    """

    options: Options
    reads: Bool[Array, "C C"]
    is_ahead: Bool[Array, "C"]
    home: Int[Array, "C"]
    casts: Bool[Array, "C"]
    shares: Bool[Array, "C C"]
    is_serial: Bool[Array, ""]
    concurrent_devices: Int[Array, ""]
    devices_per_node: Int[Array, ""]
    num_arrays: Int[Array, "C"]
    memory: Float[Array, ""]
    link: Float[Array, ""]
    network: Float[Array, ""]
    host: Float[Array, ""]
    piece_seconds: Float[Array, ""]
    memory_bytes: Float[Array, ""]


class Priced(NamedTuple):
    """What plans take.

    Attributes:
        seconds: of a step.
        memory_bytes: the most on any device.
        begin, end: of each call in the last step, from its beginning.
        copy_begin, copy_end: of the copy for each call; the same where there is none.
        copy_seconds: of that copy.
        is_early: whether copies are issued at the beginning of a step.
    """

    seconds: Float[Array, "P"]
    memory_bytes: Float[Array, "P"]
    begin: Float[Array, "P C"]
    end: Float[Array, "P C"]
    copy_begin: Float[Array, "P C"]
    copy_end: Float[Array, "P C"]
    copy_seconds: Float[Array, "P C"]
    is_early: Bool[Array, "P"]


def price(problem: Problem, plans: Int[Array, "P C"]) -> Priced:
    """Simulate plans.

    Args:
        problem: calls and options.
        plans: the number of each call's option.
    """
    count = len(plans)
    # Few are as many as FEWEST, so that one program serves.
    more = jnp.zeros((max(FEWEST - count, 0), plans.shape[1]), plans.dtype)
    found = _price_all(problem, jnp.concatenate([plans, more]))
    return jax.tree.map(lambda x: x[:count], found)


def price_all(problem: Problem, plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds and bytes of any number of plans, some at a time.

    Args:
        problem: calls and options.
        plans: [P, C], the number of each call's option.
    """
    parts = [
        price(problem, jnp.asarray(plans[start : start + FEWEST], jnp.int32))
        for start in range(0, len(plans), FEWEST)
    ]
    joined = lambda name: np.concatenate([getattr(part, name) for part in parts])
    return joined("seconds"), joined("memory_bytes")


@jax.jit
def _price_all(problem: Problem, plans: Int[Array, "P C"]) -> Priced:
    count, num_calls = plans.shape
    fitting = PAIRS_AT_A_TIME // num_calls**2
    block = max(FEWEST, 1 << (fitting.bit_length() - 1))
    if count <= block:
        return _price(problem, plans)
    more = jnp.zeros((-count % block, num_calls), plans.dtype)
    blocks = jnp.concatenate([plans, more]).reshape(-1, block, num_calls)
    found = jax.lax.map(functools.partial(_price, problem), blocks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def _price(problem: Problem, plans: Int[Array, "P C"]) -> Priced:
    # Below, plans are the last axis: what is said of a call is a row.
    chosen = _choose(problem, plans.T)
    copies = jnp.where(chosen.makes, _copy_seconds(problem, chosen), 0.0)
    early, late = _memory(problem, chosen, True), _memory(problem, chosen, False)
    is_early = early <= problem.memory_bytes
    period, begin, end, copy_end = _clock(problem, chosen, copies, is_early)
    return Priced(
        seconds=period,
        memory_bytes=jnp.where(is_early, early, late),
        begin=begin.T,
        end=end.T,
        copy_begin=(copy_end - copies).T,
        copy_end=copy_end.T,
        copy_seconds=copies.T,
        is_early=is_early,
    )


class _Chosen(NamedTuple):
    """The options of plans, and how they lie to each other.

    Attributes:
        options: of each call.
        home: of the call where its role's parameters live.
        meets: whether calls i and j share a device, or wait for each other anyhow.
        beside: whether a call runs a step ahead and shares no device with another call
            that its role lives at.
        makes: whether a call gets a copy of its own.
        last: the last call that uses the copy which a call made.
    """

    options: Options
    home: Options
    meets: Bool[Array, "C C P"]
    beside: Bool[Array, "C P"]
    makes: Bool[Array, "C P"]
    last: Int[Array, "C P"]


def _choose(problem: Problem, plans: Int[Array, "C P"]) -> _Chosen:
    calls = jnp.arange(len(plans))
    options = problem.options.of(plans)
    home = jax.tree.map(lambda x: x[problem.home], options)
    stop = options.start + options.size
    meets = (options.start[:, None] < stop[None]) & (
        options.start[None] < stop[:, None]
    )
    places = [options.start, options.size, *(getattr(options, axis) for axis in AXES)]
    is_same = functools.reduce(jnp.logical_and, [x[:, None] == x[None] for x in places])
    is_there = is_same[calls, problem.home] & ~problem.casts[:, None]
    needs = ~is_there & (calls != problem.home)[:, None]
    takes = problem.shares[:, :, None] & is_same & needs[:, None]
    shares_home = meets[calls, problem.home] & (calls != problem.home)[:, None]
    last = jnp.where(takes, calls[:, None, None], calls[None, :, None]).max(0)
    return _Chosen(
        options=options,
        home=home,
        meets=meets | problem.is_serial,
        beside=problem.is_ahead[:, None] & ~shares_home,
        makes=needs & ~takes.any(1),
        last=last,
    )


def _clock(
    problem: Problem,
    chosen: _Chosen,
    copies: Float[Array, "C P"],
    is_early: Bool[Array, "P"],
) -> tuple[Array, Array, Array, Array]:
    """Return seconds of a step, then begins, ends and ends of copies in the last."""
    count = len(copies)
    meets, makes, seconds = chosen.meets, chosen.makes, chosen.options.seconds
    is_home = (problem.home == jnp.arange(count))[:, None]
    reload = jnp.where(
        is_home,
        chosen.options.reload_seconds,
        jnp.where(makes, problem.host * chosen.home.parked_bytes, 0.0),
    )
    # A copy takes the devices of both ends, and waits for what is issued for them.
    touches = meets | meets[problem.home]
    touched, joins = touches.swapaxes(0, 1), touches | touches[:, problem.home]
    later = jnp.triu(problem.reads)[:, :, None]
    is_alone = problem.is_ahead[:, None] & ~chosen.beside
    waits = problem.reads[:, :, None] | meets | is_alone[:, None]
    # What is trained meanwhile must be copied before.
    begins_early = is_early[None] | chosen.beside
    makes_early, makes_late = makes & begins_early, makes & ~begins_early

    latest = lambda mask, times: jnp.where(mask, times[None], 0.0).max(1)

    def step(last: tuple[Array, Array, Array], _) -> tuple[Any, Any]:
        ends, ends_of_copies, stop = last
        changed = ends + chosen.options.offload_seconds
        # What the step before leaves free, and what of its role a call has at hand.
        free = jnp.maximum(latest(meets, ends), ends[problem.home])
        free = jnp.maximum(free, latest(touched, ends_of_copies))
        free = jnp.maximum(free, latest(later, ends))
        both_free = latest(touches, ends)
        both_free = jnp.maximum(both_free, latest(joins, ends_of_copies))
        pause = jnp.where(problem.is_ahead.any(), stop, 0.0)[None]
        free, both_free = jnp.maximum(free, pause), jnp.maximum(both_free, pause)
        at_hand = changed[problem.home] + reload
        copied: list[Array] = []
        for i in range(count):
            begin = _latest(both_free[i], joins[i], copied)
            end = jnp.maximum(begin, at_hand[i]) + copies[i]
            copied.append(_apart(jnp.where(makes_early[i], end, 0.0)))
        begins, new = [], []
        for i in range(count):
            issued = _latest(_latest(both_free[i], joins[i], copied), touches[i], new)
            late = issued + reload[i] + copies[i]
            copied[i] = _apart(jnp.where(makes_late[i], late, copied[i]))
            begin = _latest(_latest(free[i], waits[i], new), touched[i], copied)
            ready = jnp.where(is_early, at_hand[i], issued + reload[i])
            ready = jnp.where(is_home[i], ready, copied[i])
            begins.append(_apart(jnp.maximum(begin, ready)))
            new.append(_apart(begins[i] + seconds[i]))
        ends, ends_of_copies = jnp.stack(new), jnp.stack(copied)
        now = ends.max(0)
        copied = [
            jnp.where(m, c, b) for m, c, b in zip(makes, copied, begins, strict=True)
        ]
        found = (now - stop, jnp.stack(begins), ends, jnp.stack(copied), stop)
        return (ends, ends_of_copies, now), found

    zeros = jnp.zeros_like(copies)
    start = (zeros, zeros, zeros[0])
    _, found = jax.lax.scan(step, start, length=STEPS)
    period, begin, end, copied, before = (x[-1] for x in found)
    return period, *(x - before[None] for x in (begin, end, copied))


def _latest(time: Array, mask: Bool[Array, "C P"], times: Sequence[Array]) -> Array:
    """Return the latest of a time and those of some of the first calls."""
    for is_one, other in zip(mask, times, strict=False):
        time = jnp.maximum(time, jnp.where(is_one, other, 0.0))
    return time


def _apart(x: Array) -> Array:
    """Keep the compiler from working it out anew for each of its many readers."""
    return jax.lax.optimization_barrier(x)


def _copy_seconds(problem: Problem, chosen: _Chosen) -> Float[Array, "C P"]:
    """Return the seconds of the copy of parameters before each call."""
    work = copy_work(
        chosen.home.layouts,
        chosen.options.layouts,
        copy_bytes=chosen.options.copy_bytes,
        num_arrays=problem.num_arrays[:, None],
        devices_per_node=problem.devices_per_node,
    )
    seconds = (
        work.memory * problem.memory
        + work.link * problem.link
        + work.network * problem.network
    )
    devices = jnp.minimum(chosen.options.size, problem.devices_per_node)
    has_turns = problem.concurrent_devices > 0
    turns = jnp.where(has_turns, devices / problem.concurrent_devices, 1.0)
    return seconds * turns + work.pieces * problem.piece_seconds


def _memory(problem: Problem, chosen: _Chosen, is_early: bool) -> Float[Array, "P"]:
    """Return the most bytes of a device at any moment of a step.

    Args:
        problem: calls.
        chosen: plans.
        is_early: whether all copies are there from the beginning of the step.
    """
    options, count = chosen.options, len(chosen.last)
    stop = options.start + options.size
    made = jnp.where(chosen.makes, options.copy_bytes, 0.0)
    numbers = jnp.arange(count)
    # Those who share a copy lie alike: what call j is the last to use.
    ended = jnp.where(chosen.last[:, None] == numbers[None, :, None], made[:, None], 0)
    ended = ended.sum(0)
    parked = jnp.where(chosen.makes, chosen.home.parked_bytes, 0.0)
    # around[i, j]: the range of call j contains that of call i.
    around = (options.start[None] <= options.start[:, None]) & (
        stop[:, None] <= stop[None]
    )
    static = jnp.where(around, options.static_bytes[None], 0.0).sum(1)
    working = jnp.where(around, options.working_bytes[None], 0.0)
    copying = jnp.where(around[:, problem.home], parked[None], 0.0)
    most, copies = jnp.zeros_like(static[0]), jnp.zeros_like(static)
    if not is_early:
        before = _not_yet(problem, chosen, jnp.where(around, made[None], 0.0))
    for moment in reversed(range(count)):
        # Copies that are there while this call runs.
        copies = copies + jnp.where(around[:, moment], ended[moment], 0.0)
        held = static + copies
        if not is_early:
            held -= before[moment]
        held += jnp.maximum(working[:, moment], copying[:, moment])
        most = jnp.maximum(most, held.max(0))
    return most


def _not_yet(
    problem: Problem, chosen: _Chosen, of_copies: Float[Array, "C C P"]
) -> list[Float[Array, "C P"]]:
    """Return by moment the bytes of copies that are made later, on each call's devices.

    Args:
        problem: calls.
        chosen: plans.
        of_copies: bytes on the devices of call i of the copy that call j makes.
    """
    count = len(of_copies)
    numbers = jnp.arange(count)
    found, later = [], jnp.zeros_like(of_copies[0])
    for moment in reversed(range(count)):
        found.append(later)
        later = later + of_copies[:, moment]

    def without(found: list[Array]) -> list[Array]:
        # One beside the training is made before it, where its role lives.
        of_ahead = jnp.where(chosen.beside[None], of_copies, 0.0)
        is_between = lambda m: (problem.home[:, None] <= m) & (numbers[:, None] > m)
        return [
            x - jnp.where(is_between(moment)[None], of_ahead, 0.0).sum(1)
            for moment, x in enumerate(found)
        ]

    return jax.lax.cond(problem.is_ahead.any(), without, lambda x: x, found[::-1])
