"""Patterns, lengths and JSON."""

import json

import pytest

from realjax.data.verifiers import (
    length_at_most,
    length_near,
    matches_pattern,
    positive_review,
    valid_json,
)


def test_a_pattern_matches_the_whole_or_a_part():
    form = r"<think>.*</think>\s*<answer>.*</answer>"
    completions = [
        " <think>so\nand so</think>\n<answer>4</answer>\n",
        "well, <think>so</think><answer>4</answer>",
        "4",
        None,
    ]
    prompts = ["?"] * 4
    assert matches_pattern(prompts, completions, pattern=form) == [1, 0, 0, 0]
    found = matches_pattern(prompts, completions, pattern=form, is_whole=False)
    assert found == [1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"pattern '\(' is none"):
        matches_pattern(["?"], ["4"], pattern="(")


def test_lengths_are_best_at_the_target():
    completions = ["a b c d", "a b c", "a b c d e f g h", "", "a " * 20, None]
    # |n - 4| / 4 is 0, 1/4, 1, 1, 4.
    found = length_near(["?"] * 6, completions, target=4)
    assert found == [1.0, 0.75, 0.0, 0.0, 0.0, 0.0]
    assert length_near(["?"], ["abc"], target=6, unit="characters") == [0.5]


def test_lengths_fall_from_the_maximum_over_the_margin():
    completions = ["a b", "a b c", "a b c d", "a b c d e", "a b c d e f"]
    prompts = ["?"] * 5
    # 2 to 6 words; from 3 to 5 the score falls.
    found = length_at_most(prompts, completions, maximum=3, margin=2)
    assert found == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert length_at_most(prompts, completions, maximum=3) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("verifier", "options", "message"),
    [
        (length_near, {"target": 0}, "target is 0"),
        (length_near, {"target": 5, "unit": "tokens"}, "unit is 'tokens'"),
        (length_at_most, {"maximum": 5, "margin": -1}, "margin is -1"),
    ],
)
def test_lengths_that_are_none_are_refused(verifier, options, message):
    with pytest.raises(ValueError, match=message):
        verifier(["?"], ["a"], **options)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        ('Here it is:\n```json\n{"name": "Ada"}\n```\nThere.', 1.0),
        ('```\n{"name": "Ada"}\n```', 1.0),
        (' {"name": "Ada"}\n', 1.0),
        ('{"name": "Ada", "age": -1}', 0.25),
        ('{"age": 36}', 0.25),
        ('{"name": "Ada", "x": 1}', 0.25),
        ("[]", 0.25),
        ("NaN", 0.0),
        ("1e999", 0.0),
        ('{"name": "Ada"', 0.0),
        ('{"name": "Ada"} and more', 0.0),
        ("[" * 100_000, 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_json_is_checked_against_its_schema(completion, score):
    found = valid_json(["?"], [completion], schema=SCHEMA, parsed_score=0.25)
    assert found == [score]
    as_text = json.dumps(SCHEMA)
    assert valid_json(["?"], [completion], schema=as_text, parsed_score=0.25) == [score]


@pytest.mark.parametrize(
    ("completion", "schema"),
    [
        ("1" + "0" * 400, {"multipleOf": 0.5}),
        ("[" * 600 + "]" * 600, {"items": {"$ref": "#"}}),
    ],
    ids=["large", "deep"],
)
def test_what_cannot_be_checked_is_json_but_not_valid(completion, schema):
    found = valid_json(["?"], [completion], schema=schema, parsed_score=0.25)
    assert found == [0.25]


def test_each_completion_may_have_its_schema():
    schemas = [{"type": "integer"}, {"type": "string"}, True]
    assert valid_json(["?"] * 3, ["1", "1", "1"], json_schema=schemas) == [1, 0, 1]
    # Without any, JSON is all that is asked for.
    assert valid_json(["?"] * 2, ["[1]", "[1"]) == [1, 0]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "is none: 'strin' is not valid"),
        ("{", "is none"),
        ({"$ref": "https://example.org/a.json"}, "refers to 'https.*another document"),
    ],
)
def test_schemas_that_are_none_are_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        valid_json(["?"], ["1"], schema=schema)


def test_positive_reviews_score_by_the_grammars_rule():
    completions = [" I love it.", " it is bad.", " it is blue.", None]
    scores = positive_review(["x"] * 4, completions, product=["kettle"] * 4)
    assert scores == [1.0, -1.0, 0.0, 0.0]
