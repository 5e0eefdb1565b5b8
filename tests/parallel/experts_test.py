"""Experts on meshes: the numbers of one device, and who holds and sends what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models.experts import Choice, ExpertKernels, apply_experts
from realjax.parallel import Allocation, make_mesh
from realjax.parallel.experts import experts_for, room

B, T, D, F, E, TOP_K = 8, 32, 16, 24, 8, 2
FAST = ("e4", "d2e2t2", "f4t2+sequence")
SLOW = (
    *("d8", "f8", "t8", "d2t4", "f4t2", "e2", "e8", "e2t2", "f2e2t2", "d2f2e2"),
    *("e2t2+sequence", "t4+sequence", "f4e2+zero1"),
)


def slow(places):
    return [pytest.param(place, marks=pytest.mark.slow) for place in places]


def axes_kernels():
    wide = ("expert", "embed", "mlp")
    return ExpertKernels._make((wide, wide, ("expert", "mlp", "embed")))


@functools.cache
def numbers(dtype="float32", shape=(B, T), num_experts=E):
    """Tokens, weights, kernels and a cotangent of the output."""
    generator = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(generator.standard_normal(shape, np.float32))

    kernels = ExpertKernels(
        gate=draw(num_experts, D, F) / 4,
        up=draw(num_experts, D, F) / 4,
        down=draw(num_experts, F, D) / 5,
    )
    weights = jnp.asarray(generator.uniform(0.1, 1, (*shape, TOP_K)), jnp.float32)
    tokens, bar = draw(*shape, D), draw(*shape, D)
    return tokens.astype(dtype), weights, kernels, bar.astype(dtype)


def chosen(name, shape=(B, T), num_experts=E):
    """Experts of every token, [B, T, k]."""
    generator = np.random.default_rng(1)
    scores = generator.standard_normal((*shape, num_experts))
    even = np.argsort(scores, axis=-1)[..., :TOP_K]
    first = np.zeros((*shape, 1), int)
    return {
        "any": even,
        # Of 128 pairs on a shard of e4, 40 find room in a round: 4 rounds. The other
        # expert of the pair is none.
        "all on one": np.concatenate([first + 1, first + num_experts], axis=-1),
        "two experts": np.concatenate([first + num_experts - 1, first], axis=-1),
        "some none": np.where(generator.uniform(size=even.shape) < 0.4, E, even),
        "none": np.full_like(even, num_experts),
    }[name].astype(np.int32)


def sharding(place, axes):
    from realjax.parallel.sharding import parameter_shardings

    allocation = Allocation.parse(place)
    mesh = make_mesh(allocation)
    return parameter_shardings(axes, mesh, options=allocation.options)


@functools.cache
def program(place):
    """Output and gradients of tokens, weights and kernels, compiled for a mesh."""
    allocation = Allocation.parse(place)
    mesh = make_mesh(allocation)
    apply = apply_experts
    if mesh.size > 1:
        apply = experts_for(mesh, options=allocation.options)

    def run(tokens, weights, kernels, bar, experts):
        def out(tokens, weights, kernels):
            return apply(tokens, Choice(experts, weights), kernels, "silu")

        out, backward = jax.vjp(out, tokens, weights, kernels)
        return out, backward(bar)

    by_rows, kernels = sharding(place, ("batch",)), sharding(place, axes_kernels())
    return jax.jit(
        run,
        in_shardings=(by_rows, by_rows, kernels, by_rows, by_rows),
        out_shardings=(by_rows, (by_rows, by_rows, kernels)),
    )


def run(place, case, dtype="float32"):
    return jax.device_get(program(place)(*numbers(dtype), chosen(case)))


def assert_equal(found, expected, tolerance=2e-6):
    """Each array to a part of its largest entry."""
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        size, name = np.abs(b).max(), jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=tolerance * size, rtol=0, err_msg=name)


@pytest.mark.parametrize("place", [*FAST, *slow(SLOW)])
@pytest.mark.parametrize(
    "case", ["any", "all on one", "two experts", "some none", "none"]
)
def test_outputs_and_gradients_are_those_of_one_device(place, case):
    assert_equal(run(place, case), run("d1", case))
