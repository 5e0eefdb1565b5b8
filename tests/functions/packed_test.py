"""Batches to packed rows and back, and what a model is asked for in between."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.data.packing import pack
from realjax.functions import packed
from realjax.functions.function import Generate, Infer, is_filtered
from realjax.functions.role import RoleConfig
from realjax.rl.sampling import Sampling
from realjax.testing import tiny_model
from tests.functions.plain import model_on, sharp_parameters

# Sequences of 3, 2, 0 and 4 tokens, in two rows of 6: one of 4 + 2 and one of 3.
LENGTHS = np.array([3, 2, 0, 4], np.int32)
TOKENS = np.array(
    [[11, 12, 13, 0], [21, 22, 0, 0], [0, 0, 0, 0], [41, 42, 43, 44]], np.int32
)


def packing_of(unit=1):
    (packing,) = pack(
        LENGTHS, row_length=6, num_rows=2, max_sequences=6, width=4, unit=unit
    )
    return jax.tree.map(jnp.asarray, packed.packing_arrays(packing))


def test_the_rows_of_a_microbatch_are_its_sequences_and_then_zeros():
    batch = {
        "tokens": jnp.asarray(TOKENS),
        "is_truncated": jnp.array([True, True, True, False]),
        "scores": jnp.array([1.0, 2.0, 3.0, 4.0]),
    }
    found = packed.select_sequences(batch, packing_of())
    # Sequence 2 has no token and no slot; three of six slots stay empty.
    np.testing.assert_array_equal(found["tokens"][:3], TOKENS[[0, 1, 3]])
    assert found["is_truncated"].tolist() == [True, True, False] + [False] * 3
    assert found["scores"].tolist() == [1.0, 2.0, 4.0, 0.0, 0.0, 0.0]
    assert not found["tokens"][3:].any()


def test_the_second_of_a_pair_stands_behind_the_first_also_where_one_is_empty():
    batch = {"scores": jnp.array([1.0, 2.0, 3.0, 4.0])}
    found = packed.select_sequences(batch, packing_of(unit=2))
    # Sequence 2 has no token: its slot is empty, and sequence 3 keeps an odd one.
    assert found["scores"].tolist() == [1.0, 2.0, 0.0, 4.0, 0.0, 0.0]


def test_kept_sets_are_not_among_the_rows_that_a_loss_sees():
    batch = {"tokens": jnp.asarray(TOKENS), "kept": jnp.zeros((4, 4, 20), jnp.int32)}
    assert set(packed.select_sequences(batch, packing_of())) == {"tokens"}


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ("logprobs", {"logprobs", "entropy"}),
        ("values", {"values", "bootstrap_values"}),
        ("scores", {"scores"}),
    ],
)
def test_outputs_are_zero_where_a_slot_or_a_token_is_missing(output, names):
    head = "language" if output == "logprobs" else "scalar"
    config = tiny_model(head=head)
    forward = jax.jit(
        lambda parameters, batch, packing: packed.forward(
            parameters, model_on("d1", config), batch, packing, output=output
        )
    )
    batch = {"tokens": jnp.asarray(TOKENS)}
    found = forward(sharp_parameters(config), batch, packing_of())
    assert set(found) == names
    for name, value in found.items():
        assert value.dtype == jnp.float32
        if value.ndim == 1:
            # Slots 0 to 2 hold the sequences of 3, 2 and 4 tokens.
            assert (np.asarray(value) != 0).tolist() == [True] * 3 + [False] * 3, name
            continue
        # Nothing is said of a first token; sequences of 3, 2 and 4 tokens have more.
        counts = np.array([3, 2, 4, 0, 0, 0])[:, None]
        place = np.arange(4)[None, :]
        expected = (place > 0) & (place < counts)
        np.testing.assert_array_equal(np.asarray(value) != 0, expected, err_msg=name)


def test_tokens_beyond_the_vocabulary_are_impossible_and_others_keep_their_share():
    config = tiny_model()
    inside = np.broadcast_to(np.arange(3, dtype=np.int32), (*TOKENS.shape, 3))
    outside = inside + np.int32([0, 0, config.vocab_size])

    def score(top_ids):
        batch = {"tokens": jnp.asarray(TOKENS), "top_ids": jnp.asarray(top_ids)}
        found = packed.forward(
            *(sharp_parameters(config), model_on("d1", config), batch, packing_of()),
            output="top_logprobs",
        )
        return np.asarray(found["top_logprobs"])

    known, found = score(inside), score(outside)
    np.testing.assert_array_equal(found[..., :2], known[..., :2])
    is_there = known[..., 2] != 0
    assert is_there.any()
    np.testing.assert_array_equal(found[..., 2], np.where(is_there, -np.inf, 0.0))


# -- descriptions ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "keeps"),
    [
        (Sampling(), False),
        (Sampling(temperature=0.5), False),
        (Sampling(greedy=True), False),
        (Sampling(greedy=True, top_k=5, top_p=0.5), False),
        (Sampling(top_k=5), True),
        (Sampling(top_p=0.9), True),
        (Sampling(min_new_tokens=1), True),
        (Sampling(greedy=True, min_new_tokens=1), True),
    ],
)
def test_kept_sets_are_written_exactly_where_something_is_left_out(sampling, keeps):
    assert is_filtered(sampling) is keeps
    assert ("kept" in Generate(sampling=sampling).writes) is keeps


def test_what_a_call_writes_follows_a_change_of_its_settings():
    # A filter that came by `replace` and left no trace would score its tokens over the
    # whole vocabulary.
    filtered = dataclasses.replace(Generate(), sampling=Sampling(top_k=5))
    assert "kept" in filtered.writes
    assert "kept" not in dataclasses.replace(filtered, sampling=Sampling()).writes
    scores = dataclasses.replace(Infer(), output="scores")
    assert scores.writes == ("scores",)


def test_each_prompt_needs_a_completion():
    with pytest.raises(ValueError, match="completions_per_prompt is 0"):
        Generate(completions_per_prompt=0)


def test_a_misspelt_type_of_a_role_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'bfloat17'.*Did you mean 'bfloat16'"):
        RoleConfig(dtype="bfloat17")
