"""Seconds and memory of many plans at once.

A plan is one option a call. Calls are issued in one order, the graph's, and a device
takes them as they are issued; so a call begins when the calls it reads from have ended,
and all earlier ones that share a device with it:

    begin_i = max over j < i that i reads from or overlaps with   of end_j
    end_i   = begin_i + copy_i + seconds_i

Ranges of devices are within each other or apart (`strategies`), so that what two calls
share is a comparison of numbers, whatever the number of devices. The same holds for
memory: a device holds what all ranges around it hold, and the most is in one that no
smaller range is within.

Steps follow each other without a pause; the seconds of one are those between the ends
of two steps in a row, once the first ones are over.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Float, Int

STEPS = 4
"""Steps that are simulated, of which the last two count."""


class Options(NamedTuple):
    """What every option of every call is and takes; C calls of at most O options.

    Attributes:
        start, size: its range of devices.
        seconds: of the call, without copies.
        static_bytes: that its devices hold at all times because of it.
        working_bytes: that they hold while it runs.
        copy_bytes: of its parameters on one device, where they lie elsewhere.
        layout: options of a role with the same number cut its parameters alike.
    """

    start: Int[Array, "C O"]
    size: Int[Array, "C O"]
    seconds: Float[Array, "C O"]
    static_bytes: Float[Array, "C O"]
    working_bytes: Float[Array, "C O"]
    copy_bytes: Float[Array, "C O"]
    layout: Int[Array, "C O"]


class Problem(NamedTuple):
    """What does not depend on the plan.

    Attributes:
        options: of the calls, in the order in which they are issued.
        reads: whether call i reads what call j < i writes.
        home: for each call the one where its role's parameters live; itself if there.
        devices_per_node: a copy between nodes goes over the network.
        link, network: seconds a byte.
        hop_seconds: of a copy, beside its bytes.
        memory_bytes: of a device.
    """

    options: Options
    reads: Array
    home: Array
    devices_per_node: Array
    link: Array
    network: Array
    hop_seconds: Array
    memory_bytes: Array


class Priced(NamedTuple):
    """What plans take.

    Attributes:
        seconds: of a step.
        memory_bytes: the most on any device.
        begin, end: of each call in the last step, from its beginning.
        copy_seconds: of the copy before each call.
    """

    seconds: Float[Array, "P"]
    memory_bytes: Float[Array, "P"]
    begin: Float[Array, "P C"]
    end: Float[Array, "P C"]
    copy_seconds: Float[Array, "P C"]


@jax.jit
def price(problem: Problem, plans: Int[Array, "P C"]) -> Priced:
    """Simulate plans.

    Args:
        problem: calls and options.
        plans: the number of each call's option.
    """
    return jax.vmap(functools.partial(_price, problem))(plans)


def _price(problem: Problem, plan: Int[Array, "C"]) -> Priced:
    calls = jnp.arange(len(plan))
    chosen = Options(*(x[calls, plan] for x in problem.options))
    stop = chosen.start + chosen.size
    meets = (chosen.start[:, None] < stop[None]) & (chosen.start[None] < stop[:, None])
    copies = _copy_seconds(problem, chosen)
    seconds = chosen.seconds + copies
    count = len(plan)
    is_earlier = jnp.tril(jnp.ones((count, count), bool), -1)
    waits = (problem.reads | meets) & is_earlier
    # In the next step a call waits for what shares its devices or trains its role.
    trains = problem.home[:, None] == calls[None]
    again = meets | trains
    ends = jnp.zeros(count)
    last = jnp.zeros(())
    begins = ends
    for _ in range(STEPS):
        before = jnp.where(again, ends[None], 0.0).max(axis=1)
        new, begins = jnp.zeros(count), []
        for index in range(count):
            begin = jnp.maximum(before[index], jnp.where(waits[index], new, 0.0).max())
            begins.append(begin)
            new = new.at[index].set(begin + seconds[index])
        begins = jnp.stack(begins)
        last, ends, period = new.max(), new, new.max() - last
    offset = last - period
    return Priced(
        seconds=period,
        memory_bytes=_memory(chosen, copies),
        begin=begins - offset,
        end=ends - offset,
        copy_seconds=copies,
    )


def _copy_seconds(problem: Problem, chosen: Options) -> Float[Array, "C"]:
    """Return the seconds of the copy of parameters before each call.

    A device receives its whole part: what it had of another layout is at most a share
    of it, and for some devices nothing. Sources share what is sent.
    """
    home = jax.tree.map(lambda x: x[problem.home], chosen)
    is_same = (home.start == chosen.start) & (home.layout == chosen.layout)
    sent = chosen.copy_bytes * chosen.size / home.size
    moved = jnp.maximum(chosen.copy_bytes, sent)
    first = jnp.minimum(home.start, chosen.start)
    stop = jnp.maximum(home.start + home.size, chosen.start + chosen.size)
    of_node = problem.devices_per_node
    is_within = first // of_node == (stop - 1) // of_node
    rate = jnp.where(is_within, problem.link, problem.network)
    return jnp.where(is_same, 0.0, moved * rate + problem.hop_seconds)


def _memory(chosen: Options, copies: Float[Array, "C"]) -> Float[Array, ""]:
    """Return the most bytes of a device."""
    stop = chosen.start + chosen.size
    # around[i, j]: the range of call j contains that of call i.
    around = (chosen.start[None] <= chosen.start[:, None]) & (
        stop[:, None] <= stop[None]
    )
    static = jnp.where(around, chosen.static_bytes[None], 0.0).sum(axis=1)
    working = chosen.working_bytes + jnp.where(copies > 0, chosen.copy_bytes, 0.0)
    return (static + jnp.where(around, working[None], 0.0).max(axis=1)).max()
