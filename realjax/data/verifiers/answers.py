r"""Verifiers of final answers: numbers, and mathematics as LaTeX has it.

exact_answer     the number after "####", else the last one     GSM8K, leniently
gsm8k            the number after "####", and only that         GSM8K, with its form
numeric_answer   a number within a tolerance, also 3/4 or 1.2e3
boxed_answer     what the last \\boxed{} holds                   MATH
"""

import decimal
import fractions
import re
from collections.abc import Sequence
from typing import Any

from realjax.data.verifiers.columns import needed_column

_NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARK = "####"
_LONGEST_NUMBER = 64  # Characters; what is longer is no number that anybody meant.
_MOST_EXPONENT = 400  # 1e999999999 would fill the memory as a fraction.

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_VALUE = re.compile(
    r"(?P<sign>[+-]*)(?:(?P<whole>\d*)"
    rf"\\frac\{{(?P<above>-?{_DECIMAL})\}}\{{(?P<below>-?{_DECIMAL})\}}"
    rf"|(?P<over>{_DECIMAL})/(?P<under>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})"
    r"(?:(?:[eE]|(?:\\times|\\cdot|\*|×)10\^)\{?(?P<exponent>[+-]?\d+)\}?)?)"
)
_LOOSE_VALUE = re.compile(
    rf"[+-]?\$?(?:{_DECIMAL}\s*/\s*{_DECIMAL}|{_DECIMAL}(?:[eE][+-]?\d+)?)"
)
_MIXED = re.compile(r"([+-]?\d+)\s+(\d+)/(\d+)")
_ANSWER_IS = re.compile(r"(?i)\banswer\s*(?:is|:|=)\s*:?\s*(?=\S)")

_SPACES = re.compile(r"\\[!,;: ]|~|\s+|\\(?:quad|qquad)\b|\{,\}")
_IGNORED = re.compile(
    r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg)(?![A-Za-z])"
    r"|\^\{?\\circ\}?|\\degree|°|\\?[%$]"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|rm)\s*\{([^{}]*)\}")
_VARIABLE = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?=(?!=)")
_CLOSING = {"(": ")]", "[": ")]", "\\{": ("\\}",)}


def exact_answer(
    prompts: Sequence[str],
    completions: Sequence[str | None],
    *,
    answer: Sequence[Any] | None = None,
    **columns: Sequence[Any],
) -> list[float]:
    """Scores 1 where the final number is that of the column `answer`, else 0.

    The rule of GSM8K (Cobbe et al. 2021), with both sides read by `final_number`: an
    answer may be a number, or a whole solution.
    """
    del prompts, columns
    answers = needed_column("exact_answer", "answer", answer, completions)
    scores = []
    for completion, expected in zip(completions, answers, strict=True):
        wanted = final_number(expected)
        is_right = wanted is not None and final_number(completion) == wanted
        scores.append(float(is_right))
    return scores


def gsm8k(
    prompts: Sequence[str],
    completions: Sequence[str | None],
    *,
    answer: Sequence[Any] | None = None,
    form_score: float = 0.0,
    **columns: Sequence[Any],
) -> list[float]:
    """Scores 1 where the number after "####" is that of the column `answer`.

    A completion without the mark has no answer, whatever its last number.

    Args:
        prompts: not read.
        completions: solutions that end with "#### NUMBER".
        answer: a number, or a whole solution.
        form_score: what a wrong number gets that stands after the mark.
        **columns: not read.
    """
    del prompts, columns
    answers = needed_column("gsm8k", "answer", answer, completions)
    scores = []
    for completion, expected in zip(completions, answers, strict=True):
        found, wanted = _marked_number(completion or ""), final_number(expected)
        if found is None:
            scores.append(0.0)
        else:
            scores.append(1.0 if found == wanted else form_score)
    return scores


