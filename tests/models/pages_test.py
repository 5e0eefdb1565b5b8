"""The pool of pages: what is written where, and models that read from it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from pallas_kernels.testing.hlo import collectives
from realjax.models import pages as pages_lib
from realjax.models.parameters import abstract_parameters
from realjax.models.transformer import extend, run
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.parallel.sharding import axes_spec, is_axes, parameter_shardings
from tests.functions.plain import sharp_parameters
from tests.tiny_families import FAMILIES, LLAMA

PAGE_SIZE = 4
LENGTHS = np.array([19, 7, 26, 12, 3, 22, 15, 9])
NUM_ROWS, LONGEST = len(LENGTHS), int(LENGTHS.max())
NUM_COLUMNS = -(-LONGEST // PAGE_SIZE)
NUM_PAGES = 320


parameters_of = functools.cache(sharp_parameters)


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
        free = list(rng.permutation(NUM_PAGES // num_parts))
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

    def __init__(self, config, text="d1", dtype="float32", num_pages=NUM_PAGES):
        self.config = config
        self.pages_left: Callable = np.zeros_like
        self.most_left = 0
        mesh = make_mesh(Allocation.parse(text))
        partition = partition_for(mesh)
        num_parts = Allocation.parse(text).num_row_shards
        self.table = shuffled_table(num_parts)
        shardings = parameter_shardings(abstract_parameters(config), mesh)
        self.parameters = jax.device_put(parameters_of(config), shardings)
        self.pool = jax.jit(
            lambda: pages_lib.empty(config, num_pages, PAGE_SIZE, dtype, partition)
        )()
        self.step = jax.jit(
            functools.partial(extend, config=config, partition=partition),
            donate_argnames="pool",
        )

    def arguments(self, size, start, counts):
        tokens = np.zeros((NUM_ROWS, size), np.int32)
        whole = np.asarray(draw_tokens(self.config))
        for row, (first, count) in enumerate(zip(start, counts, strict=True)):
            tokens[row, :count] = whole[row, first : first + count]
        end = start + counts
        first_page = self.pages_left(start)
        self.most_left = max(self.most_left, first_page.max())
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


SAMPLE = ("mixtral",)
CHUNKS = [6, 1, 6, 1, 1]
# 64 ids divide over all; over t4 the 2 key heads are there twice.
DIVIDING = dataclasses.replace(FAMILIES["qwen2"], vocab_size=64)


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


@pytest.mark.parametrize(
    "text", ["d4t2", *(pytest.param(t, marks=pytest.mark.slow) for t in ("t4", "d2f2"))]
)
def test_a_mesh_says_what_whole_rows_say(text):
    assert_rows_close(Model(DIVIDING, text).read(CHUNKS), expected(DIVIDING))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["d2e2", "e4t2"])
def test_a_mixture_on_a_mesh_says_what_whole_rows_say(text):
    config = dataclasses.replace(FAMILIES["qwen3_moe"], vocab_size=64)
    assert_rows_close(Model(config, text).read(CHUNKS), expected(config))


def test_pages_out_of_the_window_may_be_left_behind():
    config = FAMILIES["mixtral"]
    assert config.layer_windows == (7, 7, 7)
    model = Model(config)
    # The first place that a query at `start` or later sees is start - 6.
    model.pages_left = lambda start: np.maximum(start - 6, 0) // PAGE_SIZE
    assert_rows_close(model.read([6, 1, 1, 6]), expected(config))
    assert model.most_left == 3


# Hidden states have a size of about 1. bfloat16 has 8 bits, and so has int8, of the
# largest number of its head; float8 has 4.
BOUNDS = {"bfloat16": 0.008, "float16": 0.001, "int8": 0.02, "float8_e4m3fn": 0.1}


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(name, marks=() if name == "int8" else pytest.mark.slow)
        for name in BOUNDS
    ],
)
def test_pools_of_fewer_bits_are_within_their_rounding(dtype):
    found = Model(DIVIDING, dtype=dtype).read([6])
    is_token = np.arange(LONGEST)[None] < LENGTHS[:, None]
    error = np.abs(found - expected(DIVIDING))[is_token]
    assert 0 < error.mean() < BOUNDS[dtype]


# Compiled whole, which takes less than operation by operation.
write = jax.jit(pages_lib.write)
copy_pages = jax.jit(pages_lib.copy_pages)


def pool_of(num_pages=5, page_size=4, dtype="float32", config=LLAMA, **changes):
    pool = pages_lib.empty(config, num_pages, page_size, dtype)
    return pool._replace(**changes)


def ints(*values):
    return jnp.asarray(values, jnp.int32)


def draw_heads(num_rows, num_tokens, seed=0, config=LLAMA):
    shape = (2, num_rows, num_tokens, config.num_kv_heads, config.head_dim)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_tokens_are_written_to_the_slots_of_their_pages():
    # Row 0 from position 6 on: page 1 of the row, of which 1 is left behind, so column
    # 0, slots 2 and 3; then column 1, slot 0. Row 1 has one token, at position 3.
    key, value = draw_heads(2, 3)
    pool = write(
        pool_of(),
        jnp.int32(1),
        jnp.asarray([[3, 0], [4, -1]], jnp.int32),
        first_page=ints(1, 0),
        start=ints(6, 3),
        counts=ints(3, 1),
        key=key,
        value=value,
    )
    for stack, new in ((pool.keys, key), (pool.values, value)):
        expected = np.zeros(stack.shape, np.float32)
        expected[1, 3, :, 2] = new[0, 0]
        expected[1, 3, :, 3] = new[0, 1]
        expected[1, 0, :, 0] = new[0, 2]
        expected[1, 4, :, 3] = new[1, 0]
        np.testing.assert_array_equal(stack, expected)


@pytest.mark.parametrize(
    ("first_page", "start", "counts"),
    [
        pytest.param(0, 0, 0, id="padding"),
        pytest.param(0, 4, 3, id="no page"),
        pytest.param(0, 8, 3, id="after the table"),
        pytest.param(2, 4, 3, id="before the table"),
    ],
)
def test_nothing_is_written_where_there_is_no_page(first_page, start, counts):
    key, value = draw_heads(1, 3)
    full = pool_of()._replace(keys=jnp.ones_like(pool_of().keys))
    written = write(
        full,
        jnp.int32(0),
        jnp.asarray([[2, -1]], jnp.int32),
        ints(first_page),
        ints(start),
        ints(counts),
        key,
        value,
    )
    jax.tree.map(np.testing.assert_array_equal, written, full)


def test_padding_of_a_chunk_is_not_written():
    key, value = draw_heads(1, 6)
    write_some = functools.partial(
        *(write, pool_of(), jnp.int32(0), jnp.asarray([[2, 1]], jnp.int32)),
        first_page=ints(0),
        start=ints(1),
        counts=ints(4),
    )
    shorter = write_some(key=key[:, :4], value=value[:, :4])
    jax.tree.map(
        np.testing.assert_array_equal, write_some(key=key, value=value), shorter
    )
    assert np.count_nonzero(shorter.keys) == key[:, :4].size


def test_int8_is_within_half_a_step_and_float8_within_a_sixteenth():
    key, value = draw_heads(1, 4)
    key = key.at[0, 2, 1].set(0.0)  # No scale to divide by.
    table = ints(2)[None]
    places = (jnp.int32(2), table, ints(0), ints(0), ints(4))
    for dtype in ("int8", "float8_e4m3fn"):
        pool = write(pool_of(dtype=dtype), *places, key, value)
        stored = pool.keys[2, 2]
        if dtype == "float8_e4m3fn":
            stored = jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn)
        assert pool.key_scales is not None
        scales = np.asarray(pool.key_scales[2, 2])[..., None]
        exact = np.swapaxes(key[0], 0, 1)
        error = np.abs(scales * np.asarray(stored, np.float32) - exact)
        # Of float8 numbers below 2^-6 the steps are 2^-9.
        bound = scales / 2 + 1e-6
        if dtype == "float8_e4m3fn":
            bound = np.maximum(np.abs(exact) / 16, scales / 2**10) + 1e-6
        assert (error <= bound).all()
        largest = np.abs(exact).max(axis=-1)
        np.testing.assert_allclose(
            scales[..., 0] * {"int8": 127, "float8_e4m3fn": 448}[dtype], largest
        )
        assert not np.asarray(stored, np.float32)[1, 2].any()


def numbered(num_pages=6, dtype="float32"):
    """A pool whose pages hold their own number, and that of the layer."""
    pool = pool_of(num_pages, dtype=dtype)

    def number(stack):
        shape = (stack.shape[0], num_pages, *(1,) * (stack.ndim - 2))
        return jnp.broadcast_to(
            jnp.arange(stack.shape[0] * num_pages).reshape(shape), stack.shape
        ).astype(stack.dtype)

    return jax.tree.map(number, pool)


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_pages_are_copied_in_all_layers_after_all_are_read(dtype):
    pool = numbered(dtype=dtype)
    # 0 and 1 change places; 4 goes to 3; the others are nothing.
    copied = copy_pages(pool, ints(0, 1, 4, 5, -1), ints(1, 0, 3, -1, 2))
    order = np.array([1, 0, 2, 4, 4, 5])
    for before, after in zip(
        jax.tree.leaves(pool), jax.tree.leaves(copied), strict=True
    ):
        np.testing.assert_array_equal(after, before[:, order])


def test_each_part_of_the_rows_copies_its_own_pages():
    mesh = make_mesh(Allocation.parse("d2t2"))
    partition = partition_for(mesh)
    axes = pages_lib.axes_of(pool_of())
    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, axes_spec(names, mesh)), axes, is_leaf=is_axes
    )
    pool = jax.device_put(numbered(), shardings)
    copy = jax.jit(functools.partial(pages_lib.copy_pages, partition=partition))
    # Part 0 has the pages 0 to 2, part 1 the pages 3 to 5, to it 0 to 2.
    copied = copy(pool, ints(0, 1, 2, -1), ints(1, -1, 0, 1))
    order = np.array([0, 0, 2, 5, 4, 5])
    np.testing.assert_array_equal(copied.keys, pool.keys[:, order])
    assert copied.keys.sharding.is_equivalent_to(pool.keys.sharding, 5)


@pytest.mark.parametrize("text", ["d1", "d2t4"])
@pytest.mark.parametrize("dtype", pages_lib.DTYPES)
def test_bytes_of_a_page_are_those_of_the_pool_over_its_pages(dtype, text):
    partition = partition_for(make_mesh(Allocation.parse(text)))
    pool = pages_lib.empty(LLAMA, 6, 4, dtype, partition)
    assert pool.page_size == 4
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(pool))
    assert pages_lib.page_bytes(LLAMA, 4, dtype, partition) * 6 == num_bytes
    parts = {len({s.index for s in pool.keys.addressable_shards})}
    assert parts == {1 if text == "d1" else 8}


@pytest.mark.parametrize("text", ["d1", "d4t2"])
def test_a_donated_pool_is_copied_to_in_place(text):
    partition = partition_for(make_mesh(Allocation.parse(text)))
    pool = jax.jit(
        lambda: pages_lib.empty(LLAMA, 8000, PAGE_SIZE, "float32", partition)
    )()
    copy = jax.jit(
        functools.partial(pages_lib.copy_pages, partition=partition), donate_argnums=0
    )
    ids = jnp.zeros(8, jnp.int32)
    compiled: Any = copy.lower(pool, ids, ids).compile()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(pool))
    assert compiled.memory_analysis().alias_size_in_bytes == held
    assert compiled.memory_analysis().temp_size_in_bytes < held / 50
    assert collectives(compiled.as_text()) == ()


def test_a_pool_of_another_type_is_refused():
    message = "There is no pool of pages of int32. Types are float32, bfloat16, float16"
    with pytest.raises(ValueError, match=message):
        pages_lib.empty(LLAMA, 6, 4, "int32")


IN_PLACE = [
    ("d4t2", "float32", 1),
    ("d1", "float8_e4m3fn", 6),
    pytest.param("t4", "int8", 6, marks=pytest.mark.slow),
    pytest.param("d1", "bfloat16", 1, marks=pytest.mark.slow),
    pytest.param("d4t2", "bfloat16", 6, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("text", "dtype", "size"), IN_PLACE)
def test_a_donated_pool_is_written_in_place_and_sent_nowhere(text, dtype, size):
    config = DIVIDING
    model = Model(config, text, dtype, num_pages=8000)
    zeros = np.zeros(NUM_ROWS, np.int32)
    arguments = model.arguments(size, zeros, zeros)
    compiled: Any = model.step.lower(model.parameters, **arguments).compile()
    held = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model.pool)
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == held
    # Not even one layer of the keys is there twice.
    assert memory.temp_size_in_bytes < held / 8
    for found in collectives(compiled.as_text()):
        assert found.kind == "all-reduce"
        assert found.num_bytes <= 4 * NUM_ROWS * size * config.width


def test_rows_that_wait_leave_the_pool_as_it_is():
    model = Model(DIVIDING)
    zeros = np.zeros(NUM_ROWS, np.int32)
    counts = np.full(NUM_ROWS, 6, np.int32)
    _, pool = model.step(model.parameters, **model.arguments(6, zeros, counts))
    before, model.pool = jax.device_get(pool), pool
    arguments = model.arguments(6, counts, zeros) | {
        "tokens": np.ones((8, 6), np.int32)
    }
    hidden, after = model.step(model.parameters, **arguments)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert np.isfinite(hidden).all()
