"""Completions of a model: what is drawn, and what it may not depend on."""

import re

import jax
import numpy as np
import pytest

from realjax.data.tokenizer import Tokenizer
from realjax.models import hf
from realjax.runtime import sample as sample_lib
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
            found = draw(
                model, completions_per_prompt=4, temperature=temperature, top_k=top_k
            )
        for one in found[::4]:
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


@pytest.mark.parametrize("slots", [1, 7])
def test_slots_change_nothing(model, drawn, slots):
    told = []
    found = draw(
        model,
        completions_per_prompt=4,
        slots=slots,
        on_progress=lambda *numbers: told.append(numbers),
    )
    assert ids_of(found) == ids_of(drawn)
    for name in ("logprobs", "entropy"):
        np.testing.assert_allclose(
            np.concatenate([getattr(one, name) for one in found]),
            np.concatenate([getattr(one, name) for one in drawn]),
            atol=1e-5,
        )
    assert told == sorted(told) and told[-1] == (20, 20, sum(map(len, ids_of(found))))


def test_pages_and_portions_change_nothing(model, drawn, monkeypatch):
    # Room for one row at a time; then also two prompts at a time.
    assert ids_of(draw(model, completions_per_prompt=4, pages=4)) == ids_of(drawn)
    monkeypatch.setattr(sample_lib, "_PORTION", 1)
    told, places = [], []
    found = draw(
        model,
        completions_per_prompt=4,
        slots=8,
        on_progress=lambda *numbers: told.append(numbers),
        on_completion=lambda place, _: places.append(place),
    )
    assert ids_of(found) == ids_of(drawn)
    assert told == sorted(told) and told[-1] == (20, 20, sum(map(len, ids_of(found))))
    assert [sorted(places[i : i + 8]) for i in (0, 8, 16)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]


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


def test_a_second_call_compiles_nothing_and_makes_no_pool(model, drawn):
    draw(model, completions_per_prompt=4)
    engines = list(model.programs.values())
    pools = [engine.num_pools for engine in engines]
    with nothing_compiles():
        assert draw(model, completions_per_prompt=4) == drawn
        # Nor do limits, seeds and other prompts of about that size.
        draw(model, TEXTS[::-1] + TEXTS[:2], completions_per_prompt=4, seed=3)
        draw(model, completions_per_prompt=4, max_new_tokens=[9, 8, 7, 10, 5])
    assert list(model.programs.values()) == engines
    assert [engine.num_pools for engine in engines] == pools


def test_a_model_has_one_pool(model, drawn):
    for temperature in (0.7, 1.0):
        draw(model, completions_per_prompt=4, temperature=temperature)
        engine = next(reversed(model.programs.values()))
        has_pool = [one._pool is not None for one in model.programs.values()]
        assert len(has_pool) > 1 and sum(has_pool) == 1
    assert engine._pool is None  # That of the last one made, which did not come last.


def test_a_call_that_was_interrupted_leaves_the_model_as_it_was(model, drawn):
    def interrupt(*_):
        raise KeyboardInterrupt

    for told in ("on_progress", "on_completion"):
        with pytest.raises(KeyboardInterrupt):
            draw(model, completions_per_prompt=4, **{told: interrupt})
    with nothing_compiles():
        assert draw(model, completions_per_prompt=4) == drawn


def test_entropy_is_that_of_the_distributions(model, drawn, tokenizer):
    one = drawn[0]
    row = np.array([[*tokenizer.encode(TEXTS[0]), *one.ids]], np.int32)
    logits = model.logits(np.pad(row, ((0, 0), (0, 24 - row.shape[1]))))
    logprobs = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    entropy = -(np.exp(logprobs) * logprobs).sum(axis=-1)
    begin = row.shape[1] - len(one.ids) - 1
    np.testing.assert_allclose(
        one.entropy, entropy[begin : begin + len(one.ids)], atol=1e-5
    )


def test_seconds_are_told_in_the_order_of_ending(model):
    places, seconds = [], []
    found = draw(
        model,
        completions_per_prompt=4,
        slots=2,
        on_completion=lambda place, one: (
            places.append(place),
            seconds.append(one.seconds),
        ),
    )
    assert sorted(places) == list(range(20)) != places
    assert seconds == sorted(seconds) == [found[place].seconds for place in places]
    assert seconds[0] > 0


# -- one for each prompt -----------------------------------------------------------


def test_a_limit_for_each_prompt(model, drawn):
    limits = [1, 10, 2, 3, 5]
    found = draw(model, completions_per_prompt=4, max_new_tokens=limits)
    for one, whole in zip(found, drawn, strict=True):
        assert one.ids == whole.ids[: limits[one.prompt]]
        is_short = len(one.ids) < len(whole.ids) and one.ids[-1] not in EOS_IDS
        assert one.finish_reason == ("length" if is_short else whole.finish_reason)


