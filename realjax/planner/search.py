"""The search for the plan whose step takes the least time and fits the memory.

Some hundred chains of simulated annealing walk at the same time. A move gives one call
another option: on the devices that it has, on those of another call or within or around
them, or on any; there mostly a fast one. Plans that do not fit are never accepted; how
much they are beyond the memory only orders plans while none is known that fits.

`lower_bound` says how much better any plan could be at most.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, Int, Key
from realjax.planner.exhaustive import best_of_all, relaxed
from realjax.planner.options import CallOptions, Option
from realjax.planner.simulate import Problem, price
from realjax.planner.space import Space
from realjax.planner.variants import Variants, best_variants

CHAINS = 256
MOVES_AT_A_TIME = 64
RESTART_SHARE = 0.25
"""Of the chains, the worst, that go on from the best plan after some moves."""

STAY_SHARE, FOLLOW_SHARE, NEAR_SHARE = 0.4, 0.6, 0.9
"""Of moves: those that stay on their devices, those and the ones that take another
call's, and with them those that go within or around such devices."""

FIRST_TEMPERATURE, LAST_TEMPERATURE = 0.2, 0.002
"""Of the seconds of the best plan so far: a move that is worse by so much is taken with
probability 1 / e."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The best plan that a search has seen.

    Attributes:
        plan: the number of each call's option.
        seconds: of a step.
        memory_bytes: the most on any device.
        lower_bound: no plan takes less, under the model; see `lower_bound`.
        num_priced: plans that were looked at.
        history: seconds since the beginning, and the best plan's, whenever it changed.
    """

    plan: tuple[int, ...]
    seconds: float
    memory_bytes: float
    lower_bound: float
    num_priced: int
    history: tuple[tuple[float, float], ...]

    @property
    def gap(self) -> float:
        """How much longer a step takes than the lower bound, as a share."""
        return self.seconds / self.lower_bound - 1


class _Places(NamedTuple):
    """How the options of every call are numbered; see `options.CallOptions`.

    Options on ranges of one size follow each other, range by range. With K sizes:

    Attributes:
        first: number of the first option of a size.
        shapes: options on each range of it.
        ranges: how many ranges of it there are.
        size: devices of it.
    """

    first: Int[Array, "C K"]
    shapes: Int[Array, "C K"]
    ranges: Int[Array, "C K"]
    size: Int[Array, "C K"]


class _Chains(NamedTuple):
    plans: Int[Array, "N C"]
    cost: Array
    key: Key[Array, ""]


def search(
    space: Space,
    *,
    seconds: float = 5.0,
    seed: int = 0,
    starts: Sequence[Sequence[int]] = (),
    most_moves: int | None = None,
) -> Found:
    """Search for the best plan for some time.

    With `most_moves` the result depends on the seed alone; with time it also depends on
    the machine.

    Args:
        space: the plans.
        seconds: of the search, after compilation.
        seed: of its moves.
        starts: plans to begin with, beside each call's fastest options.
        most_moves: of each chain; None is as many as there is time for.

    Raises:
        ValueError: no plan was found that fits the memory.
    """
    numbering = _places(space)
    key = jax.random.key(seed)
    plans = _first_plans(space, key, starts)
    cost = _cost(space.problem, plans)
    chains = _Chains(plans, cost, key)
    walk = functools.partial(_walk, space.problem, numbering)
    jax.block_until_ready(walk(chains, jnp.float32(0.1)))  # Compiles.
    best_plan, best_cost = _best(chains)
    begin, moves, history = time.monotonic(), 0, []
    while True:
        passed = time.monotonic() - begin
        done = passed / seconds if most_moves is None else moves / most_moves
        if done >= 1:
            break
        share = FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** done
        chains = walk(chains, jnp.float32(share * best_cost))
        moves += MOVES_AT_A_TIME
        plan, cost = _best(chains)
        if cost < best_cost:
            best_plan, best_cost = plan, cost
            history.append((time.monotonic() - begin, cost))
    polished = _polished(space, best_plan)
    if not polished.fits[0]:
        limit = float(space.problem.memory_bytes)
        raise ValueError(
            f"No plan was found that fits: the best one takes"
            f" {polished.memory_bytes[0] / 2**30:.1f} GiB of a device, and it has"
            f" {limit / 2**30:.1f}. Search longer, give more devices, or offload roles"
            " (config.roles.<role>.offload)."
        )
    return Found(
        plan=polished.plans[0],
        seconds=float(polished.seconds[0]),
        memory_bytes=float(polished.memory_bytes[0]),
        lower_bound=lower_bound(space),
        num_priced=CHAINS * (moves + 1),
        history=tuple(history),
    )


