"""Tests of the options of `Sampling`, worked out by hand, and of what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.rl import sampling
from realjax.rl.sampling import History, Sampling, bad_word_tokens, is_kept

LOGITS = jnp.zeros((2, 8))


def keys(num_rows: int):
    return jax.random.split(jax.random.key(1), num_rows)


sample = jax.jit(sampling.sample, static_argnums=2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Of the highest, 0.5: a share of 1, 0.5, 0.4 and 0.1.
        (Sampling(min_p=0.3), [0, 1, 2]),
        (Sampling(min_p=0.45), [0, 1]),
        (Sampling(min_p=1.0), [0]),
        (Sampling(min_p=0.3, temperature=0.5), [0]),  # Of the squares: 1, 0.25, …
        (Sampling(min_p=0.3, top_p=0.7), [0, 1]),
        (Sampling(min_p=0.45, top_p=0.9), [0, 1]),
        (Sampling(min_p=0.3, top_k=2), [0, 1]),
        (Sampling(min_p=0.45, top_k=3), [0, 1]),
    ],
)
def test_min_p_is_a_share_of_the_highest_probability(config, expected):
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.2, 0.05]]))
    kept = sample(logits, keys(1), config).kept
    np.testing.assert_array_equal(np.flatnonzero(is_kept(kept, 4)[0]), expected)


def test_min_p_keeps_all_of_the_same_probability():
    logits = jnp.array([[1.0, 0.0, 1.0, 1.0]])
    kept = sample(logits, keys(1), Sampling(min_p=1.0)).kept
    np.testing.assert_array_equal(is_kept(kept, 4)[0], [True, False, True, True])


def test_penalties_lower_the_logits_of_tokens_so_far():
    # Logits 3, -1, 2, 0. Tokens 0 and 1 are in the prompt, token 2 in the completion.
    # Repetition of 2 divides 3 and 2 and doubles -1; presence takes 0.75 from token 2:
    # 1.5, -2, 0.25, 0.
    logits = jnp.array([[3.0, -1.0, 2.0, 0.0]])
    history = History(
        in_prompt_or_completion=jnp.array([[True, True, True, False]]),
        in_completion=jnp.array([[False, False, True, False]]),
    )
    config = Sampling(greedy=True, repetition_penalty=2.0, presence_penalty=0.75)
    draw = sample(logits, keys(1), config, history=history)
    total = np.sum(np.exp([1.5, -2.0, 0.25, 0.0]))
    np.testing.assert_allclose(draw.logprobs, [1.5 - np.log(total)], rtol=1e-6)
    assert not config.is_recomputable
    # Without the presence penalty no completion is needed.
    config = Sampling(greedy=True, repetition_penalty=2.0)
    alone = History(in_prompt_or_completion=history.in_prompt_or_completion)
    draw = sample(logits, keys(1), config, history=alone)
    total = np.sum(np.exp([1.5, -2.0, 1.0, 0.0]))
    np.testing.assert_allclose(draw.logprobs, [1.5 - np.log(total)], rtol=1e-6)


def test_last_token_of_a_word_is_forbidden_after_its_others():
    words = ((4,), (1, 2), (3, 1, 0), (6, 2))
    for recent, expected in (
        ([-1, -1], [4]),
        ([-1, 1], [2, 4]),
        ([3, 1], [0, 2, 4]),
        ([1, 3], [4]),
        ([5, 6], [2, 4]),
    ):
        found = bad_word_tokens(jnp.array([recent]), Sampling(bad_words=words), 8)
        np.testing.assert_array_equal(np.flatnonzero(found), expected)


def test_bad_words_look_at_the_last_tokens_of_each_row():
    config = Sampling(bad_words=((1, 2), (3, 1, 0)))
    assert config.num_recent_tokens == 2
    forbid = jax.jit(bad_word_tokens, static_argnums=(1, 2))
    # Of four recent tokens the last two count.
    recent = jnp.array([[3, 1, 3, 1], [3, 1, 5, 5], [0, 0, 0, 1]])
    found = forbid(recent, config, 5)
    expected = [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    np.testing.assert_array_equal(found, np.array(expected, bool))
    # Words of one token need none, and no words forbid none.
    nothing = jnp.zeros((2, 0), jnp.int32)
    found = forbid(nothing, Sampling(bad_words=((3,),)), 5)
    np.testing.assert_array_equal(found, [[False, False, False, True, False]] * 2)
    assert Sampling().num_recent_tokens == 0
    assert not forbid(nothing, Sampling(), 5).any()


def test_words_in_lists_are_the_same_settings():
    lists = Sampling(bad_words=[[1, 2], [3]])
    tuples = Sampling(bad_words=((1, 2), (3,)))
    assert lists == tuples
    assert hash(lists) == hash(tuples)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"min_p": -0.1}, r"min_p is -0\.1; it must be in \[0, 1\]"),
        ({"min_p": 1.5}, r"min_p is 1\.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0\.0; it must be positi"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan; it must be fin"),
        ({"bad_words": ((1,), ())}, r"the word \(\); a word needs at least one"),
        ({"bad_words": ((1, -1),)}, r"the word \(1, -1\).*not negative"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9"),
        ({"max_new_tokens": 0}, "nothing to sample"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


@pytest.mark.parametrize("words", [(5, 7), "the", ((1.5,),), 3])
def test_words_that_are_not_ids_are_refused(words):
    # The tests check the types of fields, so this asks what looks at them otherwise.
    with pytest.raises(TypeError, match="it needs token ids for each word, as in"):
        sampling._words(words)


@pytest.mark.parametrize(
    ("config", "history", "message"),
    [
        (
            Sampling(repetition_penalty=1.2),
            None,
            r"a repetition_penalty, but history\.in_prompt_or_completion is missing",
        ),
        (
            Sampling(presence_penalty=0.2),
            History(in_prompt_or_completion=jnp.zeros((2, 8), bool)),
            r"a presence_penalty, but history\.in_completion is missing",
        ),
    ],
)
def test_penalty_without_its_history_is_refused(config, history, message):
    with pytest.raises(ValueError, match=message):
        sampling.sample(LOGITS, keys(2), config, history=history)


def test_bad_words_that_do_not_fit_are_refused():
    config = Sampling(bad_words=((1, 2, 9),))
    with pytest.raises(ValueError, match="has 3 ids: give the last 2 tokens"):
        bad_word_tokens(jnp.zeros((1, 1), jnp.int32), config, 10)
    with pytest.raises(ValueError, match="the id 9, but the vocabulary has 9 tokens"):
        bad_word_tokens(jnp.zeros((1, 2), jnp.int32), config, 9)


def test_forbidding_without_a_recorded_set_is_refused():
    with pytest.raises(ValueError, match="set min_new_tokens or bad_words"):
        sampling.sample(
            LOGITS,
            keys(2),
            Sampling(),
            forbidden=jnp.zeros((2, 8), bool),
        )
