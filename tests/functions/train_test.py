"""Train: one number and one gradient, however the minibatch was cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import tree_utils

from realjax.algorithms import reward_model, sft
from realjax.functions.function import Train
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.packed import packing_arrays
from realjax.functions.train import TrainProgram
from realjax.models import heads
from realjax.rl.masking import Mean
from realjax.testing import tiny_batch, tiny_model
from tests.functions.plain import (
    batch_on,
    log_softmax,
    mesh_of,
    model_on,
    pack_all,
    pack_groups,
    parameters_on,
    plain_hidden,
    plain_logits,
    plain_scalars,
    sharp_parameters,
)

SIZE, WIDTH = 8, 24
LANGUAGE, SCALAR = tiny_model(), tiny_model(head="scalar")
BATCH = tiny_batch(SIZE, WIDTH)
TOKENS, LENGTHS = np.asarray(BATCH["tokens"]), BATCH.lengths
MASK = np.asarray(BATCH["completion_mask"])
PREFERENCES = {
    "tokens": TOKENS,
    # A prompt of two pairs and one of one; the last pair is padding.
    "pair_weights": np.repeat([0.5, 0.5, 1.0, 0.0], 2).astype(np.float32),
}
PAIR_LENGTHS = np.where(np.arange(SIZE) < 6, LENGTHS, 0).astype(np.int32)

# Half of a gradient is the first moment after one update, without rounding.
CONFIG = OptimizerConfig(
    learning_rate=1e-2, beta1=0.5, clip_norm=0.0, warmup_fraction=0.0
)
SFT = sft.graph(sft.SFT()).calls["train_policy"].function
REWARD = reward_model.graph(reward_model.RewardModel()).calls["train_reward"].function


@functools.cache
def program_of(spec, place="d1", dtype="float32", config=CONFIG, num_updates=100):
    model = LANGUAGE if spec.output == "logprobs" else SCALAR
    program = model_on(place, model, dtype=dtype)
    return TrainProgram(spec, program, mesh_of(place), config, num_updates)


def fresh(program, place="d1"):
    """A state that an update may consume."""
    config = program.program.config
    parameters = parameters_on(place, config, sharp_parameters(config))
    return program.init_optimizer(parameters)


def arrays_of(program, tokens=TOKENS, mask=MASK):
    if program.spec.output == "scores":
        return dict(PREFERENCES)
    return {"tokens": tokens, "completion_mask": mask}


def step(program, packings, arrays=None, place="d1"):
    """One update: state, gradient as float64, means as numbers."""
    batch = batch_on(place, arrays or arrays_of(program))
    state, (report,) = program(fresh(program, place), batch, [packings])
    moments = tree_utils.tree_get(state.optimizer, "mu")
    gradient = jax.tree.map(lambda m: 2 * np.asarray(m, np.float64), moments)
    return state, gradient, {k: float(mean.value()) for k, mean in report.items()}


def assert_gradients_equal(found, expected, tolerance=2e-5):
    """Each leaf to a part of its own size."""
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
        name, size = jax.tree_util.keystr(path), np.abs(b).max()
        assert size > 0, f"{name} has no gradient"
        np.testing.assert_allclose(a, b, atol=tolerance * size, rtol=0, err_msg=name)


def dealt(num_groups, unit=1):
    """Rows dealt to groups like cards, in units: groups of unlike tokens."""
    units = np.arange(SIZE).reshape(-1, unit)
    return [units[index::num_groups].ravel().tolist() for index in range(num_groups)]


@functools.cache
def without_packing():
    """Loss and gradient of the mean over all completion tokens, rows as they are."""

    def loss(parameters):
        hidden = plain_hidden(parameters, LANGUAGE, TOKENS)
        logits = heads.logits(parameters, LANGUAGE, hidden)
        ahead = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(ahead, TOKENS[:, 1:, None], axis=2)[:, :, 0]
        return -jnp.sum(jnp.where(MASK[:, 1:], chosen, 0.0)) / MASK.sum()

    return jax.jit(jax.value_and_grad(loss))(sharp_parameters(LANGUAGE))


# -- one mean over the minibatch ---------------------------------------------------


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 5])
def test_loss_and_gradient_are_a_mean_over_all_tokens_of_the_minibatch(
    num_microbatches,
):
    groups = dealt(num_microbatches)
    _, gradient, means = step(program_of(SFT), pack_groups(LENGTHS, groups))
    loss, expected = without_packing()
    assert means["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert_gradients_equal(gradient, expected)
    squares = sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(expected))
    assert means["grad_norm"] == pytest.approx(float(np.sqrt(squares)), rel=1e-5)


def test_a_mean_of_microbatch_means_would_be_another_number():
    # So that the test above can fail: ReaL averages these.
    _, _, whole = step(program_of(SFT), pack_groups(LENGTHS, dealt(1)))
    parts = [
        step(program_of(SFT), pack_groups(LENGTHS, [group]))[2]["loss"]
        for group in dealt(3)
    ]
    assert abs(np.mean(parts) - whole["loss"]) > 1e-3


def test_every_metric_is_the_same_for_any_number_of_microbatches():
    _, _, one = step(program_of(SFT), pack_groups(LENGTHS, dealt(1)))
    _, _, five = step(program_of(SFT), pack_groups(LENGTHS, dealt(5)))
    assert set(one) == {
        *("loss", "ppl", "entropy"),
        *("grad_norm", "learning_rate", "skipped", "nonfinite"),
    }
    assert five == pytest.approx(one, rel=1e-5)


def test_gradients_do_not_depend_on_the_order_of_rows_nor_on_padding_rows():
    lengths, program = np.where(np.arange(SIZE) < 6, LENGTHS, 0), program_of(SFT)
    _, expected, before = step(program, pack_groups(lengths, dealt(1)))
    # The same six in another order, with two rows of padding among them whose places
    # hold what they like.
    order = np.random.default_rng(3).permutation(6)
    arrays = {
        "tokens": np.insert(TOKENS[order], [2, 4], 5, axis=0),
        "completion_mask": np.insert(MASK[order], [2, 4], True, axis=0),
    }
    lengths = np.insert(LENGTHS[order], [2, 4], 0)
    _, gradient, means = step(program, pack_groups(lengths, dealt(1)), arrays)
    assert means == pytest.approx(before, rel=1e-5)
    assert_gradients_equal(gradient, expected)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_rows": 1, "row_length": 40},
        pytest.param({"num_rows": 1, "row_length": 24}, marks=pytest.mark.slow),
        pytest.param({"num_rows": 1, "row_length": 200}, marks=pytest.mark.slow),
        pytest.param({"num_rows": 7, "max_sequences": 7}, marks=pytest.mark.slow),
    ],
)
def test_gradients_do_not_depend_on_the_shape_of_rows(shape):
    packings = pack_all(LENGTHS, **shape)
    _, gradient, means = step(program_of(SFT), packings)
    _, expected, before = step(program_of(SFT), pack_groups(LENGTHS, dealt(1)))
    assert means == pytest.approx(before, rel=1e-5)
    assert_gradients_equal(gradient, expected)


def test_gradients_are_added_in_float32_where_products_are_bfloat16():
    # Gradients of single microbatches, added in float64, against the program's sum.
    # Sums kept in bfloat16 would be off by up to 2^-9 = 2e-3 of their size each time.
    program, groups = program_of(SFT, dtype="bfloat16"), dealt(5)
    _, gradient, _ = step(program, pack_groups(LENGTHS, groups))
    expected = jax.tree.map(np.zeros_like, gradient)
    for group in groups:
        _, part, _ = step(program, pack_groups(LENGTHS, [group]))
        share = MASK[group].sum() / MASK.sum()
        expected = jax.tree.map(
            lambda total, leaf, share=share: total + share * leaf, expected, part
        )
    assert_gradients_equal(gradient, expected, tolerance=1e-6)
    # The products themselves were of bfloat16.
    _, exact, _ = step(program_of(SFT), pack_groups(LENGTHS, groups))
    with pytest.raises(AssertionError):
        assert_gradients_equal(gradient, exact, tolerance=1e-4)


def test_sums_over_tokens_are_not_rounded_to_bfloat16_before_they_are_added_up():
    # ReaL reduces bfloat16 gradients over devices. The lower half of a float32 is zero
    # where a number went through bfloat16.
    program = program_of(SFT, dtype="bfloat16")
    (packing,) = pack_groups(LENGTHS, dealt(1))
    batch, index = batch_on("d1", arrays_of(program)), packing_arrays(packing)
    parameters = fresh(program).parameters
    sums = program._zeros(parameters, batch, index)
    gradient, _ = program._accumulate(parameters, sums, batch, index)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        low = np.asarray(leaf).view(np.uint32) & 0xFFFF
        # Of the embedding, most rows are of a token that occurs once.
        assert (low != 0).mean() > 0.1, jax.tree_util.keystr(path)


def test_masters_and_moments_stay_float32_with_bfloat16_products():
    program = program_of(SFT, dtype="bfloat16")
    state, _, _ = step(program, pack_groups(LENGTHS, dealt(5)))
    floats = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


# -- the losses of two algorithms --------------------------------------------------


def test_sft_reports_nats_per_token_and_perplexity_per_sequence():
    logits = plain_logits(sharp_parameters(LANGUAGE), LANGUAGE, TOKENS)
    logprobs, found = log_softmax(logits), np.zeros(TOKENS.shape)
    found[:, 1:] = np.take_along_axis(logprobs[:, :-1], TOKENS[:, 1:, None], 2)[:, :, 0]
    _, _, means = step(program_of(SFT), pack_groups(LENGTHS, dealt(2)))
    assert means["loss"] == pytest.approx(-found[MASK].mean(), rel=1e-5)
    rows = zip(found, MASK, strict=True)
    per_sequence = [np.exp(-row[mask].mean()) for row, mask in rows]
    assert means["ppl"] == pytest.approx(np.mean(per_sequence), rel=1e-5)
    # Of the distribution each completion token was chosen from.
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)
    entropy = np.roll(entropy, 1, axis=1)[MASK].mean()
    assert means["entropy"] == pytest.approx(entropy, rel=1e-5)


def expected_preferences():
    """Loss and metrics of three real pairs, in float64."""
    scalars = plain_scalars(sharp_parameters(SCALAR), SCALAR, TOKENS)
    scores = np.asarray(scalars, np.float64)[np.arange(SIZE), LENGTHS - 1]
    chosen, rejected = scores[:6:2], scores[1:6:2]
    weights, margins = np.array([0.5, 0.5, 1.0]), chosen - rejected
    return {
        # 2 prompts: the first one's two pairs count half each.
        "loss": (weights * np.log1p(np.exp(-margins))).sum() / 2,
        "accuracy": (margins > 0).mean(),
        "margin": margins.mean(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
    }


@pytest.mark.parametrize("num_microbatches", [1, 2, 3])
def test_reward_modelling_is_a_mean_over_prompts_however_they_are_cut(num_microbatches):
    packings = pack_groups(PAIR_LENGTHS, dealt(num_microbatches, unit=2), unit=2)
    _, gradient, means = step(program_of(REWARD), packings)
    expected = expected_preferences()
    assert {name: means[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    _, whole, _ = step(program_of(REWARD), pack_groups(PAIR_LENGTHS, dealt(1), unit=2))
    assert_gradients_equal(gradient, whole)


def test_a_small_step_lowers_the_loss_of_a_reward_model_by_its_gradient():
    # The directional derivative of the mean along its own gradient is its square.
    program = program_of(REWARD)
    packings = pack_groups(PAIR_LENGTHS, dealt(1), unit=2)
    _, gradient, means = step(program, packings)
    rate = 1e-3 / means["grad_norm"] ** 2
    moved = jax.tree.map(
        lambda p, g: p - jnp.float32(rate) * jnp.asarray(g, jnp.float32),
        sharp_parameters(SCALAR),
        gradient,
    )
    found = program.evaluate(moved, batch_on("d1", PREFERENCES), packings)["loss"]
    assert means["loss"] - float(found.value()) == pytest.approx(1e-3, rel=0.05)


# -- updates that do not happen ----------------------------------------------------


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def fragile_loss(logprobs, batch):
    """Finite and smooth where both factors of every row are 1."""
    scaled = logprobs * batch["factor"][:, None]
    # Where this factor is 0 the root is 0 too, and its slope 0 / 0.
    root = jnp.sqrt(jnp.square(logprobs * batch["root_factor"][:, None]))
    mask = batch["completion_mask"]
    return Mean.over(root - scaled, mask), {
        "length": Mean.over(batch["length"], jnp.ones_like(batch["length"]))
    }


def is_long(metrics):
    return metrics["length"] > 2.0


KNOBS = ("factor", "root_factor", "length")
FRAGILE = Train(
    loss=fragile_loss, skip=is_long, reads=("tokens", "completion_mask", *KNOBS)
)


def knobs(**changes):
    """Keys of the fragile loss: ones, but for the changes."""
    ones = dict.fromkeys(KNOBS, np.ones(SIZE, np.float32))
    return {"tokens": TOKENS, "completion_mask": MASK, **ones, **changes}


def test_a_skipped_update_changes_no_bit_and_is_counted():
    program, packings = program_of(FRAGILE), pack_groups(LENGTHS, dealt(1))
    state = fresh(program)
    before, is_same, reports = bits(state), [], []
    for length in (1.0, 3.0, 1.0):
        arrays = knobs(length=np.full(SIZE, length, np.float32))
        state, (report,) = program(state, batch_on("d1", arrays), [packings])
        is_same.append(bits(state) == before)
        before = bits(state)
        reports.append({name: float(mean.value()) for name, mean in report.items()})
    # Parameters, both moments and the counters: only where the length is 3.
    assert is_same == [False, True, False]
    assert [report["skipped"] for report in reports] == [0, 1, 0]
    assert [report["nonfinite"] for report in reports] == [0, 0, 0]
    # A skipped update does not move the schedule on either.
    rates = [report["learning_rate"] for report in reports]
    assert rates[0] > rates[1] == rates[2]


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("factor", np.nan),
        ("factor", np.inf),
        ("factor", 1e38),  # Each token is finite; their sum and the gradient are not.
        ("root_factor", 0.0),  # The loss is finite, the gradient is not.
    ],
)
def test_a_non_finite_loss_or_gradient_changes_nothing_and_is_reported(knob, value):
    program, packings = program_of(FRAGILE), pack_groups(LENGTHS, dealt(5))
    values = np.ones(SIZE, np.float32)
    values[4] = value  # In one of five microbatches.
    state, _, means = step(program, packings, knobs(**{knob: values}))
    assert bits(state) == bits(fresh(program))
    assert means["nonfinite"] == means["skipped"] == 1
    assert not np.isfinite(means["grad_norm"])
    assert np.isfinite(means["loss"]) == (knob == "root_factor")


def test_an_update_without_a_reason_to_skip_it_happens():
    program = program_of(FRAGILE)
    state, _, means = step(program, pack_groups(LENGTHS, dealt(5)), knobs())
    assert bits(state) != bits(fresh(program))
    assert means["nonfinite"] == means["skipped"] == 0


def test_a_minibatch_in_which_nothing_counts_changes_nothing():
    program = program_of(SFT)
    arrays = {"tokens": TOKENS, "completion_mask": np.zeros_like(MASK)}
    state, _, means = step(program, pack_groups(LENGTHS, dealt(1)), arrays)
    # Not even by weight decay.
    assert bits(state) == bits(fresh(program))
    assert (means["skipped"], means["nonfinite"], means["loss"]) == (1, 0, 0)
