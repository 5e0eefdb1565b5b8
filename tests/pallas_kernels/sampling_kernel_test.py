"""Tests of `pallas_kernels/sampling/mosaic.py`, interpreted on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _dispatch, sampling
from pallas_kernels.linear_logprob import is_kept
from pallas_kernels.sampling import bench, mosaic
from pallas_kernels.sampling.filters import Filters, Request
from pallas_kernels.sampling.sets import ids_of_bits, pack
from pallas_kernels.testing.interpret import interpreted
from pallas_kernels.testing.measure import largest_error

TINY = {case.name: case for case in bench.cases() if case.is_tiny}
FAST = {
    "blocks that fill no tile, top-k",
    "equal logits, a union",
    "one certain token, min-p",
    "impossible tokens of bfloat16, no filter",
}
BLOCKS = mosaic.Blocks(warpgroups=2, tiles=4, pivots=6)


def slow_unless(is_fast: bool):
    return () if is_fast else pytest.mark.slow


def run_kernel(logits, uniforms, *, kept=None, **filters):
    """Draw by the kernel, interpreted: the draw, and what the interpreter found."""
    request = Request(
        shape=logits.shape,
        dtype=logits.dtype,
        device=_dispatch.H200,
        filters=Filters(**filters).of(logits.shape[1]),
        kept=kept,
    )
    run = lambda *x: mosaic.sample(request, *x, None, blocks=BLOCKS)
    with interpreted() as checks:
        found = jax.tree.map(np.asarray, jax.jit(run)(logits, uniforms))
    assert checks.num_kernels == 1
    assert not checks.has_races
    return found


def exact(logits, *, top_k=0, top_p=1.0, min_p=0.0, union=False, temperature=1.0):
    """The probabilities of each row by sorting, in float64."""
    found = []
    for row in np.float64(logits) / temperature:
        weights = np.exp(row - row.max())
        weights[weights < np.finfo(np.float32).tiny] = 0
        order = np.argsort(-weights, kind="stable")
        mask = weights > 0
        if top_k:
            mask[order[top_k:]] = False
        mass = weights if union else weights * mask
        before = np.cumsum(mass[order]) - mass[order]
        mask[order[before >= top_p * mass.sum()]] &= top_p == 1
        mask &= weights >= min_p
        found.append(weights * mask / (weights * mask).sum())
    return np.stack(found)


def entropies(p):
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=slow_unless(n in FAST)) for n in TINY]
)
def test_the_kernel_draws_as_the_definition_says_without_races(name):
    case = TINY[name]
    inputs = case.inputs(jax.random.key(0))
    expected = jax.tree.map(np.asarray, case.reference(*inputs))
    with interpreted() as checks:
        run = jax.jit(case.implementations["mosaic"])
        found = jax.tree.map(np.asarray, run(*inputs))
    assert checks.num_kernels == 1
    assert not checks.has_races
    assert largest_error(found, expected) <= 1e-5
    bisected = jax.jit(case.implementations["bisection"])(*inputs)
    assert largest_error(bisected, expected) <= 1e-5


FILTERS = {
    "top-p": {"top_p": 0.7, "temperature": 0.6},
    "top-k of all but one": {"top_k": 519},
    "top-k and top-p": {"top_k": 400, "top_p": 0.9},
    "union": {"top_k": 300, "top_p": 0.5, "union": True},
    "tiny top-p": {"top_p": 1e-6},
    "min-p": {"min_p": 0.2, "top_p": 0.95},
    "nothing": {},
}
KINDS = {
    "normal": lambda key: 3 * jax.random.normal(key, (1, 520)),
    "tied": lambda key: jnp.round(jax.random.normal(key, (1, 520))),
    "equal": lambda key: jnp.zeros((1, 520)),
    "certain": lambda key: jax.random.normal(key, (1, 520)).at[0, 519].set(500.0),
    "impossible": lambda key: jnp.full((1, 520), -jnp.inf).at[0, 3::100].set(-2.5),
}
FAST_PAIRS = {("top-p", "tied"), ("top-k and top-p", "impossible")}


@pytest.mark.parametrize(
    ("filters", "kind"),
    [
        pytest.param(f, k, marks=slow_unless((f, k) in FAST_PAIRS))
        for f in FILTERS
        for k in KINDS
    ],
)
def test_kept_set_logprob_and_entropy_are_those_of_float64(filters, kind):
    logits, options = KINDS[kind](jax.random.key(3)), FILTERS[filters]
    uniforms = jax.random.uniform(jax.random.key(4), (1, 2))
    found = run_kernel(logits, uniforms, kept="bits", **options)
    p = exact(logits, **options)
    if options:
        np.testing.assert_array_equal(is_kept(jnp.asarray(found.kept), 520), p > 0)
    np.testing.assert_allclose(found.logprobs, np.log(p[0, found.tokens]), atol=1e-5)
    np.testing.assert_allclose(found.entropy, entropies(p), atol=1e-5)
    # Where rounding decides between two tokens, both are right; no seed here is so.
    bisected = sampling.sample(
        logits, uniforms, kept="bits", implementation="bisection", **options
    )
    np.testing.assert_array_equal(found.tokens, bisected.tokens)


def test_a_missing_barrier_is_a_race():
    logits = jax.random.normal(jax.random.key(0), (1, 512))
    draw = lambda x: mosaic.run(
        x,
        jnp.full((1, 2), 0.5),
        Filters(),
        BLOCKS,
        has_bits=False,
        has_draw=True,
        has_barrier=False,
    )
    with interpreted() as checks:
        jax.block_until_ready(jax.jit(draw)(logits))
    assert checks.has_races


@pytest.mark.slow
def test_the_kernel_s_draws_come_as_often_as_their_probability_says():
    # 600 rows of 6 likely tokens, two of them in one block: by chi-square with five
    # degrees of freedom, 25.7 is passed once in ten thousand.
    p = np.array([0.35, 0.25, 0.2, 0.1, 0.06, 0.04])
    places = np.array([3, 9, 130, 300, 450, 511])
    row = np.full((1, 512), -np.inf, np.float32)
    row[0, places] = np.log(p)
    logits = jnp.asarray(np.tile(row, (600, 1)))
    uniforms = jax.random.uniform(jax.random.key(8), (600, 2))
    found = run_kernel(logits, uniforms)
    counts = (found.tokens[:, None] == places).sum(0)
    assert counts.sum() == 600
    assert np.sum((counts - 600 * p) ** 2 / (600 * p)) < 25.7


@pytest.mark.parametrize("vocab_size", [128256, 151936, 152064])
def test_an_h200_takes_the_kernel_at_the_vocabularies_of_models(vocab_size):
    for options in ({}, {"top_k": 50}, {"top_p": 0.95}):
        text = sampling.explain((64, vocab_size), device=_dispatch.H200, **options)
        assert text.startswith("sampling runs as 'mosaic'.")


def test_a_cpu_bisects_and_says_why():
    text = sampling.explain((64, 128256), top_p=0.9)
    assert text.startswith("sampling runs as 'bisection'. Not as 'mosaic': it runs on")
    with pytest.raises(ValueError, match="cannot run as 'mosaic': it runs on GPUs"):
        sampling.sample(
            jnp.zeros((1, 8)), jnp.zeros((1, 2)), implementation="mosaic", kept=None
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": (1, 300_000)}, "300000 tokens, more than 262144"),
        ({"dtype": jnp.float16}, "logits are float16"),
        (
            {"device": dataclasses.replace(_dispatch.H200, compute_capability=(7, 5))},
            "compute capability 8.0",
        ),
    ],
)
def test_what_the_kernel_cannot_do_is_said(change, reason):
    request = Request(shape=(1, 512), dtype=jnp.float32, device=_dispatch.H200)
    assert mosaic.unsupported(request) is None
    assert reason in mosaic.unsupported(dataclasses.replace(request, **change))


def test_filters_out_of_range_and_ids_of_large_sets_are_refused():
    logits, uniforms = jnp.zeros((1, 600)), jnp.zeros((1, 2))
    for options, message in (
        ({"top_p": 0.0}, "top_p is 0.0; it must be in"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"top_k": 300, "kept": "ids"}, "top_k is 300 of 600 tokens; it takes 1 to"),
        ({"kept": "ids"}, "top_k is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling.sample(logits, uniforms, **options)


def test_words_give_the_ids_of_their_bits_in_order():
    mask = np.zeros((2, 75), bool)
    mask[0, [0, 31, 32, 74]] = True
    mask[1, 40] = True
    found = ids_of_bits(pack(jnp.asarray(mask)), 3, missing=-1)
    np.testing.assert_array_equal(found, [[0, 31, 32], [40, -1, -1]])
