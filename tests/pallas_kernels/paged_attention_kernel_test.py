"""The kernel of paged attention, interpreted: it is the definition, without races."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _dispatch
from pallas_kernels.paged_attention import (
    Partials,
    bench,
    combine,
    explain,
    mosaic_sm90,
    paged_attention,
    paged_attention_in_part,
    tile,
)
from pallas_kernels.testing.interpret import interpreted
from pallas_kernels.testing.measure import largest_error

FEW = bench.Shape(heads=(4, 2, 64), lengths=(100, 30))


def definition(shape, query, table, first_page, start, num_pages, *pages):
    """Attend one query and head at a time, in float64."""
    stacks = [np.asarray(jax.jit(bench.stored)(x), np.float64)[1] for x in pages[:2]]
    for index, scales in enumerate(pages[2:]):
        stacks[index] *= np.asarray(scales, np.float64)[1, ..., None]
    table, query = np.asarray(table), np.asarray(query, np.float64)
    out, group = np.zeros(query.shape), shape.heads[0] // shape.heads[1]
    for row, token, head in np.ndindex(*query.shape[:3]):
        own, keys, values = int(start[row]) + token, [], []
        for column, page in enumerate(table[row, : int(num_pages)]):
            first = (int(first_page[row]) + column) * shape.page_size
            for slot in range(shape.page_size):
                distance = own - first - slot
                is_near = shape.window is None or distance < shape.window
                if page >= 0 and distance >= 0 and is_near:
                    place = page, head // group, slot
                    keys.append(stacks[0][place])
                    values.append(stacks[1][place])
        if keys:
            scores = np.array(keys) @ query[row, token, head] * shape.heads[2] ** -0.5
            if shape.soft_cap is not None:
                scores = shape.soft_cap * np.tanh(scores / shape.soft_cap)
            weights = np.exp(scores - scores.max())
            out[row, token, head] = weights @ np.array(values) / weights.sum()
    return out


def draw(shape, seed=0):
    return jax.jit(functools.partial(bench.inputs, shape))(jax.random.key(seed))


def cut(shape, **changed):
    """Return the blocks of a shape with some changed."""
    default = mosaic_sm90.default_blocks(shape.request)
    return dataclasses.replace(default, **changed)


def run(shape, arrays, blocks=None):
    """Interpret the kernel; return its output and what was checked."""
    attend = functools.partial(bench.attend, shape, "mosaic")
    if blocks := blocks or shape.blocks:
        attend = functools.partial(bench.attend_with, shape, blocks)
    with interpreted() as checks:
        out = attend(*arrays)
    return np.asarray(out, np.float64), checks


def sample(names):
    """Mark what is not in the sample as slow."""
    return [
        pytest.param(name, marks=() if name in names else pytest.mark.slow)
        for name in bench.TINY
    ]


@pytest.mark.parametrize(
    "name",
    sample(
        {
            "a group of 7 in int8, holes",
            "5 tokens of a group of 3 in float8_e4m3fn, moved on",
            "keys in 3 parts, a window, a soft cap",
            "heads of 256",
        }
    ),
)
def test_the_kernel_is_the_definition_and_has_no_races(name):
    shape = bench.TINY[name]
    arrays = draw(shape)
    out, checks = run(shape, arrays)
    assert checks.num_kernels == 1
    assert not checks.has_races
    assert largest_error(out, definition(shape, *arrays)) < 1e-2


@pytest.mark.parametrize(
    "name", ["a group of 7 in int8, holes", "keys in 3 parts, a window, a soft cap"]
)
def test_gathered_pages_say_the_same(name):
    shape = bench.TINY[name]
    arrays = draw(shape)
    gathered = jax.jit(functools.partial(bench.attend, shape, "gathered"))(*arrays)
    assert largest_error(np.asarray(gathered), definition(shape, *arrays)) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("stored", [None, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("page_size", [8, 24, 32, 64, 192])
@pytest.mark.parametrize("options", [{}, {"window": 70, "soft_cap": 5.0}])
def test_any_pages_are_read(dtype, stored, page_size, options):
    if stored is not None and page_size % 32:
        pytest.skip("scales of so few tokens are too small to copy")
    shape = bench.Shape(
        heads=(6, 2, 64),
        lengths=(200, 77),
        num_tokens=3,
        dtype=dtype,
        stored=stored or dtype,
        page_size=page_size,
        **options,
    )
    arrays = draw(shape)
    out, checks = run(shape, arrays)
    assert not checks.has_races
    assert largest_error(out, definition(shape, *arrays)) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 9, 40])
@pytest.mark.parametrize("num_heads", [1, 2, 7, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("splits", [1, 3])
def test_any_tile_is_computed(num_tokens, num_heads, head_dim, splits):
    shape = bench.Shape(
        heads=(num_heads, 1, head_dim), lengths=(170,), num_tokens=num_tokens
    )
    arrays = draw(shape)
    out, checks = run(shape, arrays, cut(shape, splits=splits))
    assert not checks.has_races
    assert largest_error(out, definition(shape, *arrays)) < 1e-2


@pytest.fixture(params=["keys", "values"])
def nobody_waits(request, monkeypatch):
    """Leave out one of the two waits of a step."""
    waits, left_out = iter(("keys", "values")), request.param
    wait = tile._await

    def forget(arrived):
        if next(waits) != left_out:
            wait(arrived)

    monkeypatch.setattr(tile, "_await", forget)


@pytest.mark.usefixtures("nobody_waits")
def test_copies_that_nobody_waits_for_are_races():
    # Five copies: the interpreter takes those of more for each other's.
    shape = bench.Shape(heads=(4, 1, 64), lengths=(60,), stored=jnp.int8, page_size=64)
    _, checks = run(shape, draw(shape), cut(shape, keys=64))
    assert checks.has_races


@pytest.mark.usefixtures("nobody_waits")
def test_copies_over_those_that_nobody_waits_for_are_refused():
    # The interpreter does not see what matrix units read, as they do here at once, but
    # it does see the third step come to the place of the first.
    shape = dataclasses.replace(FEW, lengths=(180,))
    with pytest.raises(Exception, match="no threads observed phase 0"):
        run(shape, draw(shape), cut(shape, keys=64, stages=2, splits=1))


def test_pages_that_no_query_sees_are_not_read():
    shape = dataclasses.replace(FEW, lengths=(200, 120), window=40)
    query, table, first_page, start, num_pages, *pages = draw(shape)
    expected = definition(shape, query, table, first_page, start, num_pages, *pages)
    # Of the first row, positions 160 to 199; of the second one, 80 to 119.
    unseen = np.concatenate([table[0, :5], table[1, :2], table[1, 4:]])
    pages = [x.at[:, unseen].set(jnp.nan) for x in pages]
    # And what is after the columns in use is no page at all.
    table = jnp.pad(table, ((0, 0), (0, 2)), constant_values=10**6)
    out, _ = run(shape, (query, table, first_page, start, num_pages, *pages))
    assert largest_error(out, expected) < 1e-2


def test_what_sees_nothing_is_finite():
    query, table, first_page, start, num_pages, *pages = draw(FEW)
    # A row without pages, and one whose pages come after its queries.
    table, first_page = table.at[0].set(-1), first_page.at[1].set(9)
    arrays = (query, table, first_page, start, num_pages, *pages)
    out, _ = run(FEW, arrays)
    assert np.isfinite(out).all()
    assert not out[1].any()


def test_a_row_says_the_same_beside_any_others():
    query, table, first_page, start, num_pages, *pages = draw(FEW)
    both, _ = run(FEW, (query, table, first_page, start, num_pages, *pages))
    alone, _ = run(
        dataclasses.replace(FEW, lengths=FEW.lengths[1:]),
        (query[1:], table[1:], first_page[1:], start[1:], num_pages, *pages),
    )
    np.testing.assert_array_equal(both[1:], alone)


def in_part(shape, implementation, *arrays):
    query, table, first_page, start, num_pages, *pages = arrays
    return paged_attention_in_part(
        query,
        *pages,
        layer=jnp.int32(1),
        table=table,
        first_page=first_page,
        start=start,
        num_pages=num_pages,
        window=shape.window,
        implementation=implementation,
    )


def test_parts_by_the_kernel_are_those_by_the_definition():
    shape = dataclasses.replace(FEW, lengths=(190, 75), num_tokens=2)
    arrays = draw(shape)
    with interpreted() as checks:
        found = in_part(shape, None, *arrays)
    assert checks.num_kernels == 1
    assert largest_error(found, in_part(shape, "gathered", *arrays)) < 1e-2
    out = np.asarray(combine(found))
    assert largest_error(out, definition(shape, *arrays)) < 1e-2


def test_queries_may_stand_before_the_first_page_that_is_here():
    # Positions 92 to 99; the pages here begin at 96, and the window has no limit.
    shape = bench.Shape(
        heads=(2, 1, 64), lengths=(100,), num_tokens=8, window=2**31 - 1, first_page=3
    )
    arrays = draw(shape)
    with interpreted():
        found = in_part(shape, "mosaic", *arrays)
    expected = in_part(shape, "gathered", *arrays)
    assert (np.asarray(found.maximum[:, :4]) < -1e29).all()
    seen = lambda partials: jax.tree.map(lambda x: x[:, 4:], partials)
    assert largest_error(seen(found), seen(expected)) < 1e-2


def test_sequences_over_devices_are_put_together():
    # Over four devices, two columns each; the last of row 1 have no page.
    shape = dataclasses.replace(FEW, lengths=(250, 100), num_tokens=3, window=160)
    query, table, first_page, start, _, *pages = draw(shape)
    expected = definition(shape, query, table, first_page, start, 8, *pages)
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("sequence",))
    spec = jax.sharding.PartitionSpec

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(spec(None, "sequence"), spec("sequence")),
        out_specs=spec(),
    )
    def attend(table, first_page):
        arrays = query, table, first_page[0], start, jnp.int32(2), *pages
        return combine(in_part(shape, None, *arrays), axis_name="sequence")

    firsts = 2 * jnp.arange(4, dtype=jnp.int32)[:, None] + first_page[None]
    out = np.asarray(attend(table, firsts))
    assert largest_error(out, expected) < 1e-2


def test_parts_count_as_much_as_they_saw():
    # Scores 0 and log 3 in one part, log 4 in the other: weights 1/8, 3/8, 4/8.
    one = lambda x: jnp.full((1, 1, 1), x, jnp.float32)
    first = Partials(
        maximum=one(np.log(3)),
        total=one(4 / 3),
        weighted=jnp.array([[[[1 / 3, 1.0]]]], jnp.float32),
    )
    second = Partials(
        maximum=one(np.log(4)),
        total=one(1.0),
        weighted=jnp.array([[[[0.0, 2.0]]]], jnp.float32),
    )
    both = jax.tree.map(lambda *x: jnp.stack(x), first, second)
    np.testing.assert_allclose(combine(both)[0, 0, 0], [1 / 8, 3 / 8 + 1], rtol=1e-6)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.int8, jnp.uint8])
@pytest.mark.parametrize("num_tokens", [1, 512])
@pytest.mark.parametrize("model", sorted(bench.MODELS))
def test_models_attend_by_the_kernel_on_hopper(model, num_tokens, stored):
    num_heads, num_kv_heads, head_dim = bench.MODELS[model]
    found = explain(
        (64, num_tokens, num_heads, head_dim),
        (32, 8192, num_kv_heads, 32, head_dim),
        128,
        jnp.bfloat16,
        pages_dtype=stored,
        device=_dispatch.H200,
        window="traced",
        is_scaled=stored != jnp.bfloat16,
    )
    assert found == "paged attention runs as 'mosaic'."


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"dtype": jnp.float32}, "queries are float32, which matrix units would round"),
        ({"pages_dtype": jnp.float16}, "pages are float16, and to queries of bfloat16"),
        ({"head_dim": 96}, "heads have 96 dimensions, and it takes 64, 128 and 256"),
        ({"page_size": 12}, "pages have 12 tokens, and it takes multiples of 8"),
        (
            {"page_size": 16, "pages_dtype": jnp.int8, "is_scaled": True},
            "pages with scales have 16 tokens, and it takes multiples of 32",
        ),
        ({"is_scaled": True}, "pages of bfloat16 have scales, and it takes them with"),
        ({"capability": (8, 0)}, "it needs a GPU of compute capability 9, Hopper"),
    ],
)
def test_the_kernel_says_what_it_cannot_do(changed, reason):
    head_dim, page_size = changed.get("head_dim", 64), changed.get("page_size", 32)
    dtype = changed.get("dtype", jnp.bfloat16)
    device = _dispatch.Device(
        platform="gpu", compute_capability=changed.get("capability", (9, 0))
    )
    arguments = ((2, 1, 4, head_dim), (2, 60, 2, page_size, head_dim), 9, dtype)
    options = {
        "pages_dtype": changed.get("pages_dtype"),
        "is_scaled": changed.get("is_scaled", False),
        "device": device,
    }
    found = explain(*arguments, **options)
    assert "runs as 'gathered'" in found
    assert f"Not as 'mosaic': {reason}" in found
    with pytest.raises(ValueError, match=f"cannot run as 'mosaic': {reason}"):
        explain(*arguments, **options, implementation="mosaic")


def test_a_traced_scale_and_window_serve_the_kernel():
    shape = dataclasses.replace(FEW, lengths=(60,), window=40)
    query, table, first_page, start, num_pages, *pages = draw(shape)

    def attend(window, scale):
        return paged_attention(
            query,
            *pages,
            layer=jnp.int32(1),
            table=table,
            first_page=first_page,
            start=start,
            num_pages=num_pages,
            window=window,
            scale=scale,
            implementation="mosaic",
        )

    with interpreted():
        traced = np.asarray(jax.jit(attend)(jnp.int32(40), jnp.float32(64**-0.5)))
    out, _ = run(shape, (query, table, first_page, start, num_pages, *pages))
    np.testing.assert_array_equal(traced, out)
