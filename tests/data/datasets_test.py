"""Tests of `realjax/data/datasets.py`."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from realjax.data.datasets import DataConfig, load_dataset
from realjax.data.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ANSWERS = [
    {"prompt": "ab", "answer": "cde", "id": "first"},
    {"prompt": "abcd", "answer": "f"},
    {"prompt": "a", "answer": "bcdefghij", "topic": "long"},
]
PAIRS = [
    {"prompt": "ab", "pos_answers": ["c"], "neg_answers": ["dd"]},
    {
        "prompt": "xyz",
        "pos_answers": ["a", "b", "c", "d"],
        "neg_answers": ["1", "2", "3", "4"],
    },
]
LABELS = [
    {"prompt": "ab", "completion": "cde", "label": True},
    {"prompt": "xyz", "completion": "f", "label": False},
    {"prompt": "ab", "completion": "gh", "label": False},
    {"prompt": "k", "completion": "lmnopqr", "label": True},
]
PROMPTS = [{"prompt": "a" * n, "answer": str(n)} for n in (3, 20, 9, 12)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes only, so that a letter is a token; padding is the end-of-sequence token."""
    return Tokenizer.train([], 257, special=("<eos>",), chat_template=TEMPLATE)


def load(tmp_path, tokenizer, records, kind, *, split="train", seed=0, **limits):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    config = DataConfig(path=str(path), valid_path=str(path), kind=kind, **limits)
    return load_dataset(config, tokenizer, split=split, seed=seed)


def test_a_sample_is_prompt_answer_and_end(tmp_path, tokenizer):
    dataset = load(tmp_path, tokenizer, ANSWERS, "prompt_answer")
    batch = dataset.batch([1, 0])
    # 1 + 9 letters and the end are 11 tokens, in rows of 16.
    assert (len(dataset), dataset.row_width, dataset.prompt_width) == (3, 16, 8)
    assert batch["tokens"].shape == (2, 16)
    np.testing.assert_array_equal(batch.lengths, [6, 6])
    np.testing.assert_array_equal(batch.ids, [1, 0])
    for row, (text, start) in enumerate([("abcdf", 4), ("abcde", 2)]):
        expected = [*tokenizer.encode(text), tokenizer.eos_id]
        np.testing.assert_array_equal(batch["tokens"][row, :6], expected)
        np.testing.assert_array_equal(
            np.flatnonzero(batch["completion_mask"][row]), np.arange(start, 6)
        )
    assert not batch["is_truncated"].any()
    assert batch["tokens"].dtype == np.int32
    assert batch.columns == {
        "prompt": ["abcd", "ab"],
        "answer": ["f", "cde"],
        "id": [None, "first"],
        "topic": [None, None],
    }


def test_a_prompt_is_a_prefix_even_where_the_encoding_would_merge(tmp_path):
    tokenizer = Tokenizer.train(["abab " * 50], 300)
    assert len(tokenizer.encode("ab")) < 2
    batch = load(
        tmp_path, tokenizer, [{"prompt": "a", "answer": "b"}], "prompt_answer"
    ).batch([0])
    expected = [*tokenizer.encode("a"), *tokenizer.encode("b"), tokenizer.eos_id]
    np.testing.assert_array_equal(batch["tokens"][0, :3], expected)
    assert batch.lengths[0] == 3


def test_lengths_come_from_masks_where_padding_is_the_end_token(tmp_path, tokenizer):
    assert tokenizer.pad_id == tokenizer.eos_id
    batch = load(tmp_path, tokenizer, ANSWERS, "prompt_answer").batch([0, 1, 2])
    np.testing.assert_array_equal(batch.lengths, [6, 6, 11])
    np.testing.assert_array_equal(batch["completion_mask"].sum(axis=1), [4, 2, 10])
    # The end is part of the completion, the padding that looks like it is not.
    last = batch.lengths - 1
    assert batch["completion_mask"][np.arange(3), last].all()
    np.testing.assert_array_equal(batch["tokens"][np.arange(3), last], tokenizer.eos_id)


def test_an_answer_may_be_empty_and_ends_at_once(tmp_path, tokenizer):
    record = {"prompt": "ab", "answer": ""}
    batch = load(tmp_path, tokenizer, [record], "prompt_answer").batch([0])
    np.testing.assert_array_equal(np.flatnonzero(batch["completion_mask"][0]), [2])


# W18: ReaL cuts the end-of-sequence token off long records without a word, and drops
# the records at the tail of the file that do not divide over the workers.


