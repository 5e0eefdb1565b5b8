"""Requests: words as the tokenizer writes them."""

import pytest

from realjax.runtime.requests import word_ids
from tests.runtime.small_tokenizers import byte_level, metaspace


@pytest.fixture(scope="module", params=[byte_level, metaspace])
def tokenizer(request):
    return request.param()


def spellings(tokenizer, words):
    """Texts of the ids, behind a letter: then a space that begins one stays."""
    letter = tokenizer.encode("x")
    start = len(tokenizer.decode(letter))
    return [tokenizer.decode([*letter, *word])[start:] for word in words]


@pytest.mark.parametrize("word", ["cat", "bad day", "€"])
def test_a_word_is_found_with_a_space_before_it_and_without(tokenizer, word):
    for text in (word, f" {word}", f"{word} "):
        found = word_ids(tokenizer, [text])
        assert set(spellings(tokenizer, found)) >= {word, f" {word}"}
        assert len(found) == len(set(found)) <= 3


def test_ids_of_words_are_those_a_text_holds(tokenizer):
    # What is sampled as a text tokenizes: at its beginning, in a line, and behind a
    # line break.
    words = word_ids(tokenizer, ["cat"])
    for text in ("cat", "the cat sat", "the mat\ncat sat"):
        ids = tokenizer.encode(text)
        assert any(
            tuple(ids[i : i + len(word)]) == word for word in words for i in range(9)
        ), text


def test_ids_stay_as_they_are(tokenizer):
    assert word_ids(tokenizer, [[3, 4], (5,), [3, 4]]) == ((3, 4), (5,))
    assert word_ids(None, [[3]]) == ((3,),)
    assert word_ids(None, []) == ()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("cat", "bad_words is one text, 'cat'"),
        (["cat", " "], "bad_words has the text ' ', which is no word"),
        ([""], "bad_words has the text '', which is no word"),
    ],
)
def test_what_is_no_list_of_words_is_refused(tokenizer, words, text):
    with pytest.raises(ValueError, match=text):
        word_ids(tokenizer, words)


def test_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match="the text 'cat' and the model's folder has"):
        word_ids(None, ["cat"])