def numeric_answer(
    prompts: Sequence[str],
    completions: Sequence[str | None],
    *,
    answer: Sequence[Any] | None = None,
    tolerance: float = 0.0,
    relative_tolerance: float = 0.0,
    **columns: Sequence[Any],
) -> list[float]:
    r"""Scores 1 where the final answer is a number near that of the column `answer`.

    The final answer is what stands in the last \boxed{}, else after "####", else after
    "answer is", else the last number or fraction. Signs of currency and per cent,
    thousands separators and units behind a number do not count: "50%" is 50.

    Args:
        prompts: not read.
        completions: of which the final answer is read.
        answer: a number, or a text that is read in the same way.
        tolerance: largest difference that is right.
        relative_tolerance: the same, as a part of the answer's size.
        **columns: not read.
    """
    del prompts, columns
    answers = needed_column("numeric_answer", "answer", answer, completions)
    scores = []
    for completion, expected in zip(completions, answers, strict=True):
        found, wanted = final_value(completion), final_value(expected)
        if found is None or wanted is None:
            scores.append(0.0)
            continue
        allowed = max(
            fractions.Fraction(tolerance),
            fractions.Fraction(relative_tolerance) * abs(wanted),
        )
        scores.append(float(abs(found - wanted) <= allowed))
    return scores


def boxed_answer(
    prompts: Sequence[str],
    completions: Sequence[str | None],
    *,
    answer: Sequence[Any] | None = None,
    needs_box: bool = True,
    form_score: float = 0.0,
    **columns: Sequence[Any],
) -> list[float]:
    r"""Scores 1 where the last \boxed{} holds the answer, by `is_same_mathematics`.

    Args:
        prompts: not read.
        completions: solutions in LaTeX.
        answer: what the box should hold, or a whole solution with a box.
        needs_box: whether a completion without a box is wrong; else the text behind
            "answer is", or the whole of it, counts.
        form_score: what a box with something else gets.
        **columns: not read.
    """
    del prompts, columns
    answers = needed_column("boxed_answer", "answer", answer, completions)
    scores = []
    for completion, expected in zip(completions, answers, strict=True):
        text, wanted = completion or "", "" if expected is None else str(expected)
        in_box = boxed(wanted)
        wanted = wanted if in_box is None else in_box
        found = boxed(text)
        if found is None and not needs_box:
            found = _after_words(text) or text
        if found is None or not wanted.strip():
            scores.append(0.0)
        else:
            is_right = is_same_mathematics(found, wanted)
            scores.append(1.0 if is_right else form_score)
    return scores


# -- numbers -------------------------------------------------------------------------


def final_number(text: Any) -> decimal.Decimal | None:
    """The number after the first "####", else the last number, else None.

    Dollar signs and thousands separators do not count: "#### $1,200.00" is 1200.
    """
    text = "" if text is None else str(text)
    marked = _marked_number(text)
    if marked is not None:
        return marked
    numbers = re.findall(_NUMBER, text)
    return _decimal(numbers[-1]) if numbers else None


def final_value(text: Any) -> fractions.Fraction | None:
    """The exact value of a text's final answer; see `numeric_answer` for where it is.

    None where that is no number.
    """
    text = "" if text is None else str(text)
    marked = re.search(rf"{_MARK}\s*(.+)", text)
    places = (boxed(text), marked.group(1) if marked else None, _after_words(text))
    for place in places:
        if place is not None:
            value = number_value(place)
            return _first_value(place) if value is None else value
    found = _LOOSE_VALUE.findall(text)
    return number_value(found[-1]) if found else None


def number_value(text: str) -> fractions.Fraction | None:
    r"""The exact value of a text that is a number and nothing else; None if it is not.

    Decimals, "1,200", "3/4", "\frac{3}{4}", "1\frac{1}{2}", "1 1/2", "1.5e3",
    "1.5 \times 10^{3}", with signs of currency or per cent, which do not count.
    """
    text = _plain(_MIXED.sub(r"\1\\frac{\2}{\3}", text.strip()))
    if len(text) > _LONGEST_NUMBER or not (found := _VALUE.fullmatch(text)):
        return None
    sign = -1 if found["sign"].count("-") % 2 else 1
    if found["decimal"] is not None:
        exponent = int(found["exponent"] or 0)
        if abs(exponent) > _MOST_EXPONENT:
            return None
        value = _exact(found["decimal"]) * fractions.Fraction(10) ** exponent
        return sign * value
    above = _exact(found["above"] or found["over"])
    below = _exact(found["below"] or found["under"])
    return sign * (int(found["whole"] or 0) + above / below) if below else None


def _marked_number(text: str) -> decimal.Decimal | None:
    marked = re.search(rf"{_MARK}\s*({_NUMBER})", text)
    return _decimal(marked.group(1)) if marked else None