def test_with_a_seed_for_each_prompt_its_place_does_not_matter(model):
    def groups(prompts, seeds):
        found = draw(model, prompts, seed=seeds, completions_per_prompt=4)
        return [ids_of(found)[i : i + 4] for i in range(0, 20, 4)]

    seeds = [5, 4, 3, 2, 2**32 - 1]
    found = groups(TEXTS, seeds)
    assert groups(TEXTS[::-1], seeds[::-1]) == found[::-1]
    assert groups([TEXTS[3]] * 5, [2, 7, 8, 9, 2]) != found
    assert groups([TEXTS[3]] * 5, [2, 7, 8, 9, 2])[::4] == [found[3]] * 2
    others = groups(TEXTS, [1, *seeds[1:]])
    assert others[0] != found[0] and others[1:] == found[1:]


# -- what ends a completion --------------------------------------------------------


def test_stop_strings_end_completions(model, drawn, tokenizer):
    stops = ["a", " t", "<", "é"]
    found = draw(model, completions_per_prompt=4, stop=stops)
    num_stopped = 0
    for one, whole in zip(found, drawn, strict=True):
        texts = [tokenizer.decode(whole.ids[:i]) for i in range(len(whole.ids) + 1)]
        ends = [i for i, text in enumerate(texts) if any(s in text for s in stops)]
        length = ends[0] if ends else len(whole.ids)
        assert one.ids == whole.ids[:length]
        assert one.logprobs == whole.logprobs[:length]
        assert one.entropy == whole.entropy[:length]
        places = [texts[length].find(stop) for stop in stops if stop in texts[length]]
        assert one.text == texts[length][: min(places, default=None)]
        assert one.finish_reason == ("stop" if ends else whole.finish_reason)
        num_stopped += len(one.ids) < len(whole.ids)
    assert num_stopped > 3


def test_one_stop_string_needs_no_list(model):
    assert draw(model, stop="a") == draw(model, stop=["a"])


def test_a_stop_string_at_the_last_token_is_no_lack_of_room(model, drawn, tokenizer):
    whole = next(one for one in drawn if one.finish_reason == "length")
    last = tokenizer.decode(whole.ids[-1:])
    found = draw(model, completions_per_prompt=4, stop=["never", last])
    one = found[drawn.index(whole)]
    assert one.finish_reason == "stop" and last not in one.text


def test_the_name_of_a_special_token_ends_completions_at_its_id(
    model, drawn, tokenizer
):
    ids = [i for i in range(300) if tokenizer.decode([i], skip_special_tokens=False)]
    name = tokenizer.decode([1], skip_special_tokens=False)
    assert 1 in ids and tokenizer.decode([1]) == "" and 1 not in EOS_IDS
    found = draw(model, completions_per_prompt=4, stop=[name])
    for one, whole in zip(found, drawn, strict=True):
        length = [*whole.ids, 1].index(1) + 1
        assert one.ids == whole.ids[:length]
        assert one.text == tokenizer.decode(one.ids)


def test_stop_strings_need_a_tokenizer(folder):
    bare = load(folder / "language", "d1")
    bare.tokenizer = None
    with pytest.raises(ValueError, match=r"no tokenizer\. Leave `stop` out"):
        draw(bare, [[5]], stop=["a"])
    with pytest.raises(ValueError, match="'cat' and the model's folder has no token"):
        draw(bare, [[5]], bad_words=["cat"])


def test_bad_words_do_not_come(model, tokenizer):
    # The most likely token of each completion is forbidden: another one comes.
    greedy = draw(model, greedy=True)
    first = greedy[0].ids[:2]
    word = tokenizer.decode(first[:1])
    for bad_words in ([first[:1]], [word], [[299], word, [298]]):
        one = draw(model, greedy=True, bad_words=bad_words)[0]
        assert first[0] not in one.ids
    # The second id of a word is forbidden behind the first.
    one = draw(model, greedy=True, bad_words=[first])[0]
    assert one.ids[0] == first[0] and one.ids[1] != first[1]


# -- refusals ----------------------------------------------------------------------


