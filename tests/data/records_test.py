"""Tests of `realjax/data/records.py`."""

import json

import pytest

from realjax.data.records import load_records, read_examples
from realjax.data.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "How is it?"}
GOOD = {"role": "assistant", "content": "Good."}
BAD = {"role": "assistant", "content": "Bad."}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["How is it? Good. Bad."], 270, chat_template=TEMPLATE)


def read_one(record, kind, tokenizer):
    (example,) = read_examples([record], kind, tokenizer)
    return example


def test_json_and_json_lines_hold_the_same_records(tmp_path):
    records = [{"prompt": "a\u2028b"}, {"prompt": "naïve", "n": 1}]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "x.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "x.json").write_text(json.dumps(records), encoding="utf-8-sig")
    assert load_records(tmp_path / "x.jsonl") == records
    assert load_records(str(tmp_path / "x.json")) == records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": 2\n', r"Line 3 of .*x\.jsonl.* is not JSON"),
        ("x.jsonl", '{"a": 1}\n[1]\n', "Record 1 of .* is a list"),
        ("x.jsonl", "\n\n", "has no record"),
        ("x.json", "[]", "has no record"),
        ("x.json", '{"a": 1}', "holds a dict"),
        ("x.json", "[1]", "Record 0 of .* is a int"),
        ("x.json", '{"a": 1}\n{"a": 2}', r"name it \.jsonl"),
        ("x.csv", "a", r"ends with '\.csv'"),
    ],
)
def test_files_that_are_not_records_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path / name)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl' does not exist"):
        load_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_records(tmp_path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_records(tmp_path / "x.jsonl")


@pytest.mark.parametrize("field", ["answer", "completion"])
def test_prompt_and_answer_are_read_with_their_extras(tokenizer, field):
    record = {"prompt": "How?", field: " Good.", "id": 7, "topic": None}
    example = read_one(record, "prompt_answer", tokenizer)
    assert (example.prompt, example.completions) == ("How?", (" Good.",))
    assert example.extras == {"id": 7, "topic": None}


def test_an_answer_is_an_extra_where_only_prompts_are_read(tokenizer):
    example = read_one({"prompt": "2+2=", "answer": "4"}, "prompts", tokenizer)
    assert (example.completions, example.extras) == ((), {"answer": "4"})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "How", "pos_answers": [" a", " b"], "neg_answers": [" c", " d"]},
        {"prompt": "How", "chosen": " a", "rejected": " c"},
        # The words both begin with are the prompt; "ab" and "ac" are not cut.
        {"chosen": "How is ab", "rejected": "How is ac"},
    ],
)
def test_pairs_alternate_better_and_worse(tokenizer, record):
    example = read_one(record, "pairs", tokenizer)
    if "pos_answers" in record:
        assert example.completions == (" a", " c", " b", " d")
    elif "prompt" in record:
        assert example.completions == (" a", " c")
    else:
        assert (example.prompt, example.completions) == ("How is", (" ab", " ac"))
    assert example.extras == {}


@pytest.mark.parametrize(
    ("kind", "record", "completions"),
    [
        ("prompt_answer", {"messages": [USER, GOOD]}, ("Good.<eos>\n",)),
        ("prompt_answer", {"prompt": [USER], "answer": [GOOD]}, ("Good.<eos>\n",)),
        ("prompt_answer", {"prompt": [USER], "completion": [GOOD]}, ("Good.<eos>\n",)),
        ("prompts", {"prompt": [USER]}, ()),
        ("prompts", {"messages": [USER]}, ()),
        ("prompts", {"messages": [USER, GOOD]}, ()),
        (
            "pairs",
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            ("Good.<eos>\n", "Bad.<eos>\n"),
        ),
        (
            "pairs",
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
            ("Good.<eos>\n", "Bad.<eos>\n"),
        ),
    ],
)
def test_conversations_are_rendered_by_the_template(
    tokenizer, kind, record, completions
):
    example = read_one(record, kind, tokenizer)
    assert example.prompt == "<user>How is it?<eos>\n<assistant>"
    assert example.completions == completions
    assert example.is_chat
    assert example.texts == tuple(text.split("<")[0] for text in completions)


def test_equal_conversations_still_have_an_answer(tokenizer):
    record = {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}
    assert read_one(record, "pairs", tokenizer).texts == ("Good.", "Good.")


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("prompt_answer", {"answer": "a"}, "no field `prompt` or `messages`"),
        ("prompt_answer", {"prompt": "a"}, r"no field `answer` or `completion`.*'prom"),
        ("prompt_answer", {"prompt": "a", "answer": None}, "no field `answer`"),
        ("prompt_answer", {"prompt": "a", "answer": 3}, "`answer` is a int"),
        ("prompt_answer", {"prompt": 3, "answer": "a"}, "`prompt` is a int, 3"),
        ("prompt_answer", {"prompt": "", "answer": "a"}, "prompt is empty"),
        ("prompt_answer", {"prompt": [USER], "answer": "a"}, "`answer` is a str"),
        ("prompt_answer", {"prompt": [{"role": 1}], "answer": "a"}, "`prompt` is a"),
        ("prompt_answer", {"messages": [USER]}, "ends with the role 'user'"),
        ("prompt_answer", {"messages": [GOOD]}, "no turn before the answer"),
        ("prompts", {"question": "a"}, r"no field `prompt` .*\['question'\]"),
        ("prompts", {"prompt": []}, "`prompt` is a list"),
        ("pairs", {"prompt": "a", "pos_answers": ["b"]}, "no field `neg_answers`"),
        ("pairs", {"prompt": "a"}, "no field `pos_answers` or `chosen`"),
        (
            "pairs",
            {"prompt": "a", "pos_answers": ["b"], "neg_answers": ["c", "d"]},
            "1 pos_answers and 2 neg_answers",
        ),
        (
            "pairs",
            {"prompt": "a", "pos_answers": [], "neg_answers": []},
            "needed is a list of strings",
        ),
        (
            "pairs",
            {"prompt": "a", "pos_answers": ["b", 1], "neg_answers": ["c", "d"]},
            r"`pos_answers\[1\]` is a int",
        ),
        ("pairs", {"chosen": "Good", "rejected": "Bad"}, "prompt is empty"),
        ("labels", {"prompt": "a", "completion": "b"}, "no field `label`"),
        ("labels", {"prompt": "a", "completion": "b", "label": 1}, "`label` is 1"),
    ],
)
def test_bad_records_are_refused_with_their_number(tokenizer, kind, record, message):
    fine = {
        "prompt": "a",
        "answer": "b",
        "pos_answers": ["b"],
        "neg_answers": ["c"],
        "label": True,
    }
    with pytest.raises(ValueError, match=rf"Record 2 .*{kind}.*{message}"):
        read_examples([fine, fine, record], kind, tokenizer)


def test_a_template_that_changes_the_prompt_is_refused():
    template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer = Tokenizer.train(["a"], 260, chat_template=template)
    with pytest.raises(ValueError, match=r"Record 0 .* does not begin with that"):
        read_one({"messages": [USER, GOOD]}, "prompt_answer", tokenizer)


def test_conversations_need_a_template():
    with pytest.raises(ValueError, match=r"Record 0 .* no chat template"):
        read_one({"prompt": [USER]}, "prompts", Tokenizer.train(["a"], 260))
