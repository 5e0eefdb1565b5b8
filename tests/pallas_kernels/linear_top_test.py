"""Tests of `linear_top`, and of `linear_logprob` with several targets of a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels.linear_logprob import (
    linear_logprob,
    linear_top,
    reference,
    sharded_linear_logprob,
    sharded_linear_top,
)

R, S, D, V, K = 8, 6, 8, 61, 5
COLUMNS = 64
OPTIONS = {"vocab_size": V, "soft_cap": 5.0, "temperature": 0.7}
MESH = (2, 2, 2)
AXES = ("data", "fsdp", "tensor")
LAYOUTS = {
    "columns alone": {"vocab_axes": AXES},
    "fsdp splits both": {
        "row_axes": ("data", "fsdp"),
        "vocab_axes": ("tensor", "fsdp"),
    },
    "places over tensor": {
        "row_axes": ("data", "fsdp"),
        "place_axes": ("tensor",),
        "vocab_axes": ("tensor", "fsdp"),
    },
    "rows alone": {"row_axes": AXES},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[2:]]


def problem():
    """Rows, a kernel whose last columns are padding, and K targets a token."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (R, S, D))
    kernel = jax.random.normal(keys[1], (D, COLUMNS))  # Padding is no zeros here.
    targets = jax.random.randint(keys[2], (R, S, K), 0, V)
    # One token twice, and each target's place in the list counts.
    return hidden, kernel, targets.at[..., 1].set(targets[..., 0])


def flat(x):
    return x.reshape(R * S, *x.shape[2:])


def all_logprobs(hidden, kernel):
    """Of the whole vocabulary, in float64."""
    logits = np.float64(flat(hidden)) @ np.float64(kernel[:, :V])
    logits = 5.0 * np.tanh(logits / 5.0) / 0.7
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def check_top(found, num_top=K):
    logprobs, ids = (np.asarray(x).reshape(R * S, num_top) for x in found)
    expected = all_logprobs(*problem()[:2])
    order = np.argsort(-expected, axis=-1, kind="stable")[:, :num_top]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(
        logprobs, np.take_along_axis(expected, order, axis=-1), atol=2e-5
    )


@pytest.mark.parametrize(
    "cut", [{}, {"chunk_size": 5}, {"chunk_size": 7, "block_size": 11}]
)
def test_the_likeliest_tokens_are_those_of_all_logprobs(cut):
    hidden, kernel, _ = problem()
    call = functools.partial(linear_top, num_top=K, **OPTIONS, **cut)
    check_top(jax.jit(call)(flat(hidden), kernel))


def test_all_tokens_may_be_asked_for_and_no_more():
    hidden, kernel, _ = problem()
    found = linear_top(
        flat(hidden), kernel, num_top=V, chunk_size=16, block_size=8, **OPTIONS
    )
    check_top(found, V)
    np.testing.assert_allclose(np.exp(found[0]).sum(axis=1), 1.0, rtol=1e-5)
    for wrong in (0, V + 1):
        with pytest.raises(ValueError, match=f"num_top is {wrong}"):
            linear_top(flat(hidden), kernel, num_top=wrong, **OPTIONS)


def test_of_equal_tokens_the_lowest_ids_come_first():
    hidden, kernel = jnp.ones((2, 1)), jnp.zeros((1, 10))
    _, ids = linear_top(hidden, kernel, num_top=4, chunk_size=1, block_size=3)
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3]] * 2)


@pytest.mark.parametrize("name", [*list(LAYOUTS)[:2], *SLOW])
def test_devices_of_a_mesh_find_the_same_tokens(name):
    mesh = jax.make_mesh(MESH, AXES, axis_types=(AxisType.Auto,) * 3)
    hidden, kernel, _ = problem()
    call = functools.partial(
        sharded_linear_top,
        num_top=K,
        mesh=mesh,
        chunk_size=8,
        block_size=5,
        **LAYOUTS[name],
        **OPTIONS,
    )
    check_top(jax.jit(call)(hidden, kernel))


def by_definition(hidden, kernel, targets):
    """One target after the other."""
    each = [
        reference.linear_logprob(flat(hidden), kernel, flat(targets)[:, k], **OPTIONS)
        for k in range(K)
    ]
    return jnp.stack([logprobs for logprobs, _ in each], axis=-1), each[0][1]


def weighed(scores):
    """A number with a gradient to every score."""
    logprobs, entropy = scores
    generator = np.random.default_rng(1)
    of_logprobs = generator.normal(size=(R * S, K)).astype(np.float32)
    of_entropy = generator.normal(size=R * S).astype(np.float32)
    flat_logprobs = logprobs.reshape(R * S, K)
    return (flat_logprobs * of_logprobs).sum() + (entropy.ravel() * of_entropy).sum()


@functools.cache
def expected_gradients():
    hidden, kernel, targets = problem()
    loss = lambda h, w: weighed(by_definition(h, w, targets))
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, kernel)


def check_scores(call):
    hidden, kernel, targets = problem()
    logprobs, entropy = jax.jit(call)(hidden, kernel, targets)
    expected = by_definition(hidden, kernel, targets)
    np.testing.assert_allclose(logprobs.reshape(R * S, K), expected[0], atol=2e-5)
    np.testing.assert_allclose(entropy.ravel(), expected[1], atol=2e-5)
    loss = lambda h, w: weighed(call(h, w, targets))
    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, kernel)
    for a, b in zip(found, expected_gradients(), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize(
    "cut",
    [
        {"implementation": "dense"},
        {"implementation": "chunked", "chunk_size": 7},
        {"implementation": "chunked", "chunk_size": 16, "block_size": 11},
    ],
)
def test_several_targets_are_scored_like_each_alone(cut):
    def call(hidden, kernel, targets):
        args = flat(hidden), kernel, flat(targets)
        return linear_logprob(*args, **OPTIONS, **cut)

    check_scores(call)


@pytest.mark.parametrize("name", [*list(LAYOUTS)[:2], *SLOW])
def test_devices_of_a_mesh_score_several_targets(name):
    mesh = jax.make_mesh(MESH, AXES, axis_types=(AxisType.Auto,) * 3)
    layout = dict(LAYOUTS[name], mesh=mesh, chunk_size=8, block_size=5)
    check_scores(functools.partial(sharded_linear_logprob, **layout, **OPTIONS))