def test_bad_requests_leave_the_others_alone(model, drawn):
    good = iter(TEXTS + TEXTS[:1])
    bad = {1: "", 4: "x" * 300, 7: [5, 300]}
    prompts = [bad.get(place) if place in bad else next(good) for place in range(9)]
    seeds = [0, 9, 1, 2, 9, 3, 4, 9, 5]
    found = draw(model, prompts, seed=seeds)
    wanted = draw(model, TEXTS + TEXTS[:1], seed=range(6))
    assert [one.prompt for one in found] == list(range(9))
    right = [one for one in found if one.finish_reason != "error"]
    assert ids_of(right) == ids_of(wanted) and not any(one.error for one in right)
    failed = {one.prompt: one for one in found if one.finish_reason == "error"}
    assert failed.keys() == bad.keys()
    for place, text in (
        (1, "Prompt 1 has no tokens. Give it at least one."),
        (4, "Prompt 4 has 300 tokens; with 10 new ones that is 310"),
        (7, "Prompt 7 holds the id 300, and the model's vocabulary has 300 ids"),
    ):
        one = failed[place]
        assert one.error.startswith(text), one.error
        assert one.ids == one.logprobs == one.entropy == [] and one.text == ""


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        ([[5], []], {}, "Prompt 1 has no tokens"),
        ([[5], [-1]], {}, "Prompt 1 holds the id -1"),
        ([[5], np.array([0.5])], {}, r"Prompt 1 is array.*, neither a text nor a list"),
        ([[5], np.ones((1, 2), int)], {}, "Prompt 1 is .*, neither a text"),
        ([[5], [6]], {"max_new_tokens": [2, 0]}, "Prompt 1 has max_new_tokens 0"),
        ([[5], [6]], {"max_new_tokens": [2, 256]}, "with 256 new ones that is 257"),
        (
            [[5], [6]],
            {"max_new_tokens": [3, 2], "min_new_tokens": 3},
            "has max_new_tokens 2. Give a whole number of at least 3",
        ),
        ([[5], [6]], {"seed": [0, -1]}, "The seed of prompt 1 is -1"),
        ([[5], [6] * 30], {"pages": 2}, "take 3 pages of 32 .* the pool has 2"),
    ],
)
def test_what_is_wrong_with_one_request(model, prompts, options, text):
    right, wrong = draw(model, prompts, **options)
    assert right.ids and not right.error
    assert wrong.finish_reason == "error" and re.search(text, wrong.error), wrong.error
    with nothing_compiles(), pytest.raises(ValueError, match=text):
        draw(model, prompts, is_strict=True, **options)


def test_with_bad_requests_only_nothing_compiles(model):
    told = []
    with nothing_compiles():
        found = draw(
            model,
            ["", [300]],
            completions_per_prompt=2,
            on_completion=lambda place, one: told.append((place, one)),
        )
    assert [one.finish_reason for one in found] == ["error"] * 4
    assert told == list(enumerate(found))


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        ([], {}, "There are no prompts"),
        (["a"], {"temprature": 1.0}, "Did you mean 'temperature'"),
        (["a"], {"top_k": 0.5}, "sample.top_k is 0.5, of type float; it needs int"),
        (["a"], {"top_p": 0.0}, "sample: top_p is 0.0"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (["a"], {"completions_per_prompt": 0}, "completions_per_prompt is 0"),
        (["a"], {"slots": -1}, "slots -1"),
        (["a"], {"pages": -1}, "pages -1"),
        (["a"], {"rows": 4}, "Sampling has no field 'rows'"),
        (["a"], {"kv_dtype": "int4"}, "kv_dtype='int4' is not one of"),
        (["a"], {"max_new_tokens": 256}, "max_new_tokens is 256, .* 256 tokens of"),
        (["a"], {"max_new_tokens": [2, 3]}, "has 2 entries for 1 prompts"),
        (["a"], {"seed": [2, 3]}, "seed has 2 entries for 1 prompts"),
        (["a"], {"stop": [""]}, "empty string, which every text holds"),
        (["a"], {"stop": ["\ufffd"]}, "cannot occur"),
        (["a"], {"bad_words": ["  "]}, "'  ', which is no word"),
        (["a"], {"bad_words": "cat"}, "bad_words is one text, 'cat'"),
        (["a"], {"bad_words": [[300]]}, "bad_words has the id 300, .* has 300 ids"),
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


def test_a_least_number_of_tokens_may_be_one_for_each_prompt(model):
    prompts, options = [[5, 9]] * 6, {"max_new_tokens": 12, "seed": list(range(6))}
    plain = sample(model, prompts, **options)
    found = sample(model, prompts, min_new_tokens=[0, 0, 0, 12, 12, 12], **options)
    assert [one.ids for one in found[:3]] == [one.ids for one in plain[:3]]
    assert all(len(one.ids) == 12 for one in found[3:])
    (failed,) = sample(model, prompts[:1], min_new_tokens=[-1], max_new_tokens=3)
    assert "Prompt 0 has min_new_tokens -1" in failed.error
