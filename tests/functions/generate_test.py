"""Generate: completions of a loop without pages, masks, and what a row sees."""

import functools

import jax
import numpy as np
import pytest

from realjax.functions.function import Generate
from realjax.functions.generate import GenerateProgram
from realjax.rl.sampling import Sampling
from realjax.rollout.settings import Settings
from realjax.testing import tiny_model
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    parameters_on,
    plain_logits,
    sharp_parameters,
)

CONFIG = tiny_model()
PARAMETERS = functools.cache(
    lambda: parameters_on("d1", CONFIG, sharp_parameters(CONFIG))
)
WIDTH, LIMIT = 24, 12
LENGTHS = np.array([5, 1, 8, 3, 8, 2, 7, 4], np.int32)
PROMPTS = np.random.default_rng(0).integers(2, 64, (8, 8), np.int32)
IDS = np.array([3, 14, 15, 92, 65, 35, 89, 79], np.uint32)
# A quarter of the vocabulary ends a completion, so that lengths are ragged.
EOS = tuple(range(0, 64, 4))
KEY = functools.cache(lambda: jax.random.key(7))
SAMPLED = Sampling(temperature=0.9, max_new_tokens=LIMIT)


@functools.cache
def program_of(sampling=SAMPLED, *, eos=EOS, rows=8, group=1, place="d1", **options):
    spec = Generate(sampling=sampling, completions_per_prompt=group)
    settings = Settings(slots=rows, page_size=4, steps=3)
    options = {"settings": settings, "width": WIDTH, "eos_ids": eos, **options}
    return GenerateProgram(spec, model_on(place, CONFIG), mesh_of(place), **options)


def generated(program, lengths=LENGTHS, prompts=PROMPTS, ids=IDS, key=None):
    """A rollout of one device, as NumPy arrays."""
    inputs = {"prompts": prompts, "lengths": lengths, "ids": ids}
    rollout = program(PARAMETERS(), inputs, KEY() if key is None else key)
    return type(rollout)(*(None if x is None else np.asarray(x) for x in rollout))


@functools.cache
def sampled():
    """Most tests' first rollout: eight prompts at a temperature of 0.9."""
    return generated(program_of())


def completions(rollout):
    """Ids of each completion."""
    return [
        row[mask].tolist()
        for row, mask in zip(rollout.tokens, rollout.completion_mask, strict=True)
    ]


def assert_same(found, expected):
    """Equal completions; log-probabilities up to rounding."""
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.completion_mask, expected.completion_mask)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_array_equal(found.is_truncated, expected.is_truncated)
    np.testing.assert_allclose(found.old_logprobs, expected.old_logprobs, atol=2e-5)


