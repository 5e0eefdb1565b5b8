"""The parts of a layer: norm, projection, gated feed-forward layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models.mlp import FeedForward
from realjax.models.norm import Norm
from realjax.models.projection import project
from realjax.testing import tiny_model

NORMAL = nn.initializers.normal(1.0)


def test_norm_divides_by_the_root_mean_square():
    # Mean of squares (9 + 16) / 2 = 12.5.
    x = jnp.asarray([[3.0, 4.0]])
    out = Norm("rms", 0.0).apply({"params": {"scale": jnp.asarray([1.0, 10.0])}}, x)
    np.testing.assert_allclose(out, [[3 / 12.5**0.5, 40 / 12.5**0.5]], rtol=1e-6)


def test_norm_of_bfloat16_is_computed_in_float32():
    x = (1000 + jnp.arange(64.0)).astype(jnp.bfloat16)[None]
    parameters = {"params": {"scale": jnp.ones(64)}}
    out = Norm("rms", 1e-5, jnp.bfloat16).apply(parameters, x)
    exact = Norm("rms", 1e-5).apply(parameters, x.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "num_contracted", "equation"),
    [
        ((2, 3, 5), (5, 7), 1, "btd,df->btf"),
        ((2, 3, 5), (5, 4, 6), 1, "btd,dhk->bthk"),
        ((2, 3, 4, 6), (4, 6, 5), 2, "bthk,hkd->btd"),
    ],
)
def test_project_and_its_gradients_are_those_of_einsum(
    x_shape, kernel_shape, num_contracted, equation
):
    x_key, kernel_key = jax.random.split(jax.random.key(0))
    inputs = (
        jax.random.normal(x_key, x_shape),
        jax.random.normal(kernel_key, kernel_shape),
    )

    def both(function):
        gradient = jax.grad(lambda *inputs: jnp.sin(function(*inputs)).sum(), (0, 1))
        return jax.jit(lambda *inputs: (function(*inputs), gradient(*inputs)))(*inputs)

    results = (
        both(lambda x, kernel: project(x, kernel, num_contracted)),
        both(lambda x, kernel: jnp.einsum(equation, x, kernel)),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_feed_forward_layer_is_down_of_silu_gate_times_up():
    layer = FeedForward(tiny_model(mlp_width=2), NORMAL, NORMAL)
    gate, up, down = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[3.0, 5.0]]), [[1.0], [10]]
    parameters = {
        name: {"kernel": jnp.asarray(kernel)}
        for name, kernel in {"gate": gate, "up": up, "down": down}.items()
    }
    out = layer.apply({"params": parameters}, jnp.full((1, 1, 1), 2.0))
    # gate 2 and 4, up 6 and 10; silu(x) = x / (1 + e^-x).
    expected = 6 * 2 / (1 + np.exp(-2)) + 10 * 10 * 4 / (1 + np.exp(-4))
    np.testing.assert_allclose(out, [[[expected]]], rtol=1e-6)
