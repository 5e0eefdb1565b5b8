"""What routers add to training: losses, statistics and noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import tree_utils

from realjax.algorithms import sft
from realjax.functions import packed, routers
from realjax.functions.function import Infer
from realjax.functions.infer import InferProgram
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.train import TrainProgram
from realjax.models import heads, transformer
from realjax.models.config import MoEConfig
from realjax.models.moe import RouterSums
from realjax.rl.masking import Mean
from realjax.testing import tiny_batch, tiny_model
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    pack_all,
    pack_groups,
    parameters_on,
    plain_logprobs,
    sharp_parameters,
)

SIZE, WIDTH, AUX, Z, NUM_EXPERTS = 8, 24, 0.3, 0.05, 4
BATCH = tiny_batch(SIZE, WIDTH)
TOKENS, LENGTHS = np.asarray(BATCH["tokens"]), BATCH.lengths
MASK = np.asarray(BATCH["completion_mask"])
ARRAYS = {"tokens": TOKENS, "completion_mask": MASK}
SFT = sft.graph(sft.SFT()).calls["train_policy"].function

# Half of a gradient is the first moment after one update.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, beta1=0.5, clip_norm=0.0, warmup_fraction=0.0
)


def model(jitter=0.0):
    moe = MoEConfig(
        num_experts=NUM_EXPERTS,
        top_k=2,
        aux_loss_coef=AUX,
        z_loss_coef=Z,
        jitter=jitter,
    )
    return tiny_model(moe=moe)


@functools.cache
def program_of(place="d1", jitter=0.0):
    return TrainProgram(
        SFT, model_on(place, model(jitter)), mesh_of(place), OPTIMIZER, 100
    )


def parameters_of(place="d1"):
    return parameters_on(place, model(), sharp_parameters(model()))


def step(packings, place="d1", jitter=0.0, seed=None, arrays=ARRAYS):
    """The gradient and the means of one update."""
    program = program_of(place, jitter)
    key = None if seed is None else jax.random.key(seed)
    state = program.init_optimizer(parameters_of(place))
    state, (report,) = program(state, batch_on(place, arrays), [packings], key)
    moments = tree_utils.tree_get(state.optimizer, "mu")
    gradient = jax.tree.map(lambda m: 2 * np.asarray(m, np.float64), moments)
    return gradient, {name: float(mean.value()) for name, mean in report.items()}


def dealt(num_groups):
    return [range(index, SIZE, num_groups) for index in range(num_groups)]


def assert_equal(found, expected, tolerance=2e-5):
    """Gradients leaf by leaf, to a part of their size; means to a part of each."""
    (gradient, means), (other, others) = found, expected
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    for (path, a), b in zip(leaves, jax.tree.leaves(other), strict=True):
        size, name = np.abs(b).max(), jax.tree_util.keystr(path)
        assert size > 0, f"{name} has no gradient"
        np.testing.assert_allclose(a, b, atol=tolerance * size, rtol=0, err_msg=name)
    assert means == pytest.approx(others, rel=1e-5)


# -- arithmetic --------------------------------------------------------------------

# Two layers of 4 experts, 10 tokens that chose 2 each.
SUMS = RouterSums(
    aux=jnp.array([20.0, 30.0]),
    z=jnp.array([40.0, 60.0]),
    tokens=jnp.array([10.0, 10.0]),
    dropped=jnp.array([1.0, 3.0]),
    counts=jnp.array([[10.0, 6.0, 4.0, 0.0], [5.0, 5.0, 5.0, 5.0]]),
)


def test_what_is_added_is_the_mean_over_layers_on_the_scale_of_the_loss():
    # A minibatch of 40 tokens, of which 16 count in the loss: 16 / 40 for each token.
    # (0.3 × (20 + 30) + 0.05 × (40 + 60)) / 2 layers × 0.4
    added = routers.added_loss(model(), SUMS, jnp.float32(0.4))
    assert float(added) == pytest.approx(10.0 * 0.4, rel=1e-6)


def test_statistics_are_means_over_tokens_and_layers():
    found = {name: mean for name, mean in routers.measures(model(), SUMS).items()}
    means = routers.finished(found | {"loss": Mean(jnp.float32(3), jnp.float32(2))})
    assert {name: float(mean.value()) for name, mean in means.items()} == pytest.approx(
        {
            "loss": 1.5,
            "router/aux_loss": 50 / 20,
            "router/z_loss": 100 / 20,
            "router/dropped": 4 / 40,
            # An even share is 5: the fullest have 10 and 5, twice and once it.
            "router/max_load": 1.5,
            "router/idle": 1 / 8,
        }
    )


def test_the_fullest_expert_is_sought_in_the_minibatch_not_in_its_microbatches():
    # Two microbatches that each favour another expert are even together.
    counts = [jnp.array([[4.0, 0.0]]), jnp.array([[0.0, 4.0]])]
    each = [Mean(x, jnp.float32(1)) for x in counts]
    finished = lambda mean: routers.finished({"router/counts": mean})
    value = lambda mean, name: float(finished(mean)[name].value())
    together = jax.tree.map(jnp.add, *each)
    assert value(each[0], "router/max_load") == 2
    assert value(together, "router/max_load") == 1
    assert value(each[0], "router/idle") == 0.5
    assert value(together, "router/idle") == 0


def test_models_without_experts_have_no_statistics_of_routers():
    means = {"loss": Mean(jnp.float32(1), jnp.float32(1))}
    assert routers.finished(means) is means


# -- in training -------------------------------------------------------------------


@functools.cache
def without_packing():
    """Loss, and gradient of loss + 0.3 aux + 0.05 z, rows as they are; with noise."""
    config, place = model(0.2), np.arange(WIDTH)
    segment_ids = (place < LENGTHS[:, None]).astype(np.int32)
    positions = np.broadcast_to(place, TOKENS.shape).astype(np.int32)
    rows = tuple(map(jnp.asarray, (TOKENS, positions, segment_ids)))

    def total(parameters):
        # Of the first minibatch of a step.
        key = jax.random.fold_in(jax.random.key(0), 0)
        hidden, sums = transformer.run(
            parameters, config, *rows, noise_keys=packed._noise_keys(key, *rows)
        )
        logits = heads.logits(parameters, config, hidden)
        ahead = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(ahead, TOKENS[:, 1:, None], axis=2)[:, :, 0]
        loss = -jnp.sum(jnp.where(MASK[:, 1:], chosen, 0.0)) / MASK.sum()
        num_pairs = LENGTHS.sum() * config.num_layers
        aux, z = sums.aux.sum() / num_pairs, sums.z.sum() / num_pairs
        return loss + AUX * aux + Z * z, (loss, aux, z)

    gradient, means = jax.jit(jax.grad(total, has_aux=True))(sharp_parameters(config))
    names = ("loss", "router/aux_loss", "router/z_loss")
    return gradient, dict(zip(names, map(float, means), strict=True))


def test_what_is_trained_on_is_the_loss_and_the_mean_losses_of_all_routers():
    gradient, means = step(pack_groups(LENGTHS, dealt(1)), jitter=0.2, seed=0)
    expected, others = without_packing()
    assert_equal((gradient, {name: means[name] for name in others}), (expected, others))


def packings_of(cut):
    """A number of microbatches, or the shape of the rows of one."""
    if isinstance(cut, int):
        return pack_groups(LENGTHS, dealt(cut), num_shards=4)
    num_rows, row_length = cut
    return pack_all(
        LENGTHS, num_rows=num_rows, row_length=row_length, num_shards=num_rows // 2
    )


@pytest.mark.parametrize(
    ("place", "cut"),
    [
        ("d1", 3),
        *(
            pytest.param(place, cut, marks=pytest.mark.slow)
            for place, cut in (
                *(("d1", (2, 90)), ("d1", (10, 31)), ("d2", (4, 48)), ("d4", 3)),
                *(("e2t2", 3), ("d2s2", 3), ("d2e2t2", (4, 48))),
            )
        ),
    ],
)
def test_noise_and_losses_of_routers_depend_on_no_rows_microbatches_or_devices(
    place, cut
):
    expected = step(pack_groups(LENGTHS, dealt(1)), jitter=0.2, seed=0)
    packings = packings_of(cut)
    assert len(packings) == (cut if isinstance(cut, int) else 1)
    assert_equal(step(packings, place, jitter=0.2, seed=0), expected)


def test_noise_and_losses_of_routers_do_not_depend_on_the_order_of_rows():
    expected = step(pack_groups(LENGTHS, dealt(1)), jitter=0.2, seed=0)
    order = np.random.default_rng(5).permutation(SIZE)
    arrays = {name: array[order] for name, array in ARRAYS.items()}
    packings = pack_groups(LENGTHS[order], dealt(1))
    assert_equal(step(packings, jitter=0.2, seed=0, arrays=arrays), expected)


def test_noise_is_another_in_each_step_and_minibatch():
    packings = pack_groups(LENGTHS, dealt(1))
    losses = [
        step(packings, jitter=0.2, seed=seed)[1]["router/z_loss"] for seed in (0, 1, 0)
    ]
    assert losses[0] == losses[2] != losses[1]
    # Both minibatches of a step are the same here, and have other noise.
    program = program_of(jitter=0.2)
    inputs = [
        program._router_inputs(
            batch_on("d1", ARRAYS), packings, [vars(packings[0])], jax.random.key(0), i
        )
        for i in (0, 1)
    ]
    first, second = (jax.random.key_data(one.noise_key) for one in inputs)
    assert (np.asarray(first) != np.asarray(second)).any()


def test_noise_is_another_in_each_layer():
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), (1, 2)))
    folded = [
        np.asarray(transformer._fold_in(keys, jnp.int32(index))) for index in (0, 1)
    ]
    assert (folded[0] != folded[1]).any(axis=-1).all()


def test_evaluation_has_no_noise():
    packings = pack_groups(LENGTHS, dealt(1))
    batch, parameters = batch_on("d1", ARRAYS), parameters_of()
    means = program_of(jitter=0.2).evaluate(parameters, batch, packings)
    logprobs = plain_logprobs(parameters, model(), TOKENS, LENGTHS)
    still = -logprobs[MASK].mean()
    assert float(means["loss"].value()) == pytest.approx(still, rel=1e-5)
    # With noise it is another.
    trained = step(packings, jitter=0.2, seed=0)[1]["loss"]
    assert abs(trained - still) > 1e-4


@pytest.mark.slow
def test_training_without_a_key_has_no_noise():
    packings = pack_groups(LENGTHS, dealt(1))
    _, means = step(packings, jitter=0.2)
    assert means == step(packings)[1]


@pytest.mark.slow
def test_inference_has_no_noise():
    packings = pack_groups(LENGTHS, dealt(1))
    tokens = {"tokens": batch_on("d1", ARRAYS)["tokens"]}
    found = [
        InferProgram(Infer(), model_on("d1", model(jitter)), mesh_of("d1"))(
            parameters_of(), tokens, packings
        )
        for jitter in (0.0, 0.2)
    ]
    np.testing.assert_array_equal(*(one["logprobs"] for one in found))