def _decimal(text: str) -> decimal.Decimal:
    return decimal.Decimal(re.sub(r"[$,]", "", text))


def _exact(text: str) -> fractions.Fraction:
    return fractions.Fraction(text.replace(",", "").rstrip("."))


def _first_value(text: str) -> fractions.Fraction | None:
    """Of a text with units: "12 apples"."""
    found = _LOOSE_VALUE.match(text.strip().lstrip("*=:($ "))
    return number_value(found.group()) if found else None


def _after_words(text: str) -> str | None:
    ends = [found.end() for found in _ANSWER_IS.finditer(text)]
    if not ends:
        return None
    return text[ends[-1] :].partition("\n")[0].strip().rstrip(".")


# -- mathematics ---------------------------------------------------------------------


def boxed(text: str) -> str | None:
    r"""What the last \boxed{} of a text holds, braces inside it and all.

    None if there is none, or its brace is not closed.
    """
    starts = [m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*(?=[{\s\w-])", text)]
    if not starts:
        return None
    start = starts[-1]
    if text[start : start + 1] != "{":
        token = re.match(r"[^\s$]+", text[start:])  # As in "\boxed 5".
        return token.group().rstrip(".") if token else None
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 2  # A brace behind it is a sign of its own.
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start + 1 : place]
        place += 1
    return None


def is_same_mathematics(left: str, right: str) -> bool:
    """Whether two answers in LaTeX are the same.

    They are if both are numbers of one value; or if nothing is left to tell them apart
    but spaces, sizes of brackets, kinds of fractions, units, degrees, per cent, dollars
    and a variable before an equals sign; or if both are tuples, intervals or lists of
    such, or sets of such in any order. What takes algebra (x+1 and 1+x) is not found.
    """
    first, second = number_value(left), number_value(right)
    if first is not None and second is not None:
        return first == second
    left, right = _plain(left), _plain(right)
    if left == right and left:
        return True
    mine, others = _items(left), _items(right)
    if mine is None or others is None or mine[0] != others[0]:
        return False
    kind, parts, wanted = mine[0], mine[1], list(others[1])
    if len(parts) != len(wanted):
        return False
    if kind != ("\\{", "\\}"):
        return all(map(is_same_mathematics, parts, wanted))
    for part in parts:
        same = next((w for w in wanted if is_same_mathematics(part, w)), None)
        if same is None:
            return False
        wanted.remove(same)
    return True


def _plain(text: str) -> str:
    """One spelling of what means the same; see `is_same_mathematics`."""
    text = text.strip().rstrip(".").replace("−", "-")
    text = _SPACES.sub(lambda m: "," if m.group() == "{,}" else "", _units_off(text))
    text = _IGNORED.sub("", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    # A fraction or a root of single signs needs no braces: \frac12, \sqrt3.
    text = re.sub(r"\\frac(\w)(?=[\w{])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\(?:le|leq|leqslant)(?![A-Za-z])", "\\\\le ", text)
    text = re.sub(r"\\(?:ge|geq|geqslant)(?![A-Za-z])", "\\\\ge ", text)
    if variable := _VARIABLE.match(text):
        text = text[variable.end() :]
    return text


def _units_off(text: str) -> str:
    """Words without their command; behind a number they are its unit, and go."""
    unit = re.fullmatch(rf"(.*[\d}}])\s*(?:\\[,; ])?\s*{_TEXT.pattern}(?:\^\d)?", text)
    if unit and re.search(r"\d", unit.group(1)) and not unit.group(1).endswith("\\}"):
        text = unit.group(1)
    return _TEXT.sub(r"\1", text)


def _items(text: str) -> tuple[tuple[str, str], list[str]] | None:
    """Brackets and items of a list, with "" for brackets where it has none."""
    opening = next((b for b in _CLOSING if text.startswith(b)), "")
    closing = next((b for b in _CLOSING.get(opening, ()) if text.endswith(b)), "")
    if opening and not closing:
        return None
    inner = text[len(opening) : len(text) - len(closing)] if opening else text
    items, depth, start = [], 0, 0
    for place, sign in enumerate(inner):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            items.append(inner[start:place])
            start = place + 1
    items.append(inner[start:])
    if len(items) == 1 and not opening:
        return None
    return (opening, closing), items
