"""Completions of a model: what is drawn, and what it may not depend on."""

import jax
import numpy as np
import pytest

from realjax.data.tokenizer import Tokenizer
from realjax.models import hf
from realjax.runtime.model import load
from realjax.runtime.sample import sample
from realjax.testing import tiny_model, tiny_tokenizer
from tests.runtime.small_world import nothing_compiles, parameters

VOCAB_SIZE, NEW_TOKENS = 300, 10
EOS_IDS = (0, 7, 8, 9, 10, 11, 12, 13)  # Often enough, 8 of 300 nearly even ids.
TEXTS = ["the cat sat", "a good day", "the dog", "on the mat, a bad day", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for head in ("language", "scalar"):
        config = tiny_model(VOCAB_SIZE, head=head, eos_ids=EOS_IDS)
        path = folder / head
        hf.save(path, config, parameters(config), tokenizer=tiny_tokenizer())
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder / "language", "d1")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder / "language")


def draw(model, prompts=TEXTS, **options):
    return sample(model, prompts, **{"max_new_tokens": NEW_TOKENS, **options})


def ids_of(completions):
    return [one.ids for one in completions]


@pytest.fixture(scope="module")
def drawn(model):
    """Four completions of each of five prompts."""
    return draw(model, completions_per_prompt=4)


def test_completions_come_in_the_order_of_their_prompts(drawn, tokenizer):
    assert [one.prompt for one in drawn] == [i for i in range(5) for _ in range(4)]
    for one in drawn:
        assert 1 <= len(one.ids) == len(one.logprobs) <= NEW_TOKENS
        assert one.text == tokenizer.decode(one.ids)
        assert {type(token) for token in one.ids} == {int}
        assert {type(number) for number in one.logprobs} == {float}
    assert len({tuple(one.ids) for one in drawn}) == 20


def test_a_completion_stops_at_its_first_end_of_sequence_token(drawn):
    reasons = set()
    for one in drawn:
        ends = [token in EOS_IDS for token in one.ids]
        assert not any(ends[:-1])
        assert one.finish_reason == ("stop" if ends[-1] else "length")
        assert ends[-1] or len(one.ids) == NEW_TOKENS
        reasons.add(one.finish_reason)
    assert reasons == {"stop", "length"}


def test_logprobs_are_those_of_the_models_own_logits(model, drawn, tokenizer):
    # log softmax(logits / temperature), of the tokens kept.
    for temperature, top_k in ((1.0, 0), (0.7, 5)):
        found = drawn
        if top_k:
            found = draw(model, temperature=temperature, top_k=top_k)
        for one in found[:6]:
            prompt = tokenizer.encode(TEXTS[one.prompt])
            row = np.array([[*prompt, *one.ids]], np.int32)
            row = np.pad(row, ((0, 0), (0, 24 - row.shape[1])))
            logits = np.asarray(model.logits(row)[0]) / temperature
            logits = logits[len(prompt) - 1 : len(prompt) - 1 + len(one.ids)]
            if top_k:
                least = np.sort(logits, axis=-1)[:, -top_k][:, None]
                logits = np.where(logits >= least, logits, -np.inf)
            wanted = jax.nn.log_softmax(logits)[np.arange(len(one.ids)), one.ids]
            np.testing.assert_allclose(one.logprobs, wanted, atol=1e-5)


def test_ids_and_texts_are_the_same_prompts(model, tokenizer):
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert draw(model, ids) == draw(model, TEXTS)
    assert draw(model, [np.array(row) for row in ids]) == draw(model, TEXTS)


def test_ids_need_no_tokenizer(folder, tmp_path, model):
    found = load(folder / "language", "d1")
    found.tokenizer = None
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    completions = draw(found, ids)
    assert ids_of(completions) == ids_of(draw(model, TEXTS))
    assert {one.text for one in completions} == {""}
    with pytest.raises(ValueError, match=r"has no tokenizer\. Give lists of ids"):
        draw(found, TEXTS)


