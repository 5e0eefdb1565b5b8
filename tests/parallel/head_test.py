"""Tests of `realjax/parallel/head.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.parallel.allocation import Allocation
from realjax.parallel.head import linear_logprob_for
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings
from realjax.rl.logprobs import token_logprobs

R, S, D, V = 8, 6, 16, 61


def arguments(num_columns: int):
    """Return rows and a kernel whose columns past the vocabulary are not zero."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (R, S, D))
    kernel = jax.random.normal(keys[1], (D, V))
    kernel = jnp.pad(kernel, ((0, 0), (0, num_columns - V)), constant_values=5.0)
    tokens = jax.random.randint(keys[2], (R, S), 0, V)
    segments = jnp.where(jnp.arange(S)[None, :] < 4, 1, 2) * jnp.ones((R, 1), jnp.int32)
    return hidden, kernel, tokens, segments


def gradients(linear_logprob=None, num_columns=V, **jit_options):
    def loss(hidden, kernel, tokens, segments):
        logprobs, entropy = token_logprobs(
            hidden,
            kernel,
            tokens,
            segments,
            temperature=0.7,
            soft_cap=4.0,
            vocab_size=V,
            linear_logprob=linear_logprob,
        )
        weights = jnp.cos(jnp.arange(R * S, dtype=jnp.float32)).reshape(R, S)
        return jnp.sum(weights * logprobs) + 0.1 * jnp.sum(entropy), logprobs

    function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(function, **jit_options), arguments(num_columns)


@functools.cache
def alone():
    function, args = gradients()
    return function(*args)


@pytest.mark.parametrize(
    ("strategy", "num_columns"),
    [
        ("d2f2t2", 64),
        ("s2f4", 64),
        ("f2t4+sequence", 64),  # 6 places do not divide over 4: they stay whole.
        pytest.param("f4t2+sequence", 64, marks=pytest.mark.slow),
        pytest.param("e2t4", 64, marks=pytest.mark.slow),
        pytest.param("d8", 61, marks=pytest.mark.slow),
        pytest.param("f8", 61, marks=pytest.mark.slow),  # fsdp cuts the tokens alone.
        pytest.param("t8", 64, marks=pytest.mark.slow),
    ],
)
def test_strategies_give_what_one_device_gives(strategy, num_columns):
    allocation = Allocation.parse(strategy)
    mesh = make_mesh(allocation)
    score = linear_logprob_for(mesh, options=allocation.options)
    function, args = gradients(score, num_columns)
    (loss, logprobs), (by_hidden, by_kernel) = function(*args)
    (loss_alone, logprobs_alone), (by_hidden_alone, by_kernel_alone) = alone()
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-6)
    np.testing.assert_allclose(logprobs, logprobs_alone, atol=1e-5)
    np.testing.assert_allclose(by_hidden, by_hidden_alone, atol=1e-5)
    np.testing.assert_allclose(by_kernel[:, :V], by_kernel_alone, atol=1e-5)
    np.testing.assert_array_equal(by_kernel[:, V:], np.zeros((D, num_columns - V)))


def test_the_head_is_turned_once_and_never_gathered():
    mesh = make_mesh(Allocation.parse("f4t2"))
    kernel_sharding = parameter_shardings(("embed", "vocab"), mesh)
    function, args = gradients(
        linear_logprob_for(mesh),
        64,
        out_shardings=((None, None), (None, kernel_sharding)),
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), list(args))
    shapes[1] = jax.ShapeDtypeStruct((D, 64), jnp.float32, sharding=kernel_sharding)
    text = function.lower(*shapes).compile().as_text()
    # A device stores [16 / 4, 64 / 2] and uses [16, 64 / 8].
    assert "f32[16,8]" in text
    assert "f32[16,64]" not in text
    assert "f32[16,32]" not in text
    assert "all-to-all" in text


def test_one_device_needs_no_function_of_its_own():
    assert linear_logprob_for(make_mesh(Allocation.parse("d1"))) is None
