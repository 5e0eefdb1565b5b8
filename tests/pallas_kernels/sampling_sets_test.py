"""Tests of `pallas_kernels/sampling/sets.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels._dispatch import Device
from pallas_kernels.linear_logprob import is_kept
from pallas_kernels.sampling import sets
from pallas_kernels.sampling.sets import fewest, most_likely, pack

IMPLEMENTATIONS = ("direct", "blocks")

find = jax.jit(most_likely, static_argnames=("count", "implementation"))


def random_logits(num_rows: int = 5, vocab_size: int = 1003):
    return 3.0 * jax.random.normal(jax.random.key(0), (num_rows, vocab_size))


def sorted_ids(logits, count: int):
    """The definition: by logit, the highest first, and of equals the lower id."""
    return np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, :count]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [1, 50, pytest.param(1003, marks=pytest.mark.slow)])
def test_most_likely_are_the_first_of_the_sorted_tokens(count, implementation):
    logits = random_logits()
    # The other half has many ties: about ten values.
    logits = jnp.concatenate([logits, jnp.abs(jnp.round(logits))])
    found, ids = find(logits, count, implementation=implementation)
    np.testing.assert_array_equal(ids, sorted_ids(logits, count))
    np.testing.assert_array_equal(found, np.take_along_axis(logits, ids, axis=1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fewer_tokens_than_asked_for_leave_places_of_probability_zero(implementation):
    # Tokens 3 and 90 alone are possible.
    logits = jnp.full((1, 100), -jnp.inf).at[0, jnp.array([3, 90])].set(1.0)
    found, ids = find(logits, 4, implementation=implementation)
    np.testing.assert_array_equal(found, [[1, 1, -np.inf, -np.inf]])
    np.testing.assert_array_equal(ids[0, :2], [3, 90])
    assert np.all((ids >= 0) & (ids < 100))


def test_equal_tokens_are_taken_by_the_lower_id_across_blocks():
    # All equal but the last: it comes first, then the lowest ids.
    logits = jnp.zeros((1, 4096)).at[0, -1].set(1.0)
    _, ids = find(logits, 20, implementation="blocks")
    np.testing.assert_array_equal(ids, [[4095, *range(19)]])


def test_blocks_of_logits_cut_over_devices_give_the_tokens_of_one_device():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    logits = random_logits(4, 1024)
    cut = jax.device_put(logits, NamedSharding(mesh, P("data", "tensor")))
    found, expected = (find(x, 30, implementation="blocks") for x in (cut, logits))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def sorted_widths(jaxpr) -> list[int]:
    """Return the widths of everything that a program sorts, in its loops too."""
    widths = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("sort", "top_k", "approx_top_k"):
            widths.append(equation.invars[0].aval.shape[-1])
        for inner in core.jaxprs_in_params(equation.params):
            widths += sorted_widths(inner)
    return widths


@pytest.mark.parametrize(
    ("implementation", "width"), [("direct", 4096), ("blocks", 30)]
)
def test_blocks_sort_only_what_they_return(implementation, width):
    program = jax.make_jaxpr(
        lambda x: most_likely(x, 30, implementation=implementation)
    )(jnp.zeros((2, 4096)))
    assert sorted_widths(program.jaxpr) == [width]


@pytest.mark.parametrize(
    ("platform", "vocab_size", "width"),
    [("cpu", 4096, 4096), ("cpu", 128256, 30), ("gpu", 4096, 30)],
)
def test_only_a_cpu_sorts_and_only_a_small_vocabulary(
    platform, vocab_size, width, monkeypatch
):
    monkeypatch.setattr(sets, "device", lambda: Device(platform=platform))
    program = jax.make_jaxpr(lambda x: most_likely(x, 30))(jnp.zeros((2, vocab_size)))
    assert sorted_widths(program.jaxpr) == [width]


def test_fewest_reach_a_sum_with_the_largest_weights_first():
    # 0.5 + 0.25 < 0.8: one of the two tokens of 0.1 is needed, the first. In the other
    # row 0.5 alone is enough.
    weights = jnp.array([[0.1, 0.5, 0.1, 0.25, 0.0], [0.1, 0.5, 0.1, 0.25, 0.0]])
    found = fewest(weights, weights, jnp.array([0.8, 0.5]))
    expected = [[True, True, False, True, False], [False, True, False, False, False]]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("parts", [3, 4, 8])
def test_fewest_are_the_same_however_many_parts_a_pass_tells_apart(parts):
    weights = jnp.exp(random_logits() - 12)
    weights = jnp.concatenate([weights, jnp.round(weights, 1), jnp.ones((1, 1003))])
    weights = jnp.minimum(weights, 1.0)
    for share in (0.01, 0.6, 1.0):
        enough = share * jnp.sum(weights, axis=-1)
        expected = fewest(weights, weights, enough, parts=2)
        found = fewest(weights, weights, enough, parts=parts)
        np.testing.assert_array_equal(found, expected)


def test_fewest_never_mark_a_weight_of_zero():
    weights = jnp.array([[0.0, 1.0, 0.0]])
    found = fewest(weights, jnp.ones((1, 3)), jnp.array([3.0]))
    np.testing.assert_array_equal(found, [[False, True, False]])


def test_packed_bits_are_the_mask_again():
    mask = np.random.default_rng(0).random((3, 75)) < 0.4
    bits = pack(jnp.asarray(mask))
    assert (bits.shape, bits.dtype) == ((3, 3), jnp.uint32)
    np.testing.assert_array_equal(is_kept(bits, 75), mask)