@pytest.mark.parametrize("rows", [1, 7])
def test_waves_change_nothing(model, drawn, rows):
    told = []
    found = draw(
        model,
        completions_per_prompt=4,
        rows=rows,
        on_wave=lambda done, total: told.append((done, total)),
    )
    assert ids_of(found) == ids_of(drawn)
    np.testing.assert_allclose(
        np.concatenate([one.logprobs for one in found]),
        np.concatenate([one.logprobs for one in drawn]),
        atol=1e-5,
    )
    waves = -(-20 // rows)
    assert told == [(i + 1, waves) for i in range(waves)]


@pytest.mark.parametrize("allocation", ["f2t2@2-5", "d8"])
def test_the_allocation_changes_nothing(folder, drawn, allocation):
    found = draw(load(folder / "language", allocation), completions_per_prompt=4)
    assert ids_of(found) == ids_of(drawn)


def test_more_completions_begin_with_the_same_ones(model, drawn):
    assert ids_of(draw(model)) == ids_of(drawn)[::4]


def test_seeds(model, drawn):
    first = ids_of(drawn)[::4]
    assert ids_of(draw(model, seed=0)) == first
    assert ids_of(draw(model, seed=1)) != first


def test_greedy_takes_the_most_likely_token(model, tokenizer):
    found = draw(model, TEXTS[:2], greedy=True)
    assert found == draw(model, TEXTS[:2], temperature=0.0, seed=5)
    for one in found:
        prompt = tokenizer.encode(TEXTS[one.prompt])
        row = np.pad(np.array([[*prompt, *one.ids]], np.int32), ((0, 0), (0, 2)))
        best = np.asarray(model.logits(row)[0]).argmax(-1)
        assert best[len(prompt) - 1 :][: len(one.ids)].tolist() == one.ids


def test_least_and_most_tokens(model):
    for one in draw(model, min_new_tokens=6, max_new_tokens=7):
        assert 6 < len(one.ids) or (one.ids[-1] in EOS_IDS and len(one.ids) == 7)
        assert not set(one.ids[:6]) & set(EOS_IDS)


def test_a_second_call_compiles_nothing(model, drawn):
    with nothing_compiles():
        assert draw(model, completions_per_prompt=4) == drawn


# -- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        ([], {}, "There are no prompts"),
        ([""], {}, "Prompt 0 has no tokens"),
        ([[5], []], {}, "Prompt 1 has no tokens"),
        ([[5], [300]], {}, "Prompt 1 holds the id 300, and .* 300 ids"),
        ([[-1]], {}, "holds the id -1"),
        (["a"], {"temprature": 1.0}, "Did you mean 'temperature'"),
        (["a"], {"top_k": 0.5}, "sample.top_k is 0.5, of type float; it needs int"),
        (["a"], {"top_p": 0.0}, "sample: top_p is 0.0"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (["a"], {"completions_per_prompt": 0}, "completions_per_prompt is 0"),
        (["a"], {"rows": -1}, "rows -1"),
        ([[5] * 250], {}, "has 250 tokens; with 10 new ones that is 260, .* 256"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_compiles(
    model, prompts, options, text
):
    with nothing_compiles(), pytest.raises((ValueError, TypeError), match=text):
        draw(model, prompts, **options)


def test_one_text_is_no_list_of_prompts(model):
    with pytest.raises(ValueError, match="prompts is one text, 'the cat'"):
        draw(model, "the cat")


def test_a_reward_model_does_not_sample(folder):
    with pytest.raises(ValueError, match=r"scalar head .* cannot sample"):
        draw(load(folder / "scalar", "d1"))


def test_a_model_over_stages_does_not_sample(folder):
    with pytest.raises(ValueError, match=r"over stages.*at every token"):
        sample(load(folder / "language", "s2t2"), TEXTS)


def test_a_prompt_that_just_fits_is_sampled(model):
    assert draw(model, [[5] * 246])
