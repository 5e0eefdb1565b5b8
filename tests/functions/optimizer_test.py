"""The optimizer: rates by update, decay, clipping, and where its state lies."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import tree_utils

from realjax.functions.optimizer import (
    OptimizerConfig,
    clip_by_global_norm,
    learning_rate_schedule,
    make_optimizer,
    state_shardings,
)
from realjax.models.transformer import abstract_parameters
from realjax.parallel import bytes_per_device, parameter_shardings, replicated
from realjax.testing import tiny_model
from tests.functions.plain import mesh_of


def rates(num_updates, **config):
    """Learning rate of update 1, 2, …, num_updates."""
    schedule = learning_rate_schedule(OptimizerConfig(**config), num_updates)
    found = np.asarray(schedule(jnp.arange(num_updates)))
    return np.broadcast_to(found, num_updates).tolist()


def rate_after(num_updates, **config):
    """What the schedule has come down to when the run has ended."""
    schedule = learning_rate_schedule(OptimizerConfig(**config), num_updates)
    return float(schedule(num_updates))


def updated(parameters, gradients, num_updates=100, **config):
    """Parameters after one update."""
    config = {"schedule": "constant", "warmup_fraction": 0.0, **config}
    optimizer = make_optimizer(OptimizerConfig(**config), num_updates)

    @jax.jit
    def update(parameters, gradients):
        state = optimizer.init(parameters)
        updates, _ = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates)

    return update(parameters, gradients)


# -- schedule ----------------------------------------------------------------------


def test_warmup_reaches_the_full_rate_in_equal_steps_from_the_first_update():
    # A fifth of 20 updates is 4: update k of them has k/4 of the rate.
    found = rates(20, learning_rate=0.8, warmup_fraction=0.2, schedule="constant")
    np.testing.assert_allclose(found[:5], [0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_update_of_a_run_learns(schedule):
    # ReaL makes its first two updates at a rate of 0.
    for num_updates, share in itertools.product((1, 2, 50), (0.0, 0.02, 0.5, 1.0)):
        config = {"learning_rate": 1e-3, "warmup_fraction": share}
        found = rates(num_updates, schedule=schedule, **config)
        assert min(found) > 0, (num_updates, share)
        assert max(found) <= 1e-3 * (1 + 1e-6)


def test_a_warmup_of_one_update_is_none():
    config = {"learning_rate": 1.0, "schedule": "linear"}
    # 1 of 10 warms up, at the full rate; the other 9 fall from it.
    assert rates(10, warmup_fraction=0.1, **config)[:2] == [1.0, 1.0]


def test_linear_decay_falls_evenly_to_its_final_fraction_by_the_end_of_the_run():
    # 2 of 10 updates warm up. The other 8 fall from 1 to 0.2 in steps of 0.1.
    config = {
        "learning_rate": 1.0,
        "schedule": "linear",
        "warmup_fraction": 0.2,
        "final_fraction": 0.2,
    }
    expected = [0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    np.testing.assert_allclose(rates(10, **config), expected, rtol=1e-6)
    assert rate_after(10, **config) == pytest.approx(0.2)


def test_cosine_decay_is_halfway_between_its_ends_in_the_middle():
    config = {
        "learning_rate": 1.0,
        "schedule": "cosine",
        "warmup_fraction": 0.2,
        "final_fraction": 0.1,
    }
    found = rates(10, **config)
    # Progress of update 3 + i of 8: i/8; rate 0.1 + 0.9 (1 + cos(π i/8)) / 2.
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    np.testing.assert_allclose(found[2:], expected, rtol=1e-6)
    assert found[6] == pytest.approx((1 + 0.1) / 2)
    assert rate_after(10, **config) == pytest.approx(0.1)


def test_decay_ends_with_the_run_and_not_later():
    # ReaL stretches it over a multiple of the run: at half the horizon a cosine would
    # still stand at 0.5.
    for num_updates in (10, 50):
        config = {"learning_rate": 1.0, "schedule": "cosine"}
        assert rate_after(num_updates, **config) == pytest.approx(0.0, abs=1e-6)
        assert rates(num_updates, **config)[-1] < 0.04


# -- updates -----------------------------------------------------------------------


def test_two_updates_of_adamw_worked_out_in_float64():
    config = {
        "learning_rate": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-5,
        "weight_decay": 0.05,
        "clip_norm": 0.0,
    }
    optimizer = make_optimizer(
        OptimizerConfig(schedule="constant", warmup_fraction=0, **config), 10
    )
    start = np.array([[1.0, -2.0], [0.5, 3.0]])
    gradients = [np.array([[0.1, -0.3], [0.0, 2.0]]), np.array([[-0.2, 0.1], [1, 0.5]])]

    weights, first, second = start, np.zeros((2, 2)), np.zeros((2, 2))
    for k, gradient in enumerate(gradients, start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        step = first / (1 - 0.9**k) / (np.sqrt(second / (1 - 0.95**k)) + 1e-5)
        weights = weights - 0.1 * (step + 0.05 * weights)

    parameters = {"kernel": jnp.asarray(start, jnp.float32)}
    state, update = optimizer.init(parameters), jax.jit(optimizer.update)
    for gradient in gradients:
        gradient = {"kernel": jnp.asarray(gradient, jnp.float32)}
        updates, state = update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    np.testing.assert_allclose(parameters["kernel"], weights, rtol=1e-5)


def test_weight_decay_pulls_matrices_and_neither_norms_nor_biases():
    parameters = {
        "embedding": jnp.full((3, 2), 2.0),
        "layers": {
            "norm": {"scale": jnp.full((2, 4), 2.0)},
            "query": {
                "kernel": jnp.full((2, 4, 4), 2.0),
                "bias": jnp.full((2, 4), 2.0),
            },
        },
    }
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    found = updated(parameters, zeros, learning_rate=0.1, weight_decay=0.5)
    # Without a gradient, a step of 0.1 takes 0.1 × 0.5 of a weight: 2 becomes 1.9.
    assert found["embedding"] == pytest.approx(1.9)
    assert found["layers"]["query"]["kernel"] == pytest.approx(1.9)
    assert found["layers"]["norm"]["scale"] == pytest.approx(2.0)
    assert found["layers"]["query"]["bias"] == pytest.approx(2.0)


def test_no_norm_of_a_model_decays_and_every_matrix_does():
    axes = abstract_parameters(tiny_model())
    parameters = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32),
        axes,
        is_leaf=lambda x: hasattr(x, "axes"),
    )
    zeros = jax.tree.map(np.zeros_like, parameters)
    found = updated(parameters, zeros, learning_rate=0.1, weight_decay=0.5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        is_norm = "norm" in jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, 1.0 if is_norm else 0.95, rtol=1e-6)


def first_moment(gradients, clip_norm):
    optimizer = make_optimizer(OptimizerConfig(beta1=0.5, clip_norm=clip_norm), 10)
    state = optimizer.init(gradients)
    _, state = jax.jit(optimizer.update)(gradients, state, gradients)
    return tree_utils.tree_get(state, "mu")


def test_a_gradient_is_scaled_to_the_largest_norm_over_all_parameters():
    # Norm 5 over both leaves together. Clipped at 1 it is [0.6, 0.8], and half of a
    # gradient goes to the first moment.
    gradients = {"a": {"kernel": jnp.array([3.0])}, "b": {"kernel": jnp.array([4.0])}}
    found = first_moment(gradients, clip_norm=1.0)
    np.testing.assert_allclose(found["a"]["kernel"], [0.3], rtol=1e-6)
    np.testing.assert_allclose(found["b"]["kernel"], [0.4], rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 6.0])
def test_a_gradient_below_the_largest_norm_or_without_one_stays(clip_norm):
    gradients = {"a": {"kernel": jnp.array([3.0])}, "b": {"kernel": jnp.array([4.0])}}
    found = first_moment(gradients, clip_norm)
    np.testing.assert_allclose(found["a"]["kernel"], [1.5], rtol=1e-6)
    np.testing.assert_allclose(found["b"]["kernel"], [2.0], rtol=1e-6)


def test_clipping_has_the_bits_of_optax():
    generator = np.random.default_rng(0)
    gradients = {"a": generator.standard_normal((5, 3)), "b": np.ones(7)}
    gradients = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradients)
    for max_norm in (0.3, 100.0):
        expected, _ = optax.clip_by_global_norm(max_norm).update(
            gradients, optax.EmptyState()
        )
        clip = clip_by_global_norm(max_norm)
        found, _ = clip.update(gradients, clip.init(gradients))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_part_of_the_parameters_is_updated_as_within_the_whole():
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0.5), 10)
    parameters = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"scale": jnp.ones(4)}}
    gradients = jax.tree.map(lambda x: 2.0 * x, parameters)
    norm = optax.tree.norm(gradients)
    whole, state = optimizer.update(
        gradients, optimizer.init(parameters), parameters, norm=norm
    )
    for name in parameters:
        part = {name: parameters[name]}
        found, moments = optimizer.update(
            {name: gradients[name]}, optimizer.init(part), part, norm=norm
        )
        for got, expected in zip(
            jax.tree.leaves((moments[1].mu[name], moments[1].nu[name])),
            jax.tree.leaves((state[1].mu[name], state[1].nu[name])),
            strict=True,
        ):
            np.testing.assert_array_equal(got, expected)
        # Optax compiles what corrects the moments, for each tree anew.
        for got, expected in zip(
            jax.tree.leaves(found), jax.tree.leaves(whole[name]), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-6)
        assert moments[1].count == state[1].count == 1
    # Without the norm of the whole it would be clipped less: 2 sqrt(6), not 2 sqrt(10).
    part = {"a": parameters["a"]}
    _, alone = optimizer.update({"a": gradients["a"]}, optimizer.init(part), part)
    assert np.all(alone[1].mu["a"]["kernel"] > 1.2 * state[1].mu["a"]["kernel"])


# -- state -------------------------------------------------------------------------


def test_moments_lie_as_their_parameters_and_counters_are_everywhere():
    mesh, axes = mesh_of("d2f2t2"), abstract_parameters(tiny_model())
    shardings = parameter_shardings(axes, mesh)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
        axes,
        shardings,
        is_leaf=lambda x: hasattr(x, "axes"),
    )
    optimizer = make_optimizer(OptimizerConfig(), 10)
    found = state_shardings(optimizer, abstract, shardings, replicated(mesh))
    state = jax.jit(
        lambda: optimizer.init(
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        ),
        out_shardings=found,
    )()

    assert jax.tree.structure(found) == jax.tree.structure(state)
    for name in ("mu", "nu"):
        moments = tree_utils.tree_get(state, name)
        assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("f4")}
        jax.tree.map(
            lambda leaf, where: np.testing.assert_(leaf.sharding == where),
            moments,
            shardings,
        )
        held = sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(moments)
        )
        assert held == bytes_per_device(axes, mesh)
    for leaf in jax.tree.leaves(state):
        if leaf.ndim == 0:
            assert leaf.sharding.is_fully_replicated


# -- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"learning_rate": -1e-5}, "learning_rate=-1e-05"),
        ({"warmup_fraction": 1.5}, "warmup_fraction=1.5"),
        ({"final_fraction": -0.1}, "final_fraction=-0.1"),
        ({"beta2": 1.0}, "beta2=1.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
    ],
)
def test_what_no_optimizer_could_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)


def test_a_run_without_updates_has_no_schedule():
    with pytest.raises(ValueError, match="0 optimizer steps"):
        learning_rate_schedule(OptimizerConfig(), 0)
