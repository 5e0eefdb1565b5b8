"""Tests of `realjax/data/reviews.py`."""

import json
import random

import numpy as np
import pytest

from realjax.data import reviews
from realjax.data.datasets import DataConfig, load_dataset, load_records
from realjax.data.tokenizer import Tokenizer

SMALL = {"num_sft": 40, "num_pairs": 20, "num_prompts": 20, "num_valid": 8}
FILES = [
    f"{name}_{split}"
    for name in ("sft", "pairs", "labels", "prompts")
    for split in ("train", "valid")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reviews.write_reviews(tmp_path_factory.mktemp("data") / "reviews")


def records_of(folder, name):
    return load_records(folder / f"{name}.jsonl")


def test_sizes_are_those_asked_for(folder):
    sizes = {name: len(records_of(folder, name)) for name in FILES}
    assert sizes == {
        "sft_train": 4000,
        "sft_valid": 256,
        "pairs_train": 2000,
        "pairs_valid": 256,
        "labels_train": 2000,
        "labels_valid": 256,
        "prompts_train": 2000,
        "prompts_valid": 256,
    }
    assert Tokenizer.load(folder / "tokenizer").vocab_size == 512


def test_reviews_to_imitate_score_zero_on_average(folder):
    scores = [
        reviews.review_score(r["answer"]) for r in records_of(folder, "sft_train")
    ]
    assert abs(np.mean(scores)) < 1e-9
    assert np.mean(np.array(scores) > 0) == 0.5
    assert np.mean(np.abs(scores) < 1) == pytest.approx(0.2)  # mixed ones


def test_preferred_reviews_are_more_positive(folder):
    for split in ("train", "valid"):
        margins = [
            reviews.review_score(better) - reviews.review_score(worse)
            for record in records_of(folder, f"pairs_{split}")
            for better, worse in zip(
                record["pos_answers"], record["neg_answers"], strict=True
            )
        ]
        # Three sentiment words: the nearest two moods are 1 and 1/3 apart by 2/3.
        assert min(margins) > 0.6
        assert max(margins) == 2
        assert np.mean(np.array(margins) < 1.9) > 0.2


def test_prompts_are_neutral(folder):
    for name in FILES:
        assert {
            reviews.review_score(r["prompt"]) for r in records_of(folder, name)
        } == {0}


def test_held_out_prompts_are_new_combinations_of_opening_and_product(folder):
    known = reviews.all_prompts(is_held_out=False)
    new = reviews.all_prompts(is_held_out=True)
    combinations = [
        {(each["product"], each["opening"]) for each in prompts}
        for prompts in (known, new)
    ]
    assert [len(pairs) for pairs in combinations] == [96, 32]
    assert not combinations[0] & combinations[1]
    for name in ("sft", "pairs", "labels", "prompts"):
        for split, prompts in (("train", known), ("valid", new)):
            found = {r["prompt"] for r in records_of(folder, f"{name}_{split}")}
            assert found <= {each["prompt"] for each in prompts}


def test_prompts_of_a_file_repeat_only_when_all_were_used(folder):
    prompts = [r["prompt"] for r in records_of(folder, "prompts_train")]
    assert len(set(prompts)) == len(prompts)
    imitated = {r["prompt"] for r in records_of(folder, "sft_train")}
    assert len(imitated) == len(reviews.all_prompts(is_held_out=False))


def test_lengths_suit_short_rows(folder):
    tokenizer = Tokenizer.load(folder / "tokenizer")
    records = records_of(folder, "sft_train")
    prompts = [len(tokenizer.encode(r["prompt"])) for r in records]
    answers = [len(tokenizer.encode(r["answer"])) for r in records]
    assert max(prompts) <= 20 and 9 < np.mean(prompts) < 14
    assert max(answers) <= 32 and 14 < np.mean(answers) < 20


@pytest.mark.parametrize("mood", reviews.MOODS)
def test_answers_have_the_mood_asked_for(mood):
    rng = random.Random(0)
    answers = {reviews.write_answer(rng, "kettle", mood) for _ in range(200)}
    assert len(answers) > 150
    expected = sum(reviews.MOODS[mood]) / 3
    for answer in answers:
        assert reviews.review_score(answer) == pytest.approx(expected)
        assert answer.startswith(" ") and answer.endswith(".")


def test_first_words_alone_do_not_tell_mixed_from_pure():
    rng = random.Random(0)
    leads = {
        mood: {
            reviews.write_answer(rng, "lamp", mood).split(".")[0] for _ in range(300)
        }
        for mood in reviews.MOODS
    }
    assert leads["positive"] == leads["mostly positive"]
    assert leads["negative"] == leads["mostly negative"]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0),
        ("it is", 0),
        (" it is great", 1),  # no end of the sentence
        ("GREAT, great; bad", 1 / 3),
        (" My sister loves it. I hate it.", 0),
        (" the lid is lov", 0),  # a word that was cut
        (" greatly lovelyish", 0),
        ("\x00�\n awful", -1),
    ],
)
def test_any_text_has_a_score(text, score):
    assert reviews.review_score(text) == pytest.approx(score)


def test_the_same_seed_gives_the_same_files(tmp_path):
    one = reviews.write_reviews(tmp_path / "a" / "one", **SMALL)
    two = reviews.write_reviews(tmp_path / "two", **SMALL)
    other = reviews.write_reviews(tmp_path / "other", seed=1, **SMALL)
    for path in sorted(p for p in one.rglob("*") if p.is_file()):
        same = two / path.relative_to(one)
        assert path.read_bytes() == same.read_bytes(), path
    assert (one / "sft_train.jsonl").read_text() != (
        other / "sft_train.jsonl"
    ).read_text()


def test_a_written_folder_is_left_alone(tmp_path):
    folder = reviews.write_reviews(tmp_path / "reviews", **SMALL)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert reviews.write_reviews(tmp_path / "reviews", **SMALL) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    with pytest.raises(ValueError, match=r"'seed': 1.* were asked for"):
        reviews.write_reviews(folder, seed=1, **SMALL)


def test_other_peoples_files_are_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        reviews.write_reviews(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    folder = reviews.write_reviews(tmp_path / "empty", **SMALL)
    assert json.loads((folder / "reviews.json").read_text())["seed"] == 0


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "train", fail)
    with pytest.raises(KeyboardInterrupt):
        reviews.write_reviews(tmp_path / "reviews", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_all_files_load_as_data_sets(folder):
    tokenizer = Tokenizer.load(folder / "tokenizer")
    kinds = {"sft": "prompt_answer", "pairs": "pairs", "prompts": "prompts"}
    for name, kind in kinds.items():
        config = DataConfig(
            path=str(folder / f"{name}_train.jsonl"),
            valid_path=str(folder / f"{name}_valid.jsonl"),
            kind=kind,
            max_length=64,
            max_prompt_length=24,
            overlong="refuse",
        )
        for split in ("train", "valid"):
            dataset = load_dataset(config, tokenizer, split=split)
            assert dataset.row_width <= 64
            assert dataset.batch([0, 1]).size == 2 * dataset.rows_per_record
