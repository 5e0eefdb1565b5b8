"""Training adapters: their gradient, and that nothing else has one."""

import functools

import jax
import numpy as np
import pytest
from optax import tree_utils

from realjax.algorithms import reward_model, sft
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.train import TrainProgram
from realjax.models.lora import merged, with_adapters
from realjax.models.parameters import (
    LORA,
    abstract_parameters,
    divide,
    join,
    split,
    without_adapters,
)
from realjax.parallel.sharding import bytes_per_device
from realjax.testing import tiny_batch, tiny_model
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    pack_groups,
    parameters_on,
    sharp_parameters,
)

SIZE, WIDTH = 8, 24
BATCH = tiny_batch(SIZE, WIDTH)
LENGTHS = BATCH.lengths
SPECS = {
    "sft": sft.graph(sft.SFT()).calls["train_policy"].function,
    "reward": reward_model.graph(reward_model.RewardModel())
    .calls["train_reward"]
    .function,
}
ARRAYS = {
    "tokens": np.asarray(BATCH["tokens"]),
    "completion_mask": np.asarray(BATCH["completion_mask"]),
    "pair_weights": np.ones(SIZE, np.float32),
}
# Half of a gradient is the first moment after one update, without rounding.
CONFIG = OptimizerConfig(
    learning_rate=1e-2, beta1=0.5, clip_norm=0.0, warmup_fraction=0.0
)


@functools.cache
def model_of(name, rank=4, **fields):
    head = "language" if name == "sft" else "scalar"
    model = tiny_model(head=head)
    if not rank:
        return model
    return with_adapters(
        model, targets=("all-linear",), rank=rank, alpha=8.0, **dict(fields)
    )


@functools.cache
def program_of(name, place="d1", rank=4, **fields):
    model = model_on(place, model_of(name, rank, **fields))
    return TrainProgram(SPECS[name], model, mesh_of(place), CONFIG, 100)


def update(program, place="d1", parameters=None, num_microbatches=1, key=None):
    """One update: what was before, the new state, what was reported."""
    config = program.program.config
    if parameters is None:
        parameters = sharp_parameters(config)
    before = parameters_on(place, config, parameters)
    batch = batch_on(place, {key: ARRAYS[key] for key in program.spec.reads})
    groups = [
        np.arange(SIZE).reshape(-1, 2)[index::num_microbatches].ravel()
        for index in range(num_microbatches)
    ]
    packings = pack_groups(LENGTHS, groups, unit=2, num_shards=4)
    state = program.init_optimizer(before)
    state, (report,) = program(state, batch, [packings], key)
    return before, state, {name: float(mean.value()) for name, mean in report.items()}


def gradient_of(state):
    moments = tree_utils.tree_get(state.optimizer, "mu")
    return jax.tree.map(lambda m: 2 * np.asarray(m, np.float64), moments)


def assert_near(found, wanted, tolerance=2e-5):
    """Each leaf to a part of its own size."""
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        name, size = jax.tree_util.keystr(path), np.abs(b).max()
        np.testing.assert_allclose(a, b, atol=tolerance * size, rtol=0, err_msg=name)


def whole(node):
    """A kernel with its adapter added."""
    if not hasattr(node, "first"):
        return node
    kernel, first, second = (
        np.asarray(x, np.float64) for x in (node.kernel, node.first, node.second)
    )
    rank = first.shape[-1]
    flat = (
        first.reshape(len(first), -1, rank),
        second.reshape(len(second), rank, -1),
    )
    added = node.scale * np.matmul(*flat)
    return (kernel + added.reshape(kernel.shape)).astype(np.float32)


def test_the_gradient_of_adapters_is_that_of_their_sum_with_the_base():
    # W' = W + s A B, so that dA = s dW' Bᵀ and dB = s Aᵀ dW'.
    config = model_of("sft")
    parameters = sharp_parameters(config)
    _, state, means = update(program_of("sft"))
    found = gradient_of(state)["layers"]
    base = jax.tree.map(whole, merged(parameters, config))
    _, full, wanted_means = update(program_of("sft", rank=0), parameters=base)
    wanted = gradient_of(full)["layers"]
    assert means["loss"] == pytest.approx(wanted_means["loss"], rel=1e-5)
    scale = config.adapters.scale
    for group in ("attention", "mlp"):
        for name, adapter in found[group].items():
            first, second = (
                np.asarray(parameters["layers"][group][name][leaf], np.float64)
                for leaf in LORA
            )
            rank = first.shape[-1]
            rows = first.reshape(len(first), -1, rank)
            columns = second.reshape(len(second), rank, -1)
            kernel = wanted[group][name]["kernel"]
            kernel = kernel.reshape(len(kernel), rows.shape[1], columns.shape[2])
            expected = {
                "lora_a": scale * np.einsum("lio,lro->lir", kernel, columns),
                "lora_b": scale * np.einsum("lir,lio->lro", rows, kernel),
            }
            for leaf, value in expected.items():
                value = value.reshape(adapter[leaf].shape)
                assert_near(adapter[leaf], value, tolerance=5e-5)


