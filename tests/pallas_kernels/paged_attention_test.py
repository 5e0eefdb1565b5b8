"""Attention to pages: what is seen, and that it equals attention without pages."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention
from pallas_kernels.paged_attention import api, reference

STATIC = ("window", "soft_cap", "scale", "implementation")
paged_attention = jax.jit(api.paged_attention, static_argnames=STATIC)

LAYERS, PAGES, PAGE_SIZE, HEAD_DIM = 2, 60, 4, 6
UNUSED = 1e6  # In slots that nobody may see.


class Sequences:
    """Sequences as arrays of their own, and in shuffled pages of one layer.

    Row b has positions 0 to ends[b]; those of its first pages are in no page any more.
    """

    def __init__(self, ends, first_page, *, kv_heads=2, num_columns=7, seed=0):
        rng = np.random.default_rng(seed)
        self.first_page = np.asarray(first_page, np.int32)
        shape = (LAYERS, PAGES, kv_heads, PAGE_SIZE, HEAD_DIM)
        self.keys: Any = np.full(shape, UNUSED, np.float32)
        self.values: Any = np.full(shape, UNUSED, np.float32)
        self.table = np.full((len(ends), num_columns), -1, np.int32)
        self.layer = 1
        free = list(rng.permutation(PAGES))
        self.rows = []
        for row, end in enumerate(ends):
            key, value = rng.normal(size=(2, end, kv_heads, HEAD_DIM))
            self.rows.append((key, value))
            for position in range(self.first_page[row] * PAGE_SIZE, end):
                column = position // PAGE_SIZE - self.first_page[row]
                if self.table[row, column] < 0:
                    self.table[row, column] = free.pop()
                place = self.layer, self.table[row, column], slice(None)
                self.keys[*place, position % PAGE_SIZE] = key[position]
                self.values[*place, position % PAGE_SIZE] = value[position]

    @property
    def num_pages(self):
        return (self.table >= 0).sum(axis=1).max()

    def attend(self, query, start, *, num_pages=None, function=None, **options):
        return (function or paged_attention)(
            jnp.asarray(query),
            jnp.asarray(self.keys),
            jnp.asarray(self.values),
            layer=jnp.int32(self.layer),
            table=jnp.asarray(self.table),
            first_page=jnp.asarray(self.first_page),
            start=jnp.asarray(start, jnp.int32),
            num_pages=jnp.int32(self.num_pages if num_pages is None else num_pages),
            **options,
        )

    def sees(self, row, own, position, window=None):
        """Whether the query at position `own` sees one, by the definition."""
        column = position // PAGE_SIZE - self.first_page[row]
        if not 0 <= column < self.table.shape[1] or self.table[row, column] < 0:
            return False
        return position <= own and (window is None or own - position < window)

    def plain(self, query, start, *, window=None, soft_cap=None, scale=None):
        """The definition, one query and head at a time in float64."""
        query = np.asarray(query, np.float64)
        num_heads = query.shape[2]
        out = np.full(query.shape, np.nan)
        for row, token, head in np.ndindex(*query.shape[:3]):
            key, value = self.rows[row]
            own = start[row] + token
            seen = [p for p in range(len(key)) if self.sees(row, own, p, window)]
            if not seen:
                continue
            kv_head = head // (num_heads // key.shape[1])
            scores = key[seen, kv_head] @ query[row, token, head]
            scores = scores * (HEAD_DIM**-0.5 if scale is None else scale)
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            weights = np.exp(scores - scores.max())
            out[row, token, head] = weights / weights.sum() @ value[seen, kv_head]
        return out


def draw_query(batch, num_tokens, heads=4, seed=9):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, num_tokens, heads, HEAD_DIM)).astype(np.float32)


def assert_equal_where_seen(found, expected, atol=2e-6):
    assert np.isfinite(found).all()
    is_seen = np.isfinite(expected)
    assert is_seen.any()
    np.testing.assert_allclose(
        np.asarray(found)[is_seen], expected[is_seen], atol=atol, rtol=0
    )


# Ends of the rows, pages that each has left behind, and tokens given.
STEP = {"ends": [22, 7, 1, 28], "first_page": [0, 0, 0, 0], "num_tokens": 1}
CHUNK = {"ends": [22, 7, 12, 28], "first_page": [0, 0, 0, 0], "num_tokens": 6}
MOVED = {"ends": [50, 7, 38, 36], "first_page": [6, 0, 3, 8], "num_tokens": 3}


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(STEP, id="step"),
        pytest.param(CHUNK, id="chunk", marks=pytest.mark.slow),
        pytest.param(MOVED, id="moved"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"window": 5}, id="window", marks=pytest.mark.slow),
        pytest.param({"window": 9, "soft_cap": 0.5, "scale": 0.7}, id="options"),
    ],
)
def test_attention_to_pages_is_the_definition(rows, options):
    sequences = Sequences(rows["ends"], rows["first_page"])
    query = draw_query(4, rows["num_tokens"])
    # The last token of each row is its query's last.
    start = np.asarray(rows["ends"]) - rows["num_tokens"]
    found = sequences.attend(query, start, **options)
    assert_equal_where_seen(found, sequences.plain(query, start, **options))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_query_heads_read_the_key_heads_of_their_group(kv_heads):
    sequences = Sequences([9, 14], [0, 1], kv_heads=kv_heads)
    query, start = draw_query(2, 2), np.array([7, 12])
    found = sequences.attend(query, start)
    assert_equal_where_seen(found, sequences.plain(query, start))


def test_traced_windows_and_scales_are_as_known_ones():
    sequences, query = Sequences([9, 14], [0, 1]), draw_query(2, 2)
    known = sequences.attend(query, [7, 12], window=5, scale=0.3)
    traced = sequences.attend(
        query,
        [7, 12],
        window=jnp.int32(5),
        scale=jnp.float32(0.3),
        function=jax.jit(api.paged_attention),
    )
    np.testing.assert_array_equal(traced, known)


@pytest.mark.parametrize("num_tokens", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_pages_say_what_rows_say(num_tokens):
    ends = np.array([22, 7, 12, 28])
    sequences, last = Sequences(ends, [0] * 4), draw_query(4, num_tokens)
    # Queries before the last are anything.
    query = np.ones((4, 28, 4, HEAD_DIM), np.float32)
    rows = np.zeros((2, 4, 28, 2, HEAD_DIM), np.float32)
    for row, (end, pair) in enumerate(zip(ends, sequences.rows, strict=True)):
        query[row, end - num_tokens : end] = last[row]
        rows[:, row, :end] = pair
    options = {"window": 11, "soft_cap": 2.0}
    segment_ids = (np.arange(28) < ends[:, None]).astype(np.int32)
    expected = attention(
        *map(jnp.asarray, (query, *rows)),
        segment_ids=jnp.asarray(segment_ids),
        **options,
    )
    found = sequences.attend(last, ends - num_tokens, **options)
    for row, end in enumerate(ends):
        np.testing.assert_allclose(
            found[row], expected[row, end - num_tokens : end], atol=2e-6
        )


def test_pages_that_are_not_in_the_table_are_not_seen():
    sequences, query = Sequences([26, 22], [0, 1]), draw_query(2, 2)
    sequences.table[0, 2:4] = -1
    sequences.table[1, 0] = -1
    start = np.array([24, 20])
    assert not sequences.sees(0, 24, 9)
    expected = sequences.plain(query, start)
    assert_equal_where_seen(sequences.attend(query, start), expected)


def test_what_sees_nothing_is_finite():
    sequences, query = Sequences([26, 22], [0, 1]), draw_query(2, 2)
    sequences.table[1] = -1
    found = sequences.attend(query, [24, 20])
    assert np.isfinite(found).all()
    # A window that ends before the first page.
    far = sequences.attend(query, [24, 500], window=3)
    assert np.isfinite(far).all()


def test_columns_after_those_in_use_are_not_read():
    sequences, query = Sequences([14, 9], [0, 0], num_columns=8), draw_query(2, 1)
    expected = sequences.plain(query, [13, 8])
    # Not even out of sight may a NaN be read: 0 x NaN is NaN.
    (nobody,) = set(range(PAGES)) - set(range(PAGES - 1)) - set(sequences.table.flat)
    sequences.keys[:, nobody] = sequences.values[:, nobody] = np.nan
    sequences.table[:, 4:] = nobody
    attend = functools.partial(
        sequences.attend, query, [13, 8], implementation="gathered"
    )
    assert_equal_where_seen(attend(num_pages=4), expected)
    assert np.isnan(attend(num_pages=5)).all()


@pytest.mark.parametrize("window", [None, 9])
def test_listed_pages_say_what_gathered_ones_say(window):
    # 49 pages in use, more than are met at a time; one row waits.
    ends = [70, 9, 41, 1, 70, 5]
    sequences, query = Sequences(ends, [0] * 6, num_columns=18), draw_query(6, 1)
    sequences.table[3] = -1
    start = np.array(ends) - 1
    options = {"window": window, "soft_cap": 3.0}
    found = api.explain(query.shape, sequences.keys.shape, 18, jnp.float32)
    assert "runs as 'listed'" in found
    gathered, listed = (
        sequences.attend(query, start, implementation=name, **options)
        for name in ("gathered", "listed")
    )
    others = np.arange(6) != 3
    np.testing.assert_allclose(listed[others], gathered[others], atol=2e-6)
    assert not np.asarray(listed[3]).any()
    # A row's result does not depend on the others, to the last bit.
    few = sequences.table.copy()
    few[1:] = -1
    sequences.table = few
    alone = sequences.attend(query, start, implementation="listed", **options)
    np.testing.assert_array_equal(alone[0], listed[0])


def test_listed_pages_take_one_token():
    sequences, query = Sequences([14, 9], [0, 0]), draw_query(2, 2)
    with pytest.raises(ValueError, match=r"cannot run as 'listed': rows have 2 tokens"):
        sequences.attend(query, [12, 7], implementation="listed")


def test_tables_are_read_up_to_a_few_widths():
    assert reference._widths(64) == (4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert reference._widths(30) == (4, 8, 12, 16, 20, 24, 28, 30)
    assert reference._widths(3) == (3,)
    for num_columns in range(1, 300):
        widths = reference._widths(num_columns)
        assert widths[-1] == num_columns
        assert len(widths) <= 8 + num_columns.bit_length()


def test_any_number_of_pages_in_use_gives_the_same():
    sequences, query = Sequences([70, 9], [0, 0], num_columns=20), draw_query(2, 1)
    expected = sequences.plain(query, [69, 8])
    for num_pages in (18, 19, 20, 21, 1000):
        found = sequences.attend(query, [69, 8], num_pages=num_pages)
        assert_equal_where_seen(found, expected)


def test_many_scores_are_computed_some_queries_at_a_time(monkeypatch):
    sequences, query = Sequences([22, 7, 28], [0, 0, 0]), draw_query(3, 7)
    start = np.array([15, 0, 21])

    def attend(query):
        return sequences.attend(query, start, function=api.paged_attention)

    def program():
        # Of a function of its own: programs are remembered by function.
        return str(jax.make_jaxpr(lambda query: attend(query))(query))

    # All columns are in use: 3 rows, 2 x 2 heads, 28 slots. Two queries fit.
    at_once, some = "f32[3,2,2,7,28]", "f32[3,2,2,2,28]"
    assert at_once in program()
    monkeypatch.setattr(reference, "MOST_SCORES", 2 * 3 * 4 * 28)
    assert at_once not in program()
    assert some in program()
    assert_equal_where_seen(jax.jit(attend)(query), sequences.plain(query, start))


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_pages_of_eight_bits_are_times_their_scales(dtype, num_tokens):
    sequences, query = Sequences([30, 7], [2, 0]), draw_query(2, num_tokens)
    start, rng, stored, scales = np.array([27, 4]), np.random.default_rng(4), [], []
    for stack in (sequences.keys, sequences.values):
        scale = rng.uniform(0.01, 0.03, size=stack.shape[:-1]).astype(np.float32)
        small = jnp.asarray(np.clip(stack / scale[..., None], -127, 127)).astype(dtype)
        scales.append(jnp.asarray(scale))
        stored.append(small)
        stack[...] = scale[..., None] * np.asarray(small, np.float32)
    expected = sequences.attend(query, start)
    if dtype == "float8_e4m3fn":
        stored = [jax.lax.bitcast_convert_type(x, jnp.uint8) for x in stored]
    sequences.keys, sequences.values = stored
    found = sequences.attend(
        query, start, key_scales=scales[0], value_scales=scales[1], soft_cap=None
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_query_in_bfloat16_gets_bfloat16_within_its_rounding():
    sequences, query = Sequences([28, 7], [0, 0]), draw_query(2, 2)
    expected = sequences.attend(query, [26, 5])
    found = sequences.attend(jnp.asarray(query, jnp.bfloat16), [26, 5])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.03)


def test_pages_of_another_type_are_read_in_that_of_the_query():
    sequences, query = Sequences([28, 7], [0, 0]), draw_query(2, 2)
    expected = sequences.attend(query, [26, 5])
    sequences.keys, sequences.values = (
        jnp.asarray(stack, jnp.bfloat16) for stack in (sequences.keys, sequences.values)
    )
    found = sequences.attend(query, [26, 5])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "The window is 0 tokens; it must be at least 1"),
        ({"soft_cap": -1.0}, "The soft cap is -1.0; it must be positive"),
        ({"implementation": "paged"}, "has no implementation 'paged'"),
        ({"key_scales": 0}, "key_scales came without value_scales. Give both"),
    ],
)
def test_what_cannot_be_attended_is_refused(options, message):
    sequences, query = Sequences([9], [0]), draw_query(1, 1)
    if "key_scales" in options:
        options = {"key_scales": jnp.ones(sequences.keys.shape[:-1])}
    with pytest.raises(ValueError, match=re.escape(message)):
        sequences.attend(query, [8], function=api.paged_attention, **options)


def test_heads_that_do_not_split_are_refused():
    sequences = Sequences([9], [0])
    with pytest.raises(ValueError, match="3 query heads do not split over 2 key heads"):
        sequences.attend(draw_query(1, 1, heads=3), [8])


def test_the_choice_is_explained():
    found = api.explain((8, 2, 4, 6), (2, 60, 2, 4, 6), 9, jnp.float32)
    assert found == (
        "paged attention runs as 'gathered'. Not as 'mosaic': it is for GPUs. Not as"
        " 'listed': rows have 2 tokens, and it takes one."
    )