def greedy_loop(prompt, eos, min_new_tokens=0, max_new_tokens=LIMIT):
    """One full forward pass a token, most likely first; ids and log-probabilities."""
    tokens, logprobs = list(prompt), []
    while len(logprobs) < max_new_tokens:
        padded = np.zeros((1, WIDTH), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = plain_logits(PARAMETERS(), CONFIG, padded)[0, len(tokens) - 1]
        logits = np.array(logits, np.float64)
        if len(logprobs) < min_new_tokens:
            logits[list(eos)] = -np.inf
        chosen = int(logits.argmax())
        logprobs.append(logits[chosen] - np.log(np.exp(logits).sum()))
        tokens.append(chosen)
        if chosen in eos:
            break
    return tokens[len(prompt) :], logprobs


# -- what is generated -------------------------------------------------------------


@pytest.mark.parametrize("min_new_tokens", [0, 5])
def test_greedy_completions_are_those_of_a_loop_without_a_cache(min_new_tokens):
    sampling = Sampling(
        greedy=True, min_new_tokens=min_new_tokens, max_new_tokens=LIMIT
    )
    found = generated(program_of(sampling))
    for row, length in enumerate(LENGTHS):
        prompt = PROMPTS[row, :length]
        expected, logprobs = greedy_loop(prompt, EOS, min_new_tokens)
        assert completions(found)[row] == expected
        mask = found.completion_mask[row]
        np.testing.assert_allclose(found.old_logprobs[row][mask], logprobs, atol=2e-5)
        assert found.tokens[row, :length].tolist() == prompt.tolist()
    # Some end at once, some late, some not at all: the comparison is worth something.
    assert len(set(map(len, completions(found)))) >= 3


def test_a_rollout_is_prompt_completion_and_zeros():
    found, place = sampled(), np.arange(WIDTH)[None, :]
    count = found.completion_mask.sum(axis=1)
    start = LENGTHS[:, None]
    np.testing.assert_array_equal(found.lengths, LENGTHS + count)
    np.testing.assert_array_equal(
        found.completion_mask, (place >= start) & (place < start + count[:, None])
    )
    is_prompt = place[:, :8] < start
    np.testing.assert_array_equal(found.tokens[:, :8][is_prompt], PROMPTS[is_prompt])
    assert not found.tokens[place >= start + count[:, None]].any()
    assert not found.old_logprobs[~found.completion_mask].any()
    assert (found.old_logprobs[found.completion_mask] < 0).all()


def test_a_completion_ends_at_its_first_end_token_or_is_truncated():
    ends, found = set(), sampled()
    for row, tokens in enumerate(completions(found)):
        assert 1 <= len(tokens) <= LIMIT
        assert not set(tokens[:-1]) & set(EOS)
        assert found.is_truncated[row] == (tokens[-1] not in EOS)
        assert not found.is_truncated[row] or len(tokens) == LIMIT
        ends.add(tokens[-1])
    # Several of the ids that end a completion did so, at several lengths.
    assert len(ends & set(EOS)) >= 2
    assert len(set(found.lengths - LENGTHS)) >= 3


def test_without_an_end_token_every_completion_has_the_greatest_length():
    found = generated(program_of(eos=()))
    assert [len(tokens) for tokens in completions(found)] == [LIMIT] * 8
    assert found.is_truncated.all()


def test_an_end_at_the_last_possible_token_is_not_truncated():
    for seed in range(100):
        found = generated(program_of(), key=jax.random.key(seed))
        is_last = found.completion_mask.sum(axis=1) == LIMIT
        is_end = np.array([tokens[-1] in EOS for tokens in completions(found)])
        if (is_last & is_end).any():
            break
    assert (is_last & is_end).any()
    assert not found.is_truncated[is_last & is_end].any()


@pytest.mark.slow
@pytest.mark.parametrize("minimum", [1, 4, LIMIT])
def test_no_completion_ends_before_its_least_length(minimum):
    sampling = Sampling(min_new_tokens=minimum, max_new_tokens=LIMIT)
    found = completions(generated(program_of(sampling)))
    assert min(map(len, found)) >= minimum
    assert not {token for tokens in found for token in tokens[: minimum - 1]} & set(EOS)


def test_lengths_are_right_where_padding_is_an_end_token():
    # Token 0 is both, and stands inside prompts too.
    assert 0 in EOS
    prompts = np.where(np.arange(8) < LENGTHS[:, None], PROMPTS, 0)
    prompts[2, 3] = 0
    found = generated(program_of(), prompts=prompts)
    others = np.arange(8) != 2
    np.testing.assert_array_equal(found.lengths[others], sampled().lengths[others])
    assert found.lengths[2] > LENGTHS[2]
    np.testing.assert_array_equal(found.tokens[2, :8], prompts[2])
    # Completions of token 0 alone count as one token.
    assert (found.lengths - LENGTHS == found.completion_mask.sum(axis=1)).all()


# -- what a row depends on ---------------------------------------------------------


def test_what_stands_behind_a_prompt_is_not_looked_at():
    behind = np.arange(8) >= LENGTHS[:, None]
    found = generated(program_of(), prompts=np.where(behind, 63, PROMPTS))
    assert_same(found, sampled())


def test_a_wider_bucket_gives_the_same_completions():
    # Of 16 slots, 8 stay empty: prompt and completion still fit in a row.
    wide = np.pad(PROMPTS, ((0, 0), (0, 8)))
    assert_same(generated(program_of(), prompts=wide), sampled())


def test_a_row_is_the_same_in_any_order_of_the_batch():
    order = np.random.default_rng(1).permutation(8)
    found = generated(program_of(), LENGTHS[order], PROMPTS[order], IDS[order])
    expected = sampled()
    assert_same(found, type(found)(*(x if x is None else x[order] for x in expected)))


def test_a_row_does_not_depend_on_the_others():
    # Rows 0 and 5 stay; the others become other prompts of other data.
    stays = np.isin(np.arange(8), [0, 5])
    prompts = np.where(stays[:, None], PROMPTS, 65 - PROMPTS).astype(np.int32)
    lengths = np.where(stays, LENGTHS, 9 - LENGTHS).astype(np.int32)
    ids = np.where(stays, IDS, IDS + 100).astype(np.uint32)
    found, expected = generated(program_of(), lengths, prompts, ids), sampled()
    for row in (0, 5):
        assert completions(found)[row] == completions(expected)[row]
    assert completions(found)[1] != completions(expected)[1]


def test_draws_differ_by_the_id_of_the_data_and_by_the_key():
    program, lengths = program_of(eos=()), np.full(8, 8, np.int32)
    found = generated(program, lengths, np.tile(PROMPTS[2:3], (8, 1)))
    assert len({tuple(tokens) for tokens in completions(found)}) == 8
    other = generated(program_of(), key=jax.random.key(8))
    assert (other.tokens != sampled().tokens).any()


def test_rows_of_padding_yield_nothing():
    lengths = LENGTHS.copy()
    lengths[[0, 6]] = 0
    found, expected = generated(program_of(), lengths), sampled()
    for row in (0, 6):
        assert found.lengths[row] == 0
        assert not found.is_truncated[row]
        for values in (found.tokens, found.completion_mask, found.old_logprobs):
            assert not values[row].any()
    for row in (1, 2, 3, 4, 5, 7):
        assert completions(found)[row] == completions(expected)[row]


# -- slots and groups ------------------------------------------------------------------


@pytest.mark.parametrize(
    "slots", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 16))]
)
def test_any_number_of_slots_gives_the_same_completions(slots):
    assert_same(generated(program_of(rows=slots)), sampled())


