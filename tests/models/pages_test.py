"""The pool of pages: what is written where, and models that read from it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models import pages as pages_lib
from realjax.models.config import ModelConfig
from realjax.models.parameters import abstract_parameters, init_parameters
from realjax.models.transformer import extend_pages, run
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.parallel.sharding import parameter_shardings
from tests.tiny_families import FAMILIES

PAGE_SIZE = 4
LENGTHS = np.array([19, 7, 26, 12, 3, 22, 15, 9])
NUM_ROWS, LONGEST = len(LENGTHS), int(LENGTHS.max())
NUM_COLUMNS = -(-LONGEST // PAGE_SIZE)
PAGES_OF_PART = 40


@functools.cache
def parameters_of(config: ModelConfig):
    """Larger than a new model's: every term must show in the output."""
    drawn = jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(0))
    return jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, drawn)


def draw_tokens(config):
    shape = (NUM_ROWS, LONGEST)
    return jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)


@functools.cache
def expected(config):
    """Hidden states of the whole rows, each token of them."""
    tokens = draw_tokens(config)
    place = jnp.arange(LONGEST)[None]
    positions = jnp.broadcast_to(place, tokens.shape)
    segment_ids = (place < LENGTHS[:, None]).astype(jnp.int32)
    forward = jax.jit(run, static_argnums=1)
    hidden, _ = forward(parameters_of(config), config, tokens, positions, segment_ids)
    return np.asarray(hidden)


def shuffled_table(num_parts=1):
    """Pages of every row in any order, those of a part of the rows counted from 0."""
    rng = np.random.default_rng(3)
    table = np.full((NUM_ROWS, NUM_COLUMNS), -1, np.int32)
    for rows in np.split(np.arange(NUM_ROWS), num_parts):
        free = list(rng.permutation(PAGES_OF_PART * 8 // num_parts))
        for row in rows:
            needed = -(-LENGTHS[row] // PAGE_SIZE)
            table[row, :needed] = [free.pop() for _ in range(needed)]
    return table


def chunks(sizes):
    """Cut rows into chunks of these sizes in turn, each row after its own delay."""
    start = np.zeros(NUM_ROWS, np.int32)
    turn = 0
    while (start < LENGTHS).any():
        size = sizes[turn % len(sizes)]
        counts = np.minimum(size, LENGTHS - start)
        # Row b begins at turn b % 3: rows are at places of their own, some idle.
        counts = np.where(np.arange(NUM_ROWS) % 3 <= turn, counts, 0)
        yield size, start.copy(), counts.astype(np.int32)
        start += counts
        turn += 1


class Model:
    """A model, its pool on one mesh, and its rows."""

    def __init__(self, config, text="d1", dtype="float32"):
        self.config = config
        mesh = make_mesh(Allocation.parse(text))
        partition = partition_for(mesh)
        num_parts = Allocation.parse(text).num_row_shards
        self.table = shuffled_table(num_parts)
        shardings = parameter_shardings(abstract_parameters(config), mesh)
        self.parameters = jax.device_put(parameters_of(config), shardings)
        self.pool = jax.jit(
            lambda: pages_lib.empty(
                config, PAGES_OF_PART * 8, PAGE_SIZE, dtype, partition
            )
        )()
        self.step = jax.jit(
            functools.partial(extend_pages, config=config, partition=partition),
            donate_argnames="pool",
        )

    def arguments(self, size, start, counts, first_page=None):
        tokens = np.zeros((NUM_ROWS, size), np.int32)
        whole = np.asarray(draw_tokens(self.config))
        for row, (first, count) in enumerate(zip(start, counts, strict=True)):
            tokens[row, :count] = whole[row, first : first + count]
        end = start + counts
        if first_page is None:
            first_page = np.zeros(NUM_ROWS, np.int32)
        table = np.full_like(self.table, -1)
        for row, skipped in enumerate(first_page):
            table[row, : NUM_COLUMNS - skipped] = self.table[row, skipped:]
        return {
            "tokens": tokens,
            "pool": self.pool,
            "table": table,
            "first_page": first_page,
            "start": start,
            "counts": counts,
            "lengths": end.astype(np.int32),
            "num_pages": np.int32((-(-end // PAGE_SIZE) - first_page).max()),
        }

    def read(self, sizes):
        """Return the hidden states of all rows, read in chunks."""
        out = np.zeros((NUM_ROWS, LONGEST, self.config.width), np.float32)
        for size, start, counts in chunks(sizes):
            hidden, self.pool = self.step(
                self.parameters, **self.arguments(size, start, counts)
            )
            hidden = np.asarray(hidden)
            assert np.isfinite(hidden).all()
            for row, (first, count) in enumerate(zip(start, counts, strict=True)):
                out[row, first : first + count] = hidden[row, :count]
        return out


def assert_rows_close(found, expected, atol=1e-5):
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            found[row, :length], expected[row, :length], atol=atol, rtol=0
        )


SAMPLE = ("qwen2", "qwen3_moe")
CHUNKS = [6, 1, 6, 1, 1]


@pytest.mark.parametrize(
    "family",
    [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_chunks_say_what_whole_rows_say(family):
    config = FAMILIES[family]
    assert_rows_close(Model(config).read(CHUNKS), expected(config))


# 64 ids divide over all; over t4 the 2 key heads are there twice.
DIVIDING = dataclasses.replace(FAMILIES["qwen2"], vocab_size=64)


@pytest.mark.parametrize(
    "text", ["d4t2", *(pytest.param(t, marks=pytest.mark.slow) for t in ("t4", "d2f2"))]
)
def test_a_mesh_says_what_whole_rows_say(text):
    assert_rows_close(Model(DIVIDING, text).read(CHUNKS), expected(DIVIDING))