def test_w18_a_long_record_is_left_out_whole_and_counted(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load(tmp_path, tokenizer, ANSWERS, "prompt_answer", max_length=8)
    assert (len(dataset), dataset.num_left_out) == (2, 1)
    assert "1 of 3 records are longer than max_length=8" in caplog.text
    batch = dataset.batch([0, 1])
    ends = batch["tokens"][np.arange(2), batch.lengths - 1]
    np.testing.assert_array_equal(ends, tokenizer.eos_id)


def test_w18_a_truncated_answer_has_no_end_and_says_so(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load(
            tmp_path,
            tokenizer,
            [*ANSWERS, {"prompt": "a" * 8, "answer": "b"}],
            "prompt_answer",
            max_length=8,
            overlong="truncate",
        )
    # The last one's prompt leaves no room: prompts are never cut.
    assert (len(dataset), dataset.num_left_out) == (3, 1)
    assert "without an end-of-sequence token: 1" in caplog.text
    batch = dataset.batch([0, 1, 2])
    np.testing.assert_array_equal(batch["is_truncated"], [False, False, True])
    np.testing.assert_array_equal(batch["tokens"][2], tokenizer.encode("abcdefgh"))
    assert batch["completion_mask"][2].tolist() == [False] + [True] * 7


def test_w18_an_answer_that_just_fits_keeps_its_end(tmp_path, tokenizer):
    record = {"prompt": "ab", "answer": "cdefg"}  # 2 + 5 + 1 tokens
    for overlong in ("filter", "refuse", "truncate"):
        dataset = load(
            tmp_path,
            tokenizer,
            [record],
            "prompt_answer",
            max_length=8,
            overlong=overlong,
        )
        batch = dataset.batch([0])
        assert batch["tokens"][0, 7] == tokenizer.eos_id
        assert not batch["is_truncated"][0]


def test_w18_every_record_of_the_file_is_in_the_data_set(tmp_path, tokenizer):
    records = [{"prompt": "a", "answer": str(i)} for i in range(17)]
    dataset = load(tmp_path, tokenizer, records, "prompt_answer")
    answers = dataset.batch(range(len(dataset))).columns["answer"]
    assert answers == [str(i) for i in range(17)]


def test_ids_are_record_numbers_whatever_is_left_out(tmp_path, tokenizer):
    records = [ANSWERS[2], *ANSWERS]
    dataset = load(tmp_path, tokenizer, records, "prompt_answer", max_length=8)
    np.testing.assert_array_equal(dataset.batch([0, 1]).ids, [1, 2])


def test_a_record_given_twice_has_two_sample_indices(tmp_path, tokenizer):
    batch = load(tmp_path, tokenizer, ANSWERS, "prompt_answer").batch([1, 0, 1])
    np.testing.assert_array_equal(batch.ids, [1, 0, 1])
    np.testing.assert_array_equal(batch.samples, [0, 0, 1])


def test_pairs_alternate_and_are_padded_to_a_static_size(tmp_path, tokenizer):
    dataset = load(tmp_path, tokenizer, PAIRS, "pairs", max_pairs=2)
    batch = dataset.batch([0, 1])
    assert dataset.rows_per_record == 4
    np.testing.assert_array_equal(batch.ids, [0, 0, 1, 1, 1, 1, -1, -1])
    np.testing.assert_array_equal(batch.samples[:6], [0, 1, 0, 1, 2, 3])
    # One pair of the first prompt, two of the second: each prompt weighs 1 over pairs.
    np.testing.assert_array_equal(
        batch["pair_weights"], np.float32([1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0])
    )
    np.testing.assert_array_equal(batch.lengths, [4, 5, 5, 5, 5, 5, 0, 0])
    texts = [
        tokenizer.decode(row[mask].tolist())
        for row, mask in zip(batch["tokens"], batch["completion_mask"], strict=True)
    ]
    assert texts[:2] == ["c", "dd"]
    for row in (0, 2, 4):
        for column in ("chosen", "rejected"):
            assert batch.columns[column][row] == batch.columns[column][row + 1]
        assert texts[row] == batch.columns["chosen"][row]
        assert texts[row + 1] == batch.columns["rejected"][row]
    # Answers stay with their partners: a-1, b-2, c-3, d-4.
    assert all("abcd".index(texts[r]) + 1 == int(texts[r + 1]) for r in (2, 4))


def test_pairs_are_drawn_without_replacement_by_seed_epoch_and_id(tmp_path, tokenizer):
    def drawn(epoch, seed=0, indices=(1,)):
        dataset = load(tmp_path, tokenizer, PAIRS, "pairs", seed=seed)
        batch = dataset.batch(indices, epoch)
        return [batch.columns["chosen"][row] for row in np.flatnonzero(batch.ids == 1)]

    first = drawn(0)
    assert len(first) == 4 and len(set(first)) == 2  # two rows a pair
    assert drawn(0) == drawn(0, indices=(0, 1)) == first
    epochs = [tuple(drawn(epoch)) for epoch in range(12)]
    assert len(set(epochs)) > 3
    assert {answer for answers in epochs for answer in answers} == set("abcd")
    assert any(drawn(epoch, seed=1) != drawn(epoch) for epoch in range(4))


def test_epochs_may_differ_within_a_batch(tmp_path, tokenizer):
    dataset = load(tmp_path, tokenizer, PAIRS, "pairs")
    together = dataset.batch([1, 1], [3, 5])
    for half, epoch in enumerate((3, 5)):
        alone = dataset.batch([1], epoch)
        np.testing.assert_array_equal(
            together["tokens"][4 * half : 4 * half + 4], alone["tokens"]
        )
    np.testing.assert_array_equal(together.samples, np.arange(8))


def test_a_pair_is_left_out_when_one_side_is_too_long(tmp_path, tokenizer):
    record = {"prompt": "a", "pos_answers": ["b", "c"], "neg_answers": ["x" * 9, "y"]}
    dataset = load(tmp_path, tokenizer, [record], "pairs", max_length=8)
    batch = dataset.batch([0])
    assert batch.columns["rejected"] == ["y", "y", None, None]
    cut = load(
        tmp_path, tokenizer, [record], "pairs", max_length=8, overlong="truncate"
    ).batch([0])
    np.testing.assert_array_equal(cut["is_truncated"], [False, True, False, False])


def test_a_label_has_its_completion_and_another_one_after_its_prompt(
    tmp_path, tokenizer
):
    dataset = load(tmp_path, tokenizer, LABELS, "labels")
    batch = dataset.batch([3, 0, 1, 2])
    assert batch["is_desirable"].tolist() == [True, True, False, False]
    assert batch["tokens"][1, :6].tolist() == [
        *tokenizer.encode("abcde"),
        tokenizer.eos_id,
    ]
    completions = {(*tokenizer.encode(r["completion"]),): r["prompt"] for r in LABELS}
    for row, number in enumerate([3, 0, 1, 2]):
        prompt = tokenizer.encode(LABELS[number]["prompt"])
        stop = batch["mismatched_lengths"][row]
        tokens = batch["mismatched_tokens"][row, :stop].tolist()
        assert tokens[: len(prompt)] == prompt
        other = tokens[len(prompt) :]
        assert other[-1] == tokenizer.eos_id
        assert completions[(*other[:-1],)] != LABELS[number]["prompt"]
    # They do not depend on what else is in the batch.
    alone = dataset.batch([3])["mismatched_tokens"][0]
    np.testing.assert_array_equal(alone, batch["mismatched_tokens"][0])
    padded = batch.pad_to(5)
    assert padded["mismatched_lengths"][4] == 0
    assert not padded["is_desirable"][4]


def test_a_mismatched_completion_is_cut_at_the_longest_length(tmp_path, tokenizer):
    records = [LABELS[3], {"prompt": "abcdefg", "completion": "", "label": False}]
    batch = load(tmp_path, tokenizer, records, "labels", max_length=9).batch([0, 1])
    # Of "lmnopqr" and its end, 2 tokens are left after 7 of the prompt.
    assert batch["mismatched_lengths"].tolist() == [2, 9]


def test_labels_need_two_prompts(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="2 records have the same prompt"):
        load(tmp_path, tokenizer, [LABELS[0], LABELS[2]], "labels")


@pytest.mark.parametrize(("kind", "records"), [("pairs", PAIRS), ("labels", LABELS)])
def test_what_is_stored_comes_with_the_tokens_it_is_of(
    tmp_path, tokenizer, kind, records
):
    dataset = load(tmp_path, tokenizer, records, kind, max_pairs=2)
    parts, seen = [], 0
    for batch in dataset.completion_batches(4):
        assert batch.size == 4
        mask = batch["completion_mask"]
        parts.append(batch["tokens"][mask] * np.float32(0.5))
        seen += (batch.ids >= 0).sum()
    assert seen == dataset.num_completions == {"pairs": 10, "labels": 8}[kind]
    dataset.store("ref_logprobs", np.concatenate(parts))
    batch = dataset.batch(range(len(dataset)), 1)
    mask = batch["completion_mask"]
    expected = np.where(mask, 0.5 * batch["tokens"], 0.0)
    np.testing.assert_array_equal(batch["ref_logprobs"], expected)
    if kind == "labels":
        place, starts = np.arange(dataset.row_width)[None, :], mask.argmax(axis=1)
        of_others = (place >= starts[:, None]) & (
            place < batch["mismatched_lengths"][:, None]
        )
        expected = np.where(of_others, 0.5 * batch["mismatched_tokens"], 0.0)
        np.testing.assert_array_equal(batch["mismatched_ref_logprobs"], expected)
    with pytest.raises(ValueError, match=r"'ref_logprobs' has the shape \(3,\)"):
        dataset.store("ref_logprobs", np.zeros(3, np.float32))


def test_prompts_are_as_wide_as_the_longest_by_default(tmp_path, tokenizer):
    dataset = load(tmp_path, tokenizer, PROMPTS, "prompts")
    assert dataset.prompt_width == dataset.row_width == 24
    batch = dataset.batch([0, 3])
    assert batch.keys == ("prompts",)
    assert batch["prompts"].shape == (2, 24)
    np.testing.assert_array_equal(batch.lengths, [3, 12])
    np.testing.assert_array_equal(batch["prompts"][0, :3], tokenizer.encode("aaa"))
    assert batch.columns == {"prompt": ["aaa", "a" * 12], "answer": ["3", "12"]}


def test_prompts_take_the_smallest_bucket_that_holds_them(tmp_path, tokenizer):
    dataset = load(tmp_path, tokenizer, PROMPTS, "prompts", length_buckets=(64, 10, 20))
    widths = [dataset.batch(rows)["prompts"].shape[1] for rows in ([0, 2], [0, 3], [1])]
    assert widths == [10, 20, 20]
    assert dataset.prompt_width == 20
    with pytest.raises(ValueError, match=r"longest prompt has 20 tokens.*\[8, 16\]"):
        load(tmp_path, tokenizer, PROMPTS, "prompts", length_buckets=(8, 16))


def test_the_row_width_is_a_multiple_of_8_above_an_odd_limit(tmp_path, tokenizer):
    dataset = load(tmp_path, tokenizer, ANSWERS, "prompt_answer", max_length=11)
    assert (len(dataset), dataset.row_width) == (3, 16)


def test_conversations_end_where_the_template_ends_the_answer(tmp_path, tokenizer):
    user = {"role": "user", "content": "Hi"}
    messages = [user, {"role": "assistant", "content": "Yo"}]
    batch = load(tmp_path, tokenizer, [{"messages": messages}], "prompt_answer").batch(
        [0]
    )
    whole = [*tokenizer.encode("<user>Hi<eos>\n<assistant>Yo"), tokenizer.eos_id]
    assert tokenizer.encode("<eos>") == [tokenizer.eos_id]
    np.testing.assert_array_equal(batch["tokens"][0, : len(whole)], whole)
    assert batch.lengths[0] == len(whole)  # the template's newline is cut
    assert batch["completion_mask"].sum() == 3
    assert batch.columns["answer"] == ["Yo"]


def test_a_template_without_an_end_gets_one(tmp_path):
    template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    tokenizer = Tokenizer.train([], 257, special=("<eos>",), chat_template=template)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Y"},
    ]
    batch = load(tmp_path, tokenizer, [{"messages": messages}], "prompt_answer").batch(
        [0]
    )
    expected = [*tokenizer.encode("Hi|Y|"), tokenizer.eos_id]
    np.testing.assert_array_equal(batch["tokens"][0, :6], expected)


def test_held_out_records_can_be_limited(tmp_path, tokenizer):
    limits = {"valid_limit": 2}
    assert len(load(tmp_path, tokenizer, PROMPTS, "prompts", **limits)) == 4
    valid = load(tmp_path, tokenizer, PROMPTS, "prompts", split="valid", **limits)
    assert len(valid) == 2
    assert valid.batch([0, 1]).columns["answer"] == ["3", "20"]


def test_fingerprints_tell_data_sets_apart(tmp_path, tokenizer):
    def fingerprint(records=ANSWERS, **changes):
        return load(
            tmp_path, tokenizer, records, "prompt_answer", **changes
        ).fingerprint()

    assert fingerprint() == fingerprint()
    assert fingerprint(ANSWERS[:2]) != fingerprint()
    assert fingerprint(ANSWERS[::-1]) != fingerprint()
    assert fingerprint(seed=1) != fingerprint()
    assert fingerprint(max_length=8) != fingerprint()
    changed = [{**ANSWERS[0], "id": "other"}, *ANSWERS[1:]]
    assert fingerprint(changed) != fingerprint()


@pytest.mark.parametrize(
    ("kind", "records", "limits", "message"),
    [
        ("prompts", PROMPTS, {"max_prompt_length": 2}, "every prompt is longer than"),
        (
            "prompts",
            PROMPTS,
            {"max_prompt_length": 2},
            "max_prompt_length=2.* has 3 to",
        ),
        ("prompts", PROMPTS, {"max_prompt_length": 9, "overlong": "refuse"}, "2 of 4"),
        (
            "prompts",
            PROMPTS,
            {"max_prompt_length": 2, "overlong": "truncate"},
            "every prompt is longer",
        ),
        (
            "prompt_answer",
            ANSWERS,
            {"max_length": 5},
            "every record is longer than max_length=5: the shortest has 6 tokens",
        ),
        (
            "prompt_answer",
            ANSWERS,
            {"max_length": 8, "overlong": "refuse"},
            "record 2 has 11 tokens",
        ),
        ("prompt_answer", [{"prompt": "a"}], {}, r"records\.jsonl: Record 0"),
        ("", ANSWERS, {}, r"`data\.kind` is empty"),
    ],
)
def test_bad_data_is_refused(tmp_path, tokenizer, kind, records, limits, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, tokenizer, records, kind, **limits)


def test_paths_and_splits_are_checked(tokenizer):
    with pytest.raises(ValueError, match=r"`data\.valid_path` is empty"):
        load_dataset(DataConfig(path="x", kind="prompts"), tokenizer, split="valid")
    with pytest.raises(ValueError, match="`split` is 'test'"):
        load_dataset(DataConfig(path="x", kind="prompts"), tokenizer, split="test")
    with pytest.raises(FileNotFoundError, match=r"x\.jsonl"):
        load_dataset(DataConfig(path="x.jsonl", kind="prompts"), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sft"}, "`kind` is 'sft'"),
        ({"overlong": "cut"}, "`overlong` is 'cut'"),
        ({"max_length": 0}, "`max_length` is 0"),
        ({"max_pairs": 0}, "`max_pairs` is 0"),
        ({"valid_limit": -1}, "`valid_limit` is -1"),
        ({"length_buckets": (0, 8)}, "`length_buckets`"),
    ],
)
def test_bad_settings_are_refused_when_made(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


def test_held_out_records_are_the_last_and_no_others(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "number {i}"}}\n' for i in range(10)))
    config = DataConfig(path=str(path), kind="prompts", held_out=3)
    tokenizer = Tokenizer.train(["number 0 1 2 3 4 5 6 7 8 9"], vocab_size=280)
    train = load_dataset(config, tokenizer)
    valid = load_dataset(config, tokenizer, split="valid")
    assert train.batch(range(7)).columns["prompt"] == [f"number {i}" for i in range(7)]
    assert valid.batch(range(3)).columns["prompt"] == [
        "number 7",
        "number 8",
        "number 9",
    ]


