"""Scores of completions by rule, where no reward model is needed.

Every verifier has the signature `fn(prompts, completions, **columns) -> scores`: texts
in, one float a completion out. Columns are the extra fields of the records, one value a
completion; a verifier names those it reads and ignores the others.
"""

import decimal
import re
from collections.abc import Sequence
from typing import Any

from realjax.data.reviews import review_score

__all__ = ["exact_answer", "final_number", "positive_review"]

_NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


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
    if answer is None or len(answer) != len(completions):
        found = "none" if answer is None else f"{len(answer)} values"
        raise ValueError(
            f"`exact_answer` needs a column `answer` with a value for each of "
            f"{len(completions)} completions; it got {found}. Add the field to the "
            "records."
        )
    scores = []
    for completion, expected in zip(completions, answer, strict=True):
        wanted = final_number(expected)
        is_right = wanted is not None and final_number(completion) == wanted
        scores.append(float(is_right))
    return scores


def final_number(text: Any) -> decimal.Decimal | None:
    """The number after the first "####", else the last number, else None.

    Dollar signs and thousands separators do not count: "#### $1,200.00" is 1200.
    """
    text = "" if text is None else str(text)
    marked = re.search(rf"####\s*({_NUMBER})", text)
    numbers = [marked.group(1)] if marked else re.findall(_NUMBER, text)
    if not numbers:
        return None
    return decimal.Decimal(re.sub(r"[$,]", "", numbers[-1]))


def positive_review(
    prompts: Sequence[str], completions: Sequence[str | None], **columns: Sequence[Any]
) -> list[float]:
    """Scores how positive a review of the example corpus is, from -1 to 1."""
    del prompts, columns
    return [review_score(completion or "") for completion in completions]
