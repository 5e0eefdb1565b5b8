"""Train on meshes, over several updates, and what is compiled for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import tree_utils

from realjax.algorithms import reward_model, sft
from realjax.core.batch import Batch
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.train import TrainProgram, minibatch_order
from realjax.models.transformer import abstract_parameters
from realjax.parallel import bytes_per_device
from realjax.testing import tiny_batch, tiny_model
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    pack_all,
    pack_groups,
    parameters_on,
    sharp_parameters,
)

SIZE, WIDTH = 8, 24
BATCH = tiny_batch(SIZE, WIDTH)
TOKENS, LENGTHS = np.asarray(BATCH["tokens"]), BATCH.lengths
ARRAYS = {
    "tokens": TOKENS,
    "completion_mask": np.asarray(BATCH["completion_mask"]),
    "pair_weights": np.repeat([0.5, 0.5, 1.0, 1.0], 2).astype(np.float32),
}
SPECS = {
    "sft": sft.graph(sft.SFT()).calls["train_policy"].function,
    "reward_model": reward_model.graph(reward_model.RewardModel())
    .calls["train_reward"]
    .function,
}
CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.2, clip_norm=0.1)


def model_of(name):
    return tiny_model(head="language" if name == "sft" else "scalar")


@functools.cache
def program_of(name, place="d1", num_updates=10):
    model = model_on(place, model_of(name))
    return TrainProgram(SPECS[name], model, mesh_of(place), CONFIG, num_updates)


def fresh(name, place="d1"):
    parameters = sharp_parameters(model_of(name))
    parameters = parameters_on(place, model_of(name), parameters)
    return program_of(name, place).init_optimizer(parameters)


def on_mesh(name, place="d1", arrays=ARRAYS):
    return batch_on(place, {key: arrays[key] for key in SPECS[name].reads})


def minibatches_of(lengths=LENGTHS, num_shards=4):
    """Two updates: of the first half of the rows, then of the second."""
    place, half = np.arange(SIZE), SIZE // 2
    return [
        pack_groups(lengths, [place[chosen]], num_shards=num_shards, unit=2)
        for chosen in (place < half, place >= half)
    ]


@functools.cache
def trained(name, place="d1"):
    """State after two updates, and what was reported of each."""
    program = program_of(name, place)
    state, reports = program(fresh(name, place), on_mesh(name, place), minibatches_of())
    values = [{k: float(m.value()) for k, m in report.items()} for report in reports]
    return state, values


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("sft", "f2t2"),
        *(
            pytest.param(name, place, marks=pytest.mark.slow)
            for name in SPECS
            for place in ("d2t2", "f4", "d2f2t2", "t4", "d4")
        ),
    ],
)
def test_updates_on_a_mesh_are_those_of_one_device(name, place):
    state, reports = trained(name, place)
    expected_state, expected = trained(name)
    for found, wanted in zip(reports, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(expected_state),
        strict=True,
    ):
        found, wanted = np.asarray(found), np.asarray(wanted)
        size = np.abs(wanted).max()
        np.testing.assert_allclose(
            found, wanted, atol=2e-4 * size, rtol=0, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize(
    "place",
    ["f2t2", *(pytest.param(p, marks=pytest.mark.slow) for p in ("f4", "d2f2t2"))],
)
def test_a_mesh_holds_no_more_than_its_part_of_masters_moments_and_gradients(place):
    state, _ = trained("sft", place)
    promised = bytes_per_device(abstract_parameters(model_of("sft")), mesh_of(place))
    for tree in (
        state.parameters,
        tree_utils.tree_get(state.optimizer, "mu"),
        tree_utils.tree_get(state.optimizer, "nu"),
    ):
        leaves = jax.tree.leaves(tree)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        assert held == promised
    # Gradient sums go from one microbatch to the next as the masters lie.
    program = program_of("sft", place)
    batch, packing = on_mesh("sft", place), minibatches_of()[0][0]
    lowered = program._accumulate.lower(
        state.parameters,
        program._zeros(state.parameters, batch, vars(packing)),
        batch,
        vars(packing),
    )
    gradients, _ = lowered.compile().output_shardings
    jax.tree.map(
        lambda found, leaf: np.testing.assert_(
            found.is_equivalent_to(leaf.sharding, leaf.ndim)
        ),
        gradients,
        state.parameters,
    )
    text = lowered.compile().as_text()
    # What a device lacks comes by collectives: sums of products over tensor and data,
    # and whole matrices where fsdp cut them.
    assert "all-reduce" in text
    assert "all-gather" in text


# -- several updates ---------------------------------------------------------------


def test_the_first_two_updates_learn_and_the_schedule_is_reported():
    # Two of ten updates warm up: half the rate, then all of it.
    _, reports = trained("sft")
    rates = [report["learning_rate"] for report in reports]
    assert rates == pytest.approx([0.005, 0.01])
    assert [report["skipped"] for report in reports] == [0, 0]


def test_the_gradient_norm_is_reported_before_clipping():
    state, reports = trained("sft")
    assert min(report["grad_norm"] for report in reports) > CONFIG.clip_norm
    # After two gradients g of norm 0.1 each, the moment is 0.09 g_1 + 0.1 g_2.
    moments = jax.tree.leaves(tree_utils.tree_get(state.optimizer, "mu"))
    norm = np.sqrt(sum(np.square(np.asarray(leaf)).sum() for leaf in moments))
    assert norm <= 0.19 * CONFIG.clip_norm * (1 + 1e-5)


def test_many_updates_on_one_batch_lower_its_loss():
    program, state = program_of("sft"), fresh("sft")
    packings = pack_groups(LENGTHS, [range(SIZE)])
    _, reports = program(state, on_mesh("sft"), [packings] * 8)
    losses = [float(report["loss"].value()) for report in reports]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


def test_evaluation_is_the_loss_of_training_without_an_update():
    program, state = program_of("sft"), fresh("sft")
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(state)]
    microbatches = pack_groups(LENGTHS, [[0, 5, 6], [1], [7, 2, 3, 4]])
    found = program.evaluate(state.parameters, on_mesh("sft"), microbatches)
    for leaf, old in zip(jax.tree.leaves(state), before, strict=True):
        np.testing.assert_array_equal(leaf, old)
    _, (report,) = program(state, on_mesh("sft"), [microbatches])
    assert set(found) == {"loss", "ppl", "entropy"}
    for name, mean in found.items():
        assert float(mean.value()) == pytest.approx(
            float(report[name].value()), rel=1e-6
        )


def test_a_batch_outlives_its_updates():
    # The state is consumed; the batch serves the next epoch.
    batch, state = on_mesh("sft"), fresh("sft")
    new, _ = program_of("sft")(state, batch, minibatches_of())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.parameters))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((batch, new)))


@pytest.mark.parametrize(
    "place", ["d1", "f2t2", pytest.param("d2f2t2", marks=pytest.mark.slow)]
)
def test_other_lengths_and_more_microbatches_compile_nothing_new(place):
    program = TrainProgram(
        SPECS["sft"], model_on(place, model_of("sft")), mesh_of(place), CONFIG, 10
    )
    state = fresh("sft", place)
    for seed, count in ((0, 1), (1, 2), (2, 3)):
        batch = tiny_batch(SIZE, WIDTH, seed=seed)
        arrays = on_mesh("sft", place, dict(batch.arrays))
        packings = minibatches_of(batch.lengths)
        state, _ = program(state, arrays, [packings[0] * count, packings[1]])
        program.evaluate(state.parameters, arrays, packings[0] * count)
        for jitted in (program._accumulate, program._apply, program._measure):
            assert jitted._cache_size() == 1


# -- the order of minibatches ------------------------------------------------------


def test_rows_keep_their_order_without_a_generator():
    orders = list(minibatch_order(6, unit=2, epochs=2, generator=None))
    assert [order.tolist() for order in orders] == [[0, 1, 2, 3, 4, 5]] * 2


def test_every_epoch_has_every_row_once_in_whole_units_and_another_order():
    generator = np.random.default_rng(0)
    orders = list(minibatch_order(24, unit=3, epochs=3, generator=generator))
    for order in orders:
        assert sorted(order.tolist()) == list(range(24))
        # A unit is three rows in a row, the first a multiple of three.
        units = order.reshape(-1, 3)
        assert (units[:, 0] % 3 == 0).all()
        np.testing.assert_array_equal(units, units[:, :1] + np.arange(3)[None, :])
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_the_order_repeats_with_its_seed():
    orders = [
        next(
            minibatch_order(20, unit=1, epochs=1, generator=np.random.default_rng(seed))
        ).tolist()
        for seed in (5, 5, 6)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_the_minibatches_of_an_epoch_hold_every_token_once():
    generator = np.random.default_rng(1)
    (order,) = minibatch_order(SIZE, unit=2, epochs=1, generator=generator)
    index = Batch.create({"row": order}, lengths=LENGTHS[order])
    seen = np.zeros(SIZE, int)
    for part in index.split(3, unit=2):
        rows = np.asarray(part["row"])
        assert len(rows) % 2 == 0
        for packing in pack_all(
            np.where(np.isin(np.arange(SIZE), rows), LENGTHS, 0), unit=2
        ):
            exists = packing.source_sequence < SIZE
            seen += np.bincount(packing.source_sequence[exists], minlength=SIZE)
    np.testing.assert_array_equal(seen, LENGTHS)


def test_losses_are_added_up_on_the_mesh():
    # Means stay on the device until somebody reads them: nothing waits for a step.
    program = program_of("sft")
    _, (report, _) = program(fresh("sft"), on_mesh("sft"), minibatches_of())
    leaves = jax.tree.leaves(report)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