def _polished(space: Space, plan: np.ndarray) -> Variants:
    """Give calls other strategies where they are, one by one, while that is better."""
    choices = []
    for number, options in zip(plan, space.options, strict=True):
        allocation = options[int(number)].allocation
        choices.append(options.numbers((allocation.devices[0], allocation.size)))
    return best_variants(space, [choices], [plan.tolist()])


def _places(space: Space) -> _Places:
    sizes = [options.sizes for options in space.options]
    most = max(map(len, sizes))
    rows = [[], [], [], []]
    for options, of_call in zip(space.options, sizes, strict=True):
        ends = [*(place for _, place, _ in of_call[1:]), len(options.places)]
        columns = (
            [first for _, _, first in of_call],
            [len(options.shapes[size]) for size, _, _ in of_call],
            [end - p for (_, p, _), end in zip(of_call, ends, strict=True)],
            [size for size, _, _ in of_call],
        )
        for row, column in zip(rows, columns, strict=True):
            # Beyond the last size there is none.
            row.append([*column, *[0] * (most - len(column))])
    # A size without options is never looked for.
    return _Places(*(jnp.asarray(row, jnp.int32) for row in rows))


def _first_plans(
    space: Space, key: Key[Array, ""], starts: Sequence[Sequence[int]]
) -> Int[Array, "N C"]:
    """Return a plan for each chain: those given, the fastest options, random ones."""
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    columns = []
    for options in space.options:
        seconds = np.array([option.seconds for option in options.different])
        seconds = seconds[options.columns()]
        by_speed = np.argsort(seconds, kind="stable")
        # Mostly fast ones: the square of a uniform number.
        drawn = generator.random(CHAINS) ** 2 * len(options)
        column = by_speed[drawn.astype(np.int64)]
        column[0] = by_speed[0]
        columns.append(column)
    plans = np.stack(columns, axis=1)
    for number, start in enumerate(starts[: CHAINS - 1]):
        plans[number + 1] = start
    return jnp.asarray(plans, jnp.int32)


def _cost(problem: Problem, plans: Int[Array, "N C"]) -> Array:
    """Return seconds; of plans that do not fit, something longer than any that does."""
    found = price(problem, plans)
    excess = found.memory_bytes / problem.memory_bytes
    longest = problem.options.seconds.max(axis=1).sum() * 10
    return jnp.where(excess <= 1, found.seconds, longest * excess)


@jax.jit
def _walk(
    problem: Problem, places: _Places, chains: _Chains, temperature: Array
) -> _Chains:
    """Make some moves in every chain, then let the worst go on from the best."""

    def move(chains: _Chains, _) -> tuple[_Chains, None]:
        keys = jax.random.split(chains.key, 3)
        proposed = _proposed(places, chains.plans, keys[1])
        cost = _cost(problem, proposed)
        worse = (cost - chains.cost) / temperature
        chance = jax.random.uniform(keys[2], worse.shape)
        is_taken = chance < jnp.exp(-worse)
        plans = jnp.where(is_taken[:, None], proposed, chains.plans)
        return _Chains(plans, jnp.where(is_taken, cost, chains.cost), keys[0]), None

    chains, _ = jax.lax.scan(move, chains, length=MOVES_AT_A_TIME)
    order = jnp.argsort(chains.cost)
    count = round(CHAINS * RESTART_SHARE)
    worst, best = order[-count:], order[:count]
    return chains._replace(
        plans=chains.plans.at[worst].set(chains.plans[best]),
        cost=chains.cost.at[worst].set(chains.cost[best]),
    )


