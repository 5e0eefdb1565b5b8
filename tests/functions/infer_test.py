"""Infer: what a forward pass over packed rows says is what one over plain rows says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.functions.function import LANGUAGE_OUTPUTS, Infer
from realjax.functions.infer import InferProgram
from realjax.testing import tiny_batch, tiny_model
from tests.functions.plain import (
    batch_on,
    log_softmax,
    mesh_of,
    model_on,
    pack_all,
    pack_groups,
    parameters_on,
    plain_logits,
    plain_logprobs,
    plain_scalars,
    sharp_parameters,
)

VOCABULARY, SIZE, WIDTH = 64, 8, 24
LANGUAGE = tiny_model(VOCABULARY)
SCALAR = tiny_model(VOCABULARY, head="scalar")
BATCH = tiny_batch(SIZE, WIDTH, VOCABULARY)
TOKENS, LENGTHS = np.asarray(BATCH["tokens"]), BATCH.lengths
EXISTS = np.arange(WIDTH) < LENGTHS[:, None]
IS_CHOSEN = EXISTS & (np.arange(WIDTH) > 0)


def config_of(output):
    return LANGUAGE if output in LANGUAGE_OUTPUTS else SCALAR


@functools.cache
def program_of(output, temperature=1.0, dtype="float32", num_top=0):
    """A program and its parameters, on one device."""
    config = config_of(output)
    spec = Infer(output=output, temperature=temperature, num_top=num_top)
    program = InferProgram(spec, model_on("d1", config, dtype=dtype), mesh_of("d1"))
    return program, parameters_on("d1", config, sharp_parameters(config))


def inferred(output="logprobs", *, packings=None, options=(), **arrays):
    """What a program gives, as NumPy."""
    program, parameters = program_of(output, *options)
    batch = batch_on("d1", {"tokens": TOKENS, **arrays})
    found = program(parameters, batch, packings or pack_all(LENGTHS))
    return {name: np.asarray(value) for name, value in found.items()}


def expected_scalars():
    return np.asarray(plain_scalars(sharp_parameters(SCALAR), SCALAR, TOKENS))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_rows_that_were_never_packed(temperature):
    found = inferred(options=(temperature,))["logprobs"]
    expected = plain_logprobs(
        sharp_parameters(LANGUAGE), LANGUAGE, TOKENS, LENGTHS, temperature=temperature
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert not found[~IS_CHOSEN].any()
    assert (found[IS_CHOSEN] < 0).all()


def test_the_likeliest_tokens_are_those_that_might_have_stood_there():
    options = {
        "options": (0.7, "float32", 5),
        "packings": pack_all(LENGTHS, num_rows=2),
    }
    found = inferred("top_logprobs", **options)
    logits = np.float64(plain_logits(sharp_parameters(LANGUAGE), LANGUAGE, TOKENS))
    # Token t is chosen by the logits at token t - 1.
    expected = log_softmax(np.roll(logits, 1, axis=1) / 0.7)
    ids = np.argsort(-expected, axis=-1)[..., :5]
    np.testing.assert_array_equal(found["top_ids"][IS_CHOSEN], ids[IS_CHOSEN])
    expected = np.take_along_axis(expected, ids, axis=-1)
    np.testing.assert_allclose(
        found["top_logprobs"][IS_CHOSEN], expected[IS_CHOSEN], atol=2e-5
    )
    for value in found.values():
        assert value.shape == (SIZE, WIDTH, 5)
        assert not value[~IS_CHOSEN].any()


@pytest.mark.parametrize(("output", "num_top"), [("top_logprobs", 0), ("values", 3)])
def test_a_number_of_tokens_belongs_to_the_likeliest_ones(output, num_top):
    with pytest.raises(ValueError, match=f"num_top is {num_top} and the output"):
        Infer(output=output, num_top=num_top)


def test_a_value_is_of_the_state_before_its_token():
    found, scalars = inferred("values"), expected_scalars()
    # Token t is chosen in the state that token t - 1 leaves behind.
    expected = np.where(IS_CHOSEN, np.roll(scalars, 1, axis=1), 0.0)
    np.testing.assert_allclose(found["values"], expected, atol=1e-5)
    # And what comes after the last token is valued where that token stands.
    last = scalars[np.arange(SIZE), LENGTHS - 1]
    np.testing.assert_allclose(found["bootstrap_values"], last, atol=1e-5)


def test_a_score_is_the_head_at_the_last_real_token():
    found, scalars = inferred("scores")["scores"], expected_scalars()
    last = scalars[np.arange(SIZE), LENGTHS - 1]
    np.testing.assert_allclose(found, last, atol=1e-5)
    # Not at the last place of the row, which for short ones is padding.
    is_short = LENGTHS < WIDTH
    assert (np.abs(found - scalars[:, -1])[is_short] > 1e-3).all()


def packings_of_many_kinds():
    """Name and microbatches, all of one shape."""
    rows = range(SIZE)
    return {
        "one microbatch": pack_groups(LENGTHS, [rows]),
        "two": pack_groups(LENGTHS, [rows[::2], rows[1::2]]),
        "three, out of order": pack_groups(LENGTHS, [[6, 1], [0, 5, 7, 2], [4, 3]]),
        "one a sequence": pack_groups(LENGTHS, [[row] for row in rows]),
    }


def test_outputs_do_not_depend_on_the_shape_of_rows():
    wide = inferred(packings=pack_all(LENGTHS, num_rows=2, row_length=64))
    np.testing.assert_allclose(wide["logprobs"], inferred()["logprobs"], atol=1e-5)


@pytest.mark.parametrize("output", ["logprobs", "values", "scores"])
def test_outputs_do_not_depend_on_the_packing(output):
    expected = inferred(output)
    for kind, packings in packings_of_many_kinds().items():
        for name, value in inferred(output, packings=packings).items():
            np.testing.assert_allclose(
                value, expected[name], atol=1e-5, err_msg=f"{kind}: {name}"
            )


def test_tokens_behind_a_sequence_are_not_looked_at():
    noise = np.random.default_rng(1).integers(2, VOCABULARY, TOKENS.shape, np.int32)
    disturbed = np.where(EXISTS, TOKENS, noise)
    found, expected = inferred(tokens=disturbed), inferred()
    np.testing.assert_array_equal(found["logprobs"], expected["logprobs"])


def test_rows_without_tokens_get_zeros_and_disturb_nobody():
    lengths = LENGTHS.copy()
    lengths[[1, 6]] = 0
    for output in ("logprobs", "values", "scores"):
        found = inferred(output, packings=pack_all(lengths))
        for name, expected in inferred(output).items():
            assert not found[name][[1, 6]].any()
            others = [0, 2, 3, 4, 5, 7]
            np.testing.assert_allclose(found[name][others], expected[others], atol=1e-5)


# -- sets of tokens kept -----------------------------------------------------------


def sets_kept(kind):
    """Random sets that hold the token itself, their packed form, and as bool."""
    generator = np.random.default_rng(2)
    is_kept = generator.random((SIZE, WIDTH, VOCABULARY)) < 0.1
    np.put_along_axis(is_kept, TOKENS[:, :, None], True, axis=2)
    is_kept[3] = True  # An empty set below: the whole vocabulary.
    if kind == "bits":
        words = is_kept.reshape(SIZE, WIDTH, -1, 32).astype(np.uint64)
        kept = (words << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)
        kept[3] = 0
        return kept, is_kept
    most = int(is_kept[np.arange(SIZE) != 3].sum(-1).max())
    order = np.argsort(~is_kept, axis=-1, kind="stable")[:, :, :most]
    held = np.take_along_axis(is_kept, order, axis=-1)
    kept = np.where(held, order, -1).astype(np.int32)
    kept[3] = -1
    return kept, is_kept


@pytest.mark.parametrize("kind", ["ids", "bits"])
def test_logprobs_are_normalised_over_the_set_kept_at_each_token(kind):
    kept, is_kept = sets_kept(kind)
    found = inferred(kept=kept, options=(0.7,))["logprobs"]
    expected = plain_logprobs(
        sharp_parameters(LANGUAGE),
        LANGUAGE,
        TOKENS,
        LENGTHS,
        temperature=0.7,
        is_kept=is_kept,
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    # About 6 of 64 tokens are kept, so a sum over all of them would be far off.
    whole = inferred(options=(0.7,))["logprobs"]
    rows = np.arange(SIZE) != 3
    assert (found - whole)[rows][IS_CHOSEN[rows]].mean() > 0.5
    np.testing.assert_allclose(found[3], whole[3], atol=1e-6)


def test_a_token_outside_its_set_is_impossible():
    kept, _ = sets_kept("ids")
    kept = np.where(kept == TOKENS[:, :, None], -1, kept)
    kept[:, :, 0] = np.where(TOKENS == 2, 3, 2)  # Some set, without the token.
    found = inferred(kept=kept, options=(0.7,))["logprobs"]
    assert (found[IS_CHOSEN] == -np.inf).all()
    assert not found[~IS_CHOSEN].any()


# -- types, devices, compilation ---------------------------------------------------


def test_bfloat16_products_give_float32_logprobs_near_the_exact_ones():
    found = inferred(options=(1.0, "bfloat16"))["logprobs"]
    assert found.dtype == np.float32
    difference = np.abs(found - inferred()["logprobs"])[IS_CHOSEN]
    # Eight bits of mantissa: logits of size 5 are off by about 0.02.
    assert 1e-5 < difference.max() < 0.3
    # A log-probability that had been rounded itself would have 16 zero bits.
    assert (found[IS_CHOSEN].view(np.uint32) & 0xFFFF).any()


PLACES = [
    "d2t2",
    pytest.param("f4", marks=pytest.mark.slow),
    pytest.param("d2f2t2", marks=pytest.mark.slow),
    pytest.param("t4", marks=pytest.mark.slow),  # More parts than 2 kv heads.
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "output", ["logprobs", pytest.param("values", marks=pytest.mark.slow), "scores"]
)
def test_outputs_on_a_mesh_are_those_of_one_device_and_split_by_rows(output, place):
    config, mesh = config_of(output), mesh_of(place)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    program = InferProgram(Infer(output=output), model_on(place, config), mesh)
    parameters = parameters_on(place, config, sharp_parameters(config))
    arrays = {"tokens": TOKENS}
    if output == "logprobs":
        arrays["kept"], _ = sets_kept("ids")
    batch = batch_on(place, arrays)
    packings = pack_all(LENGTHS, num_shards=shards)
    found = program(parameters, batch, packings)
    expected = inferred(output, **arrays)
    for name, value in found.items():
        assert value.addressable_shards[0].data.shape[0] == SIZE // shards
        np.testing.assert_allclose(value, expected[name], atol=2e-5)


def test_other_lengths_and_more_microbatches_compile_nothing_new():
    program = InferProgram(Infer(), model_on("d1", LANGUAGE), mesh_of("d1"))
    parameters = parameters_on("d1", LANGUAGE, sharp_parameters(LANGUAGE))
    for seed in range(3):
        batch = tiny_batch(SIZE, WIDTH, VOCABULARY, seed)
        arrays = batch_on("d1", {"tokens": batch["tokens"]})
        packings = pack_all(batch.lengths, num_rows=2)
        assert len(packings) > 1
        jax.block_until_ready(program(parameters, arrays, packings))
        assert program._fill._cache_size() == 1


def test_what_is_filled_is_the_callers_from_then_on():
    # Outputs are donated from one microbatch to the next; inputs are not.
    program = InferProgram(Infer(), model_on("d1", LANGUAGE), mesh_of("d1"))
    parameters = parameters_on("d1", LANGUAGE, sharp_parameters(LANGUAGE))
    batch = batch_on("d1", {"tokens": TOKENS})
    first = program(parameters, batch, pack_all(LENGTHS))
    second = program(parameters, batch, pack_all(LENGTHS))
    np.testing.assert_array_equal(first["logprobs"], second["logprobs"])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(parameters))
    assert jnp.all(batch["tokens"] == TOKENS)
