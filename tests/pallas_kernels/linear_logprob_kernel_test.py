"""Tests of `pallas_kernels/linear_logprob/mosaic_sm90.py`, interpreted on a CPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _dispatch
from pallas_kernels.linear_logprob import (
    api,
    explain,
    linear_logprob,
    linear_scores,
    mosaic_sm90,
    reference,
    tiles_sm90,
)
from pallas_kernels.linear_logprob.request import Request
from pallas_kernels.linear_logprob.tiles_sm90 import Blocks, Counted
from pallas_kernels.testing.interpret import interpreted
from tests.pallas_kernels.scoring import exact, pack, relative_error

H200 = _dispatch.H200


@dataclasses.dataclass(frozen=True)
class Problem:
    """Arrays, and what of the vocabulary counts."""

    hidden: jax.Array
    kernel: jax.Array
    targets: jax.Array
    weights: np.ndarray
    mask: np.ndarray
    kept: jax.Array | None
    vocab_size: int


def problem(
    num_tokens: int,
    width: int,
    num_columns: int,
    *,
    form: str = "none",
    num_padding: int = 0,
    dtype: Any = jnp.bfloat16,
    kernel_dtype: Any = jnp.float32,
) -> Problem:
    """Return random arrays whose first rows are of unpleasant kinds.

    Row 0 has equal logits, row 1 logits up to some 10⁴, row 2 an impossible target if
    there are sets, and row 3 an empty set.
    """
    rng = np.random.default_rng(num_tokens + num_columns)
    vocab_size = num_columns - num_padding
    hidden = rng.normal(size=(num_tokens, width)) * 0.3
    hidden[0], hidden[1] = 0.0, hidden[1] * 3000
    kernel = jnp.asarray(rng.normal(size=(width, num_columns)), dtype)
    targets = rng.integers(0, vocab_size, num_tokens)
    mask = np.ones((num_tokens, vocab_size), bool)
    kept = None
    if form != "none":
        mask = rng.random(mask.shape) < 0.1
        mask[np.arange(num_tokens), targets] = True
        mask[2, targets[2]], mask[2, targets[2] - 1] = False, True
        mask[3] = False
        kept = jnp.asarray(pack(mask) if form == "bits" else ids_of(mask))
        mask[3] = True
    counts = np.zeros((num_tokens, num_columns), bool)
    counts[:, :vocab_size] = mask
    return Problem(
        hidden=jnp.asarray(hidden, dtype),
        kernel=kernel.astype(kernel_dtype),
        targets=jnp.asarray(targets, jnp.int32),
        weights=rng.normal(size=(3, num_tokens)).astype(np.float32),
        mask=counts,
        kept=kept,
        vocab_size=vocab_size,
    )


def ids_of(mask: np.ndarray) -> np.ndarray:
    """Return sets as ids, padded with -1; the first one of each is there twice."""
    ids = np.full((len(mask), mask.sum(-1).max() + 1), -1, np.int32)
    for row, kept in zip(ids, mask, strict=True):
        found = np.flatnonzero(kept)
        found = np.append(found, found[:1])
        row[: len(found)] = found
    return ids


def loss(hidden, kernel, problem: Problem, **options):
    """Return a weighted sum of all scores that are finite, and the scores."""
    scores = linear_scores(
        hidden,
        kernel,
        problem.targets,
        kept=problem.kept,
        vocab_size=problem.vocab_size,
        **options,
    )
    logprobs = jnp.where(scores.logprobs == -jnp.inf, 0.0, scores.logprobs)
    terms = (logprobs, scores.entropy, scores.log_normalizer)
    weighted = zip(problem.weights, terms, strict=True)
    return sum(jnp.sum(w * x) for w, x in weighted), scores


def check(problem: Problem, *, temperature=0.7, soft_cap=None, **options) -> None:
    """Compare scores and gradients of the interpreted kernel with float64."""
    logits = {"temperature": temperature, "soft_cap": soft_cap}
    with interpreted() as checks:
        function = functools.partial(loss, problem=problem, **logits, **options)
        found = jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(
            problem.hidden, problem.kernel
        )
        ((_, scores), grads) = jax.block_until_ready(found)
    assert checks.num_kernels >= 2
    assert not checks.has_races
    expected = exact(
        problem.hidden,
        problem.kernel,
        problem.targets,
        problem.weights,
        mask=problem.mask,
        **logits,
    )
    for name in scores._fields:
        error = relative_error(getattr(scores, name), getattr(expected, name))
        assert error < 1e-5, name
    assert grads[0].dtype == problem.hidden.dtype
    assert grads[1].dtype == problem.kernel.dtype
    # The gradient to the logits is rounded to 16 bits, and so is that to hidden states.
    assert relative_error(grads[0], expected.hidden_grad) < 1e-2
    assert relative_error(grads[1], expected.kernel_grad) < 1e-2


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        # Tokens and columns that no tile divides; the second tile of columns is cut.
        ({"num_tokens": 100, "num_columns": 300}, {}),
        # Blocks that overlap, one of them all padding, and chunks.
        (
            {"num_tokens": 50, "num_columns": 320, "form": "ids", "num_padding": 70},
            {"block_size": 64, "chunk_size": 32, "soft_cap": 30.0},
        ),
        pytest.param(
            {"num_tokens": 8, "num_columns": 576, "kernel_dtype": jnp.bfloat16},
            {"soft_cap": 5.0},
            marks=slow,
        ),
        pytest.param(
            {"num_tokens": 300, "num_columns": 512, "form": "bits"}, {}, marks=slow
        ),
        pytest.param(
            {"num_tokens": 5, "num_columns": 64, "dtype": jnp.float16, "form": "ids"},
            {},
            marks=slow,
        ),
        pytest.param(
            {"num_tokens": 130, "num_columns": 333, "form": "bits", "width": 320},
            {"block_size": 128, "temperature": 1.0},
            marks=slow,
        ),
        pytest.param(
            {"num_tokens": 70, "num_columns": 96, "form": "bits", "num_padding": 1},
            {"temperature": 3.0},
            marks=slow,
        ),
    ],
)
def test_interpreted_kernel_agrees_with_float64(shape, options):
    check(problem(**{"width": 64} | shape), **options)


@pytest.mark.parametrize(
    "blocks",
    [
        Blocks(rows=64, columns=64, stages=2, group=1),
        pytest.param(Blocks(rows=128, columns=128, group=2), marks=slow),
        pytest.param(Blocks(rows=64, columns=192, depth=128), marks=slow),
    ],
)
def test_sizes_of_the_kernel_change_nothing(blocks, monkeypatch):
    monkeypatch.setattr(mosaic_sm90, "default_blocks", lambda request: blocks)
    check(problem(140, 192, 192, form="bits"))


def test_gradients_are_finite_differences_of_the_scores():
    # On a grid of 2⁻⁵, with steps of as much, bfloat16 rounds nothing.
    rng, step = np.random.default_rng(3), 2.0**-5
    given = problem(16, 64, 64)
    at = [rng.integers(-16, 17, shape) * step for shape in ((16, 64), (64, 64))]
    along = [rng.integers(-1, 2, x.shape) * step for x in at]

    def moved(which: int, steps: int) -> tuple[jax.Array, jax.Array]:
        hidden, kernel = (x + steps * (i == which) * along[i] for i, x in enumerate(at))
        return jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(kernel, jnp.float32)

    with interpreted(detect_races=False):
        score = jax.jit(lambda h, k: loss(h, k, given)[0])
        grads = jax.jit(jax.grad(score, argnums=(0, 1)))(*moved(0, 0))
        for i in (0, 1):
            difference = float(score(*moved(i, 1)) - score(*moved(i, -1)))
            slope = np.sum(np.asarray(grads[i], np.float64) * along[i])
            assert slope == pytest.approx(difference / 2, rel=0.02)


def plant(monkeypatch, name: str, which: int) -> None:
    """Leave out one call of a kind, the first one traced being number 0."""
    true, calls = getattr(tiles_sm90.plgpu, name), []

    def call(*args, **kwargs):
        calls.append(args)
        return None if len(calls) == which + 1 else true(*args, **kwargs)

    monkeypatch.setattr(tiles_sm90.plgpu, name, call)


def sums_of(given: Problem, blocks: Blocks) -> jax.Array:
    kernel = given.kernel.astype(jnp.bfloat16)
    return jax.block_until_ready(
        mosaic_sm90.sums(
            given.hidden,
            kernel,
            given.targets,
            Counted(),
            temperature=1.0,
            soft_cap=None,
            blocks=blocks,
        )
    )


@pytest.mark.parametrize(
    "which",
    [0, 1, 2],
    ids=["copies wait until used", "the last ones too", "products wait until filled"],
)
def test_a_missing_wait_at_a_barrier_is_found(monkeypatch, which):
    # The interpreter does not check what wgmma reads; it does see that a barrier went
    # on twice while nobody looked.
    plant(monkeypatch, "barrier_wait", which)
    with pytest.raises(Exception, match=r"phase \d"), interpreted():
        sums_of(problem(64, 256, 64), Blocks(columns=64, stages=2))


def test_a_missing_wait_for_what_is_written_is_a_race(monkeypatch):
    plant(monkeypatch, "wait_smem_to_gmem", 2)
    given = problem(64, 64, 128)
    rows = [jnp.zeros(64), jnp.ones(64), jnp.ones(64)]
    with interpreted() as checks:
        jax.block_until_ready(
            mosaic_sm90.logit_gradient(
                given.hidden,
                given.kernel.astype(jnp.bfloat16),
                given.targets,
                Counted(),
                rows,
                temperature=1.0,
                soft_cap=None,
                blocks=Blocks(columns=128),
            )
        )
    assert checks.has_races


def test_words_of_some_columns_are_those_columns_of_the_sets():
    rng = np.random.default_rng(0)
    mask = rng.random((6, 150)) < 0.3
    mask[2] = False  # Empty: the whole vocabulary.
    for kept in (pack(mask), ids_of(mask)):
        kept = jnp.asarray(kept)
        for first, width, left_out in [(0, 150, 0), (32, 64, 3), (45, 110, 40)]:
            words = reference.words_between(
                kept, first, width, 150, num_left_out=left_out
            )
            expected = np.array(reference.is_kept_between(kept, first, width, 150))
            expected[:, :left_out] = False
            np.testing.assert_array_equal(words, pack(expected))


def request(**changes: Any) -> Request:
    numbers = {"num_tokens": 8192, "width": 4096, "num_columns": 128256}
    kinds = {"dtype": jnp.bfloat16, "kernel_dtype": jnp.float32, "device": H200}
    arguments: dict[str, Any] = numbers | kinds | changes
    return Request(**arguments)


def test_reasons_say_what_the_kernel_cannot_do():
    assert mosaic_sm90.unsupported(request()) is None
    for changes, reason in [
        ({"dtype": jnp.float32}, "float32, and it multiplies bfloat16 or float16"),
        ({"width": 100}, "64 wide, and the width is 100"),
        ({"device": _dispatch.Device(platform="cpu")}, "this is a cpu"),
        (
            {
                "device": _dispatch.Device(
                    platform="gpu", kind="NVIDIA A100", compute_capability=(8, 0)
                )
            },
            r"that of NVIDIA A100 is \(8, 0\)",
        ),
    ]:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(mosaic_sm90.unsupported(request(**changes)))


def test_choice_is_explained():
    shapes = (8192, 4096), (4096, 128256)
    assert explain(*shapes, jnp.bfloat16, device=H200) == (
        "linear_logprob runs as 'mosaic'."
    )
    said = explain(*shapes, jnp.float32, device=H200)
    assert said.startswith("linear_logprob runs as 'chunked'. Not as 'mosaic': ")
    assert said.endswith("128256 columns are more than a block of 4096.")
    cut = explain(*shapes, jnp.bfloat16, device=H200, is_cut=True)
    assert "sharded_linear_logprob runs it on each" in cut
    with pytest.raises(ValueError, match="cannot run as 'mosaic'"):
        given = problem(4, 64, 64)
        linear_logprob(
            given.hidden, given.kernel, given.targets, implementation="mosaic"
        )


def test_blocks_cover_the_columns_evenly():
    # 128256 columns in 8 blocks are 16032 each; copies take whole 64: 16064.
    assert api.even_block_size(128256, 16384) == 16064
    # One block of 16032 would have to be padded: two of 8064 overlap by 96.
    assert api.even_block_size(16032, 16384) == 8064
    assert api.even_block_size(128, 4096) == 128


def test_memory_bounds_what_is_looked_at_together():
    many = {"num_tokens": 65536}
    forward, backward = api.mosaic_cuts(request(**many))
    # No logits: all tokens at once, and copies of 4096 · 16064 · 2 bytes, 125 MiB.
    assert forward[:2] == (65536, 16064)
    # Gradients to logits of 8192 · 4032 · 2 bytes, 63 MiB.
    assert backward[:2] == (8192, 4032)
    # A bfloat16 kernel is read where it is; bits of sets are 4008 words a token.
    ready = {"kernel_dtype": jnp.bfloat16, "has_sets": True}
    forward, _ = api.mosaic_cuts(request(**many, **ready))
    assert forward[:2] == (2**26 // (4 * 4008), None)