@pytest.mark.parametrize("rows", [8, pytest.param(7, marks=pytest.mark.slow)])
def test_completions_of_a_prompt_stand_together_and_differ(rows):
    found = generated(program_of(group=3, rows=rows))
    np.testing.assert_array_equal(found.tokens[::3, :1], PROMPTS[:, :1])
    np.testing.assert_array_equal(found.tokens[1::3, :1], PROMPTS[:, :1])
    # The first of a group is what a group of one would be.
    firsts = type(found)(*(x if x is None else x[::3] for x in found))
    assert_same(firsts, sampled())
    groups = [completions(found)[i : i + 3] for i in range(0, 24, 3)]
    assert sum(len({tuple(c) for c in group}) > 1 for group in groups) >= 7


def test_a_prompt_and_completion_wider_than_a_row_are_refused():
    program = program_of(width=19)
    with pytest.raises(ValueError, match=r"prompt of 8 tokens.*up to 12.*rows of 19"):
        generated(program)


# -- the engine ------------------------------------------------------------------------


def test_launches_end_with_the_longest_completion():
    program, seen = program_of(), set()
    for num_rows in (0, 1, 2, 5, 8):
        found = generated(program, np.where(np.arange(8) < num_rows, LENGTHS, 0))
        longest = int(found.completion_mask.sum(axis=1).max())
        work = program.engine.work
        # One launch more is under way when the host reads that all have ended.
        assert -(-longest // 3) <= work.num_launches <= -(-longest // 3) + 1
        assert work.num_tokens == found.completion_mask.sum()
        seen.add(work.num_launches)
    assert min(seen) == 0 < max(seen)


def test_other_lengths_and_data_compile_nothing_new():
    program = program_of.__wrapped__(rows=3)
    inputs = {"prompts": PROMPTS, "lengths": LENGTHS, "ids": IDS}
    program.warm_up(PARAMETERS(), inputs)
    compiled = program.engine.programs.num_compiled
    for shift in range(3):
        generated(program, np.roll(LENGTHS, shift), ids=IDS + np.uint32(shift))
        assert program.engine.programs.num_compiled == compiled
    assert program.engine.num_pools == 1


@pytest.mark.parametrize(
    "place",
    [
        "d2t2",
        pytest.param("f4", marks=pytest.mark.slow),
        pytest.param("d2f2t2", marks=pytest.mark.slow),
        pytest.param("t4", marks=pytest.mark.slow),  # More parts than 2 kv heads.
    ],
)
@pytest.mark.parametrize("rows", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_a_mesh_generates_the_tokens_of_one_device(place, rows):
    program = program_of(place=place, rows=rows)
    parameters = parameters_on(place, CONFIG, PARAMETERS())
    inputs = {"lengths": LENGTHS, "ids": IDS} | batch_on(place, {"prompts": PROMPTS})
    rollout = program(parameters, inputs, KEY())
    assert_same(
        type(rollout)(*(x if x is None else np.asarray(x) for x in rollout)), sampled()
    )
    mesh = mesh_of(place)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for leaf in jax.tree.leaves(rollout):
        assert leaf.addressable_shards[0].data.shape[0] == 8 // shards