def _proposed(
    places: _Places, plans: Int[Array, "N C"], key: Key[Array, ""]
) -> Int[Array, "N C"]:
    """Give one call of every plan another option."""
    num_chains, num_calls = plans.shape
    chain = jnp.arange(num_chains)
    keys = jax.random.split(key, 7)
    draw = lambda key: jax.random.uniform(key, (num_chains,))
    call = jax.random.randint(keys[0], (num_chains,), 0, num_calls)
    other = jax.random.randint(keys[1], (num_chains,), 0, num_calls)
    kind = draw(keys[2])
    # Where the call itself is, or another one.
    near = jnp.where(kind < STAY_SHARE, call, other)
    size, place = _place_of(places, near, plans[chain, near])
    # A size that the call has options of: that one, or any.
    has_some = (places.shapes > 0) & (places.ranges > 0)
    drawn = jax.random.gumbel(keys[3], has_some[call].shape)
    is_kept = (places.size[call] == size[:, None]) & (kind < FOLLOW_SHARE)[:, None]
    score = jnp.where(has_some[call], drawn + jnp.where(is_kept, 1e3, 0.0), -jnp.inf)
    chosen = jnp.argmax(score, axis=1)
    at = lambda x: x[call, chosen]
    # Within that place or around it, or anywhere.
    count, first = at(places.ranges), place * size
    inside = jnp.maximum(size // at(places.size), 1)
    offset = (draw(keys[4]) * inside).astype(jnp.int32)
    index = first // jnp.maximum(at(places.size), 1) + offset
    anywhere = (draw(keys[5]) * count).astype(jnp.int32)
    index = jnp.where(kind < NEAR_SHARE, jnp.minimum(index, count - 1), anywhere)
    # Options of a size are sorted: mostly a fast one.
    shape = (draw(keys[6]) ** 2 * at(places.shapes)).astype(jnp.int32)
    number = at(places.first) + index * at(places.shapes) + shape
    return plans.at[chain, call].set(number)


def _place_of(
    places: _Places, call: Int[Array, "N"], number: Int[Array, "N"]
) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """Return the size of an option's range, and which one of that size it is."""
    count = places.shapes[call] * places.ranges[call]
    offset = number[:, None] - places.first[call]
    column = jnp.argmax((offset >= 0) & (offset < count), axis=1)
    at = lambda x: x[call, column]
    index = (number - at(places.first)) // jnp.maximum(at(places.shapes), 1)
    return at(places.size), index


def _best(chains: _Chains) -> tuple[np.ndarray, float]:
    index = int(jnp.argmin(chains.cost))
    return np.asarray(chains.plans[index]), float(chains.cost[index])


def tight_lower_bound(space: Space) -> float:
    """Return seconds that no plan's step can be shorter than, and mostly not by much.

    Where the ways to place the calls are few enough: the best of those, with each call
    as fast as it can be there, and copies and memory for nothing (`relaxed`). That
    takes some seconds on eight devices. Else `lower_bound`.
    """
    easier = relaxed(space)
    return lower_bound(space) if easier is None else best_of_all(easier)[1]


def lower_bound(space: Space) -> float:
    """Return seconds that no plan's step can be shorter than.

    The longer one of two, both with each call's best option. The first is what a step
    must end before the next may begin the same: from a call of a role, along calls that
    read from each other, to the call that trains it. (Other chains of calls may overlap
    with those of the next step.) The second is the least device-seconds of all calls,
    spread over all devices.
    """
    return max(_longest_way(space), _least_work(space))


def _longest_way(space: Space) -> float:
    fastest = [
        _least(options, lambda option: option.seconds) for options in space.options
    ]
    reads = np.asarray(space.problem.reads)
    longest = 0.0
    for first in range(len(fastest)):
        last = int(space.problem.home[first])
        # The longest way from `first` to every call after it.
        ways = {first: fastest[first]}
        for call in range(first + 1, last + 1):
            before = [way for parent, way in ways.items() if reads[call, parent]]
            if before:
                ways[call] = fastest[call] + max(before)
        longest = max(longest, fastest[first], ways.get(last, 0.0))
    return longest


def _least_work(space: Space) -> float:
    work = sum(
        _least(options, lambda option: option.seconds * option.allocation.size)
        for options in space.options
    )
    return work / space.cluster.num_devices


def _least(options: CallOptions, value: Callable[[Option], float]) -> float:
    """Return the least of a number that is the same on any range of a size."""
    return min(value(o) for shapes in options.shapes.values() for o in shapes)
