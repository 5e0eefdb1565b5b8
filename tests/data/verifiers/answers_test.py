"""Final answers: which one a text has, and when two are the same."""

import decimal
from fractions import Fraction

import pytest

from realjax.data.verifiers import boxed_answer, exact_answer, gsm8k, numeric_answer
from realjax.data.verifiers.answers import (
    boxed,
    final_number,
    final_value,
    is_same_mathematics,
    number_value,
)

# -- GSM8K -----------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "verifier", [exact_answer, gsm8k, numeric_answer, boxed_answer]
)
def test_answers_need_the_column(verifier):
    name = verifier.__name__
    with pytest.raises(ValueError, match=rf"`{name}` needs a column `answer` .* none"):
        verifier(["?"], ["#### 1"])
    with pytest.raises(ValueError, match=r"each of 2 completions; it got 1 values"):
        verifier(["?", "?"], ["1", "2"], answer=["1"])


def test_gsm8k_counts_a_number_behind_its_mark_alone():
    completions = ["so 12\n#### 12", "so it is 12", "#### 13", "#### $1,000.00", None]
    answers = ["12", "12", "12", "5 * 200 = 1000\n#### 1000", "12"]
    found = gsm8k(["?"] * 5, completions, answer=answers, form_score=0.1)
    assert found == [1.0, 0.0, 0.1, 1.0, 0.0]


# -- numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-12.", -12),
        ("1,234,567.50", Fraction(2469135, 2)),
        ("$1,200", 1200),
        (r"\$5", 5),
        ("50%", 50),
        (r"50\%", 50),
        ("3/4", Fraction(3, 4)),
        ("11/2", Fraction(11, 2)),  # Not one and a half.
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac34", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (".5", Fraction(1, 2)),
        ("1e-3", Fraction(1, 1000)),
        (r"1.5 \times 10^{3}", 1500),
        (r"1.5\cdot10^3", 1500),
        (r"90^\circ", 90),
        (r"12\text{ cm}", 12),
        (r"12\ \text{cm}^2", 12),
        (r"1{,}000", 1000),
        ("− 3", -3),
    ],
)
def test_a_number_has_one_exact_value(text, value):
    assert number_value(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "1,2", "1/0", "3 apples", "1e999999999", "9" * 100, "(1,2)", "2^3"],
)
def test_what_is_no_number_has_no_value(text):
    assert number_value(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"so \boxed{\frac{1}{2}}, not 3", Fraction(1, 2)),
        ("#### 12 apples", 12),
        ("The answer is: 3/4.", Fraction(3, 4)),
        ("First answer is 5. No: the answer is 6.", 6),
        ("it is 3/8 of 16, or 2.5e1", 25),
        ("in all 7/8", Fraction(7, 8)),
        (r"\boxed{$1,250.00}", 1250),
        (2.5, Fraction(5, 2)),
        ("none", None),
        (None, None),
    ],
)
def test_the_final_value_is_in_the_box_or_behind_the_words_or_last(text, value):
    assert final_value(text) == value


def test_numbers_are_right_within_the_tolerance():
    completions = ["3.14", "3.2", "1e9", "pi", None, r"\boxed{22/7}"]
    answers = ["3.14159"] * 6
    plain = numeric_answer(["?"] * 6, completions, answer=answers)
    assert plain == [0.0] * 6
    near = numeric_answer(["?"] * 6, completions, answer=answers, tolerance=0.002)
    assert near == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    # One hundredth of 3.14159 is 0.031.
    part = numeric_answer(
        ["?"] * 6, completions, answer=answers, relative_tolerance=0.01
    )
    assert part == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    # 0.1 + 0.2 and 0.3 are the same number here, in binary they are not.
    assert numeric_answer(["?"], ["0.30"], answer=["3/10"]) == [1.0]


# -- mathematics -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"thus $\boxed{42}$.", "42"),
        (r"\boxed{1} but then \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {x}", "x"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5.", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\frac{1}{2}", None),  # Not closed.
        ("none", None),
    ],
)
def test_the_last_box_is_read_with_the_braces_in_it(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac{1}{2}", r"\tfrac12"),
        ("1/2", r"\frac{1}{2}"),
        (r"2\sqrt3", r"2 \sqrt{3}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        ("(1/2, 0.25)", r"(\frac12, \frac{1}{4})"),
        (r"\{1, 2, 3\}", r"\{3,1,2\}"),
        ("x = 5", "5"),
        (r"5\text{ meters}", "5"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"30^\circ", "30"),
        (r"\$18.90", "18.9"),
        (r"10\%", "10"),
        ("1,000", "1000"),
        (r"x \leq 3", r"x\le3"),
        (r"[0, 1)", r"\left[0,1\right)"),
        ("1, 2", "1,2"),
        (r"\frac{x+1}{2}", r"\dfrac{x + 1}{2}"),
        ("-3.0", "-3"),
    ],
)
def test_answers_that_are_the_same_in_other_words(left, right):
    assert is_same_mathematics(left, right)
    assert is_same_mathematics(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("0.5", "0.51"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(1,2,3)"),
        (r"\{1,2\}", r"\{1,3\}"),
        (r"\{1,1,2\}", r"\{1,2,2\}"),
        ("x+1", "x-1"),
        (r"\sqrt{2}", "2"),
        ("", ""),
        ("12", "1,2"),
        ("A", "B"),
    ],
)
def test_answers_that_are_others(left, right):
    assert not is_same_mathematics(left, right)
    assert not is_same_mathematics(right, left)


def test_boxed_answers():
    completions = [
        r"We get $\boxed{\dfrac{3}{4}}$.",
        r"We get $\boxed{0.74}$.",
        "the answer is 3/4",
        "0.75",
        None,
    ]
    answers = [r"so \boxed{\frac34}"] + ["0.75"] * 4
    prompts = ["?"] * 5
    assert boxed_answer(prompts, completions, answer=answers) == [1, 0, 0, 0, 0]
    lenient = boxed_answer(prompts, completions, answer=answers, needs_box=False)
    assert lenient == [1, 0, 1, 1, 0]
    formed = boxed_answer(prompts, completions, answer=answers, form_score=0.1)
    assert formed == [1, 0.1, 0, 0, 0]
    assert boxed_answer(["?"], [r"\boxed{}"], answer=[None]) == [0.0]
