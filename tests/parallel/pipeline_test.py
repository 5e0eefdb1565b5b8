"""Tests of `realjax/parallel/pipeline.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models.partition import scan_layers
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.pipeline import num_pieces, run_stages
from realjax.parallel.sharding import AXES, constrain_for, num_parts

L, S, D = 6, 3, 4


def layer(x, kernel, shift):
    """Also sum what went through, as routers do."""
    new = jnp.tanh(x @ kernel.astype(x.dtype) + shift[..., None].astype(x.dtype))
    return new, jnp.sum(new.astype(jnp.float32))


def loss_and_gradients(run, num_rows, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (num_rows, S, D)).astype(dtype)
    kernels = jax.random.normal(keys[1], (L, D, D))
    shift = jax.random.normal(keys[2], (num_rows, S))
    weights = jnp.cos(jnp.arange(L, dtype=jnp.float32))

    def loss(x, kernels):
        out, sums = run(layer, x, kernels, shift)
        places = jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)
        return jnp.sum(jnp.sin(places) * out) + jnp.sum(weights * sums), out

    function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(function)(x, kernels)


def staged(text):
    mesh = make_mesh(Allocation.parse(text))
    return run_stages(mesh, constrain_for(mesh), num_parts(AXES["batch"], mesh))


@pytest.mark.parametrize(
    ("num_rows", "text"),
    [
        (8, "d2s2"),
        (3, "s2f2"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, "s3"), (6, "s2@1,0"), (12, "s6"))
        ),
    ],
)
def test_stages_give_what_one_loop_over_the_layers_gives(num_rows, text):
    found = loss_and_gradients(staged(text), num_rows, jnp.float32)
    wanted = loss_and_gradients(scan_layers, num_rows, jnp.float32)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        wanted,
    )


def test_stages_run_in_bfloat16_and_hand_it_back():
    # A sum over stages written by hand in bfloat16 ends XLA for the CPU.
    (_, out), (x_bar, kernels_bar) = loss_and_gradients(staged("s2t2"), 4, jnp.bfloat16)
    assert (out.dtype, x_bar.dtype) == (jnp.bfloat16, jnp.bfloat16)
    _, (_, wanted) = loss_and_gradients(scan_layers, 4, jnp.float32)
    error = np.linalg.norm(kernels_bar - wanted) / np.linalg.norm(wanted)
    assert error < 0.05


@pytest.mark.parametrize(
    ("num_rows", "num_row_shards", "num_stages", "count"),
    [
        (32, 1, 2, 8),  # Four for each stage.
        (32, 8, 2, 4),  # Each piece has a row of every shard.
        (3, 2, 2, 3),  # Rows lie whole where shards do not divide them.
        (1, 1, 4, 1),
        (22, 1, 4, 11),
    ],
)
def test_pieces_are_as_many_as_divide_the_rows(
    num_rows, num_row_shards, num_stages, count
):
    assert num_pieces(num_rows, num_row_shards, num_stages) == count
