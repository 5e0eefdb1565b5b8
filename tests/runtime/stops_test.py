"""Stop strings: the cut is that of a loop which decodes everything at every token."""

import random

import pytest

from realjax.data.tokenizer import Tokenizer
from realjax.runtime.stops import (
    UNKNOWN,
    StopFinder,
    check_stops,
    special_id,
    text_before,
)
from tests.runtime.small_tokenizers import byte_level, letters_only, metaspace

# Of one byte, two, three and four, and some that stop strings are made of.
LETTERS = "abtdhe  \n\nQ:.,öß€日本🙂"


TOKENIZERS = {"byte_level": byte_level, "metaspace": metaspace}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def slow_length(tokenizer, ids, stops) -> int | None:
    """Tokens with which the first stop string is complete, by the definition."""
    for length in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:length]).rstrip(UNKNOWN)
        if any(stop in text for stop in stops):
            return length
    return None


def fast_length(tokenizer, ids, stops, sizes) -> int | None:
    """The same by a finder that is given some tokens at a time."""
    finder, place = StopFinder(tokenizer, stops), 0
    while place < len(ids):
        size = next(sizes)
        found = finder.add(ids[place : place + size])
        place += size
        if found is not None:
            return found
    return None


def random_sizes(generator):
    while True:
        yield generator.randint(1, 8)


def random_stops(generator, text):
    """Pieces of a text, and some that are probably nowhere."""
    stops = []
    for _ in range(generator.randint(1, 3)):
        size, place = generator.randint(1, 6), generator.randrange(len(text))
        piece = text[place : place + size]
        if generator.random() < 0.4:
            piece = "".join(generator.choices(LETTERS, k=size))
        stops.append(piece)
    return [stop for stop in stops if UNKNOWN not in stop] or ["Q:"]


def agree(tokenizer, generator, ids) -> int | None:
    """Check one completion; how many tokens it keeps."""
    stops = random_stops(generator, tokenizer.decode(ids) or "a")
    wanted = slow_length(tokenizer, ids, stops)
    found = fast_length(tokenizer, ids, stops, random_sizes(generator))
    assert found == wanted, (ids, stops)
    return wanted


def test_the_cut_is_that_of_decoding_everything_for_texts(tokenizer):
    generator, lengths = random.Random(0), []
    for _ in range(150):
        text = "".join(generator.choices(LETTERS, k=generator.randint(1, 120)))
        lengths.append(agree(tokenizer, generator, tokenizer.encode(text)))
    # Not all are cut at once, or never.
    assert sum(length is None for length in lengths) > 5
    assert sum(length is not None and length > 40 for length in lengths) > 5


def test_the_cut_is_that_of_decoding_everything_for_any_ids(tokenizer):
    # Bytes that make no text, special tokens, and single characters at every length.
    generator = random.Random(1)
    for _ in range(150):
        ids = generator.choices(range(tokenizer.vocab_size), k=generator.randint(1, 90))
        agree(tokenizer, generator, ids)


def test_the_cut_is_that_of_decoding_everything_for_bytes():
    # Runs of byte tokens are one text, or none: a byte more can undo what was there.
    tokenizer, generator = metaspace(), random.Random(2)
    first = tokenizer.encode("\n")[-1] - ord("\n")
    some = [first + b for b in "\n€ö".encode()] + tokenizer.encode("the")
    for _ in range(150):
        agree(tokenizer, generator, generator.choices(some, k=generator.randint(1, 60)))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stop_string_across_tokens_and_inside_of_one(tokenizer, size):
    ids = tokenizer.encode("a bad day, the cat sat")
    parts = [tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)]
    for stop in ("d day", "t", " the", "he c", "cat sat"):
        finder, found = StopFinder(tokenizer, [stop]), None
        for place in range(0, len(ids), size):
            found = finder.add(ids[place : place + size])
            if found is not None:
                break
        assert found is not None
        assert stop in parts[found] and stop not in parts[found - 1]


def test_a_character_that_is_spread_over_tokens():
    tokenizer = byte_level()
    ids = tokenizer.encode("a 🙂 b")
    assert UNKNOWN in tokenizer.decode(ids[:3])  # Not whole yet.
    finder = StopFinder(tokenizer, ["🙂"])
    looks = [finder.add([token]) for token in ids]
    length = next(found for found in looks if found is not None)
    assert text_before(tokenizer.decode(ids[:length]), ["🙂"]) == "a "


def test_a_byte_may_undo_the_text_before_it():
    # Of byte tokens that follow each other all are text, or none: "⏎" is there after
    # one token, and not after two.
    tokenizer = metaspace()
    newline, rest = tokenizer.encode("\n")[-1], tokenizer.encode("€")[-1]
    assert tokenizer.decode([newline, rest]) == 2 * UNKNOWN
    assert StopFinder(tokenizer, ["\n"]).add([newline, rest]) == 1


def test_tokens_without_text_hide_nothing(tokenizer):
    ids = tokenizer.encode("the cat sat")
    middle = len(ids) // 2
    finder = StopFinder(tokenizer, ["he cat sat"])
    looks = [finder.add([i]) for i in [*ids[:middle], *[0] * 90, *ids[middle:]]]
    assert looks[:-1] == [None] * (len(ids) + 89)
    assert looks[-1] == len(ids) + 90


def test_little_is_decoded_for_each_token(tokenizer, monkeypatch):
    # Linear: tokens decoded for each token do not grow with the completion.
    num_decoded = 0

    def decode(ids):
        nonlocal num_decoded
        num_decoded += len(ids)
        return Tokenizer.decode(tokenizer, ids)

    monkeypatch.setattr(tokenizer, "decode", decode)
    text = "".join(random.Random(3).choices("abtdhe ,.ö", k=4000))
    ids, per_token = tokenizer.encode(text), []
    for count in (len(ids) // 4, len(ids)):
        num_decoded, finder = 0, StopFinder(tokenizer, ["Q: never"])
        assert all(finder.add([token]) is None for token in ids[:count])
        per_token.append(num_decoded / count)
    assert per_token[1] < 1.2 * per_token[0] < 60


def test_text_ends_before_the_first_of_the_strings():
    assert text_before("a cat sat", ["sat", "cat", "dog"]) == "a "
    assert text_before("a cat", ["dog"]) == "a cat"


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("", "empty string"),
        ("ab€", "'ab€' cannot occur: no token .* gives '€'"),
        ("B", "cannot occur"),
        (UNKNOWN, "cannot occur"),
    ],
)
def test_strings_that_cannot_occur_are_refused(stop, message):
    with pytest.raises(ValueError, match=message):
        check_stops(letters_only(), ["ab", stop])


def test_what_can_occur_is_accepted(tokenizer):
    check_stops(tokenizer, ["\n\n", " ", "Q:", "€", "日", "🙂", "\x07"])
    check_stops(letters_only(), ["abc", " a"])


def test_a_special_token_is_told_from_text(tokenizer):
    assert special_id(tokenizer, "</s>") == 0
    assert special_id(tokenizer, "the") is None
    assert special_id(tokenizer, "a") is None