def test_prompts_may_be_of_given_records_alone(tmp_path):
    path = tmp_path / "answers.jsonl"
    # As answers, record 3 is too long; as prompts, record 4 is.
    answers = ["a"] * 3 + ["a" * 40] + ["a"]
    prompts = ["a"] * 4 + ["a" * 20]
    lines = [
        json.dumps({"prompt": prompt, "answer": answer}) + "\n"
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    path.write_text("".join(lines))
    limits = {"max_length": 32, "max_prompt_length": 8, "held_out": 2}
    config = DataConfig(path=str(path), kind="prompt_answer", **limits)
    tokenizer = Tokenizer.train(["b"], vocab_size=280)
    held_out = load_dataset(config, tokenizer, split="valid")
    assert held_out.numbers == {2, 4}
    prompts = dataclasses.replace(config, kind="prompts")
    only = held_out.numbers
    found = load_dataset(prompts, tokenizer, split="valid", only=only)
    assert found.numbers == {2}
    # By themselves, two of those that were learned from would be the last.
    assert load_dataset(prompts, tokenizer, split="valid").numbers == {2, 3}


def test_holding_out_everything_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n')
    config = DataConfig(path=str(path), kind="prompts", held_out=1)
    tokenizer = Tokenizer.train(["one"], vocab_size=280)
    with pytest.raises(ValueError, match="Hold out fewer"):
        load_dataset(config, tokenizer)
