"""The search for the weight from which on tokens are kept, in a few passes over a row.

Every pass sums weights, or numbers of tokens, above several bit patterns at once, and
narrows the range of patterns that the threshold is in. It ends when the range holds one
token, or tokens of one weight only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.sampling.filters import BLOCK_SIZE
from pallas_kernels.sampling.row import Cut, Row, Tile, first_past, full
from pallas_kernels.sampling.sets import ONE_BITS

EVERY_ID = 2**30


class _Search(NamedTuple):
    """A search between passes. Tokens from `low` on are enough; from `high` not."""

    turn: jax.Array
    passes: jax.Array
    low: jax.Array
    high: jax.Array
    mass_from_low: jax.Array
    mass_from_high: jax.Array
    count_from_low: jax.Array
    count_from_high: jax.Array
    enough: jax.Array
    least: jax.Array  # Bounds of the patterns between the two, both included.
    most: jax.Array
    is_found: jax.Array


def search(
    row: Row, turn, enough: Callable, *, is_count: bool, within: Cut | None
) -> tuple[Cut, Any]:
    """Find the cut that keeps the fewest tokens whose amounts are enough.

    Args:
        row: to be searched.
        turn: number of passes so far.
        enough: of the amount of all tokens, says how much is.
        is_count: amounts are 1, not the weights.
        within: a cut made before.

    Returns:
        The cut, and the number of passes so far.
    """
    state = _Search(
        turn=turn,
        passes=jnp.int32(0),
        low=jnp.int32(0),
        high=jnp.int32(ONE_BITS + 1),
        mass_from_low=jnp.float32(0),
        mass_from_high=jnp.float32(0),
        count_from_low=jnp.float32(0),
        count_from_high=jnp.float32(0),
        enough=jnp.float32(0),
        least=jnp.int32(0),
        most=jnp.int32(ONE_BITS),
        is_found=jnp.bool_(False),
    )
    state = lax.while_loop(
        lambda state: ~state.is_found,
        lambda state: _narrow(row, state, enough, is_count, within),
        state,
    )
    # All tokens from `low` on, unless several of one weight are too many.
    pattern, last_id, turn = lax.cond(
        state.count_from_low - state.count_from_high > 1,
        lambda: _cut_equals(row, state, is_count, within),
        lambda: (state.low, jnp.int32(EVERY_ID), state.turn),
    )
    return Cut(pattern, last_id), turn


def _narrow(row: Row, state: _Search, enough, is_count: bool, within: Cut | None):
    """One pass: sum above the pivots, and move `low` and `high` to two of them."""
    pivots = _pivots(state, row.static.pivots)

    def step(carry, tile: Tile):
        masses, counts, least, most = carry
        weights, patterns = row.weights(tile)
        if within is not None:
            kept = row.is_kept(tile, patterns, within)
            weights = jnp.where(kept, weights, 0.0)
            patterns = jnp.where(kept, patterns, 0)
        above = [patterns >= pivot for pivot in pivots]
        add = lambda sums, amounts: [
            sum_ + jnp.where(is_above, amounts, 0.0)
            for sum_, is_above in zip(sums, above, strict=True)
        ]
        counts = add(counts, 1.0)
        if not is_count:
            masses = add(masses, weights)
        most = jnp.maximum(most, jnp.where(patterns < state.high, patterns, 0))
        least = jnp.maximum(
            least, jnp.where(patterns >= state.low, -patterns, -ONE_BITS)
        )
        return masses, counts, least, most

    zeros = [full(0.0)] * len(pivots)
    none = full(-ONE_BITS, jnp.int32), full(0, jnp.int32)
    masses, counts, least, most = row.scan(
        step, ([] if is_count else zeros, zeros, *none)
    )
    sums, (least, most) = row.total(
        state.turn, sums=(*masses, *counts), maxima=(least, most)
    )
    counts = sums[-len(pivots) :]
    masses = counts if is_count else sums[: len(pivots)]
    amount = jnp.where(state.passes == 0, enough(masses[0]), state.enough)
    state = state._replace(enough=amount, least=-least, most=most)
    return _moved(state, pivots, masses, counts)


def _cut_equals(row: Row, state: _Search, is_count: bool, within: Cut | None):
    """Cut tokens of one weight by their ids: as many as are still needed."""

    def step(mass, tile: Tile):
        weights, patterns = row.weights(tile)
        is_equal = (patterns >= state.low) & (patterns < state.high)
        if within is not None:
            is_equal &= row.is_kept(tile, patterns, within)
        row.store_blocks(tile, jnp.where(is_equal, 1.0, 0.0))
        return mass + jnp.where(is_equal, weights, 0.0)

    (mass,), _ = row.total(state.turn, sums=(row.scan(step, full(0.0)),))
    number = state.count_from_low - state.count_from_high
    missing = state.enough - state.mass_from_high
    needed = missing if is_count else missing / (mass / number)
    whole = needed.astype(jnp.int32).astype(jnp.float32)
    needed = jnp.where(whole < needed, whole + 1, whole)  # Rounded up.

    @pl.when(row.warpgroup == 0)
    def _find():
        # In units of tokens: the last of them is the first past all but a half.
        block, before = row.find_block(lambda _: needed - 0.5)
        _, patterns, ids = row.of_block(block)
        is_equal = (patterns >= state.low) & (patterns < state.high)
        if within is not None:
            is_equal &= within.keeps(patterns, ids)
        ones = jnp.where(is_equal, 1.0, 0.0)
        last = first_past(ones, lambda _: needed - before - 0.5)
        row.shared.found[0] = block * BLOCK_SIZE + last.place

    row.meet()
    return state.least, row.shared.found[0], state.turn + 1


def _pivots(state: _Search, number: int) -> list[Any]:
    """Return the patterns, in order, to sum above in a pass.

    All are above `least`, so that the sums below them change, and the last is `most`.
    The first pass looks at all tokens and at even steps of the logit; the others around
    where a straight line between the known sums would be enough.
    """
    steps = [14 - 12 * i / (number - 2) for i in range(number - 1)]
    first = [1] + [ONE_BITS - int(step * 2**23) for step in steps]
    least, most = state.least, state.most
    width = most - least
    share = lax.div(
        state.mass_from_low - state.enough,
        jnp.maximum(state.mass_from_low - state.mass_from_high, 1e-30),
    )
    guess = least + (share * width.astype(jnp.float32)).astype(jnp.int32)
    # Where the sums bend, the guess may be far off, again and again.
    is_even = (width <= 64) | ((state.passes > 5) & (lax.rem(state.passes, 2) == 1))
    found = []
    side = (number - 2) // 2
    for i in range(number):
        away = abs(i - side)
        offset = lax.shift_right_logical(width, jnp.int32(2 * (side + 1 - away)))
        near = guess if i == side else guess + (offset if i > side else -offset)
        near = jnp.clip(near, least + 1, most) if i < number - 1 else most
        even = lax.div(width, number) * (i + 1)
        even += lax.div(lax.rem(width, number) * (i + 1) + number - 1, number)
        later = jnp.where(is_even, least + even, near)
        found.append(jnp.where(state.passes == 0, first[i], later))
    return found


def _moved(state: _Search, pivots, masses, counts) -> _Search:
    """Return the search with `low` and `high` at the pivots around the threshold."""
    low = state.low, state.mass_from_low, state.count_from_low
    high = state.high, state.mass_from_high, state.count_from_high
    select = lambda condition, new, old: tuple(
        jnp.where(condition, a, b) for a, b in zip(new, old, strict=True)
    )
    for one in zip(pivots, masses, counts, strict=True):
        is_enough = one[1] >= state.enough
        low = select(is_enough & (one[0] > low[0]), one, low)
        high = select(~is_enough & (one[0] < high[0]), one, high)
    least = jnp.maximum(state.least, low[0])
    most = jnp.minimum(state.most, high[0] - 1)
    return state._replace(
        turn=state.turn + 1,
        passes=state.passes + 1,
        low=low[0],
        high=high[0],
        mass_from_low=low[1],
        mass_from_high=high[1],
        count_from_low=low[2],
        count_from_high=high[2],
        least=least,
        most=most,
        is_found=(low[2] - high[2] <= 1) | (least >= most),
    )