@pytest.mark.parametrize(
    "name", ["sft", pytest.param("reward", marks=pytest.mark.slow)]
)
def test_only_adapters_and_a_scalar_head_have_moments_and_change(name):
    before, state, _ = update(program_of(name))
    config = model_of(name)
    trained, base = split(state.parameters, config)
    moments = tree_utils.tree_get(state.optimizer, "mu")
    assert jax.tree.structure(moments) == jax.tree.structure(trained)
    assert ("score" in trained) == (name == "reward")
    # The same arrays: neither copied nor given away.
    jax.tree.map(
        lambda a, b: np.testing.assert_(a is b), base, split(before, config)[1]
    )
    old = split(sharp_parameters(config), config)[0]
    changed = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), trained, old
    )
    assert min(jax.tree.leaves(changed)) > 1e-4


def test_sums_of_gradients_are_of_what_is_trained():
    program = program_of("reward")
    parameters = sharp_parameters(model_of("reward"))
    batch = {key: ARRAYS[key] for key in program.spec.reads}
    packing = pack_groups(LENGTHS, [range(SIZE)], unit=2)[0]
    sums, _ = jax.eval_shape(program._zeros, parameters, batch, vars(packing))
    trained, _ = split(parameters, model_of("reward"))
    assert jax.tree.structure(sums) == jax.tree.structure(trained)


@pytest.mark.slow
def test_the_program_has_no_gradient_of_the_base():
    counts = {}
    for rank in (0, 1):
        program = program_of("sft", rank=rank)
        parameters = sharp_parameters(program.program.config)
        batch = batch_on("d1", {key: ARRAYS[key] for key in program.spec.reads})
        packing = vars(pack_groups(LENGTHS, [range(SIZE)], unit=2)[0])
        sums = program._zeros(parameters, batch, packing)
        compiled = program._accumulate.lower(parameters, sums, batch, packing)
        counts[rank] = compiled.compile().cost_analysis()["flops"]
    # Of three products with a matrix one is left out; those of adapters are small.
    assert counts[1] < 0.85 * counts[0]


@pytest.mark.slow
@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_dropout_is_the_same_however_a_minibatch_is_cut(num_microbatches):
    program, key = program_of("sft", dropout=0.3), jax.random.key(7)
    _, state, means = update(program, key=key)
    _, other, other_means = update(program, key=key, num_microbatches=num_microbatches)
    assert other_means == pytest.approx(means, rel=1e-5)
    assert_near(gradient_of(other), gradient_of(state))


@pytest.mark.slow
def test_dropout_follows_from_the_key_and_is_of_training_alone():
    program = program_of("sft", dropout=0.3)
    losses = [
        update(program, key=key)[2]["loss"]
        for key in (None, jax.random.key(7), jax.random.key(7), jax.random.key(8))
    ]
    assert losses[1] == losses[2]
    assert len(set(losses)) == 3
    assert losses[0] == pytest.approx(update(program_of("sft"))[2]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("sft", "f2t2"),
        *(
            pytest.param(name, place, marks=pytest.mark.slow)
            for name in SPECS
            for place in ("d2f2t2", "s2", "f2s2", "d2t2+sequence", "d2f2+zero1", "d4")
        ),
    ],
)
def test_updates_on_a_mesh_are_those_of_one_device(name, place):
    key, fields = jax.random.key(7), (("dropout", 0.2),)
    _, state, means = update(program_of(name, place, **dict(fields)), place, key=key)
    _, expected, wanted = update(program_of(name, **dict(fields)), key=key)
    assert means == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert_near(gradient_of(state), gradient_of(expected), tolerance=2e-4)
    assert_near(state.parameters, expected.parameters, tolerance=2e-3)


def test_a_mesh_holds_its_part_of_adapters_and_their_moments():
    place, config = "f2t2", model_of("sft")
    _, state, _ = update(program_of("sft", place), place)
    adapters, base = divide(abstract_parameters(config), LORA)
    mesh = mesh_of(place)
    held = lambda tree: sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)
    )
    promised = bytes_per_device(adapters, mesh)
    trained, rest = split(state.parameters, config)
    assert held(trained) == promised
    assert held(rest) == bytes_per_device(base, mesh)
    assert held(tree_utils.tree_get(state.optimizer, "mu")) == promised
    whole_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
    assert promised < 0.8 * whole_bytes  # B or A of every projection is cut.


@pytest.mark.slow
def test_a_base_in_bfloat16_has_adapters_in_float32():
    config = model_of("sft", base_dtype="bfloat16")
    program = program_of("sft", base_dtype="bfloat16")
    trained, base = split(sharp_parameters(config), config)
    narrow = jax.tree.map(lambda x: x.astype("bfloat16"), base)
    _, state, _ = update(program, parameters=join(trained, narrow))
    found, rest = split(state.parameters, config)
    assert {str(x.dtype) for x in jax.tree.leaves(found)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(rest)} == {"bfloat16"}
    assert without_adapters(config) == tiny_model()
