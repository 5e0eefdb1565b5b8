"""Tests of `realjax/data/verifiers.py`."""

import decimal

import pytest

from realjax.data.verifiers import exact_answer, final_number, positive_review


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 apples.\n#### 12", "12"),
        ("#### 12\nQuestion: what is 5?", "12"),  # a model that runs on
        ("#### $1,200.00", "1200"),
        ("####-3", "-3"),
        ("so the answer is 7.", "7"),
        ("it is 3.50, or 4,000", "4000"),
        ("9-4=<<9-4=5>>5 left", "5"),
        ("about .5", "0.5"),
        ("#### unknown, perhaps 8", "8"),
        (72, "72"),
        (2.5, "2.5"),
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == decimal.Decimal(number)


@pytest.mark.parametrize("text", ["", "no idea", None, "####"])
def test_a_text_may_have_no_number(text):
    assert final_number(text) is None


def test_answers_are_compared_as_numbers():
    scores = exact_answer(
        ["?"] * 5,
        ["#### 1,000", "it is 999.", "no idea", "#### 5", None],
        answer=["1000.0", "#### 1000", "1000", None, "3"],
        id=[0, 1, 2, 3, 4],
    )
    assert scores == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_exact_answers_need_the_column():
    with pytest.raises(ValueError, match=r"needs a column `answer` .* got none"):
        exact_answer(["?"], ["#### 1"])
    with pytest.raises(ValueError, match=r"each of 2 completions; it got 1 values"):
        exact_answer(["?", "?"], ["1", "2"], answer=["1"])


def test_positive_reviews_score_by_the_grammars_rule():
    completions = [" I love it.", " it is bad.", " it is blue.", None]
    scores = positive_review(["x"] * 4, completions, product=["kettle"] * 4)
    assert scores == [1.0, -1.0, 0.0, 0.0]
