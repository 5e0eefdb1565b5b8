"""The rule by which reviews of the example corpus are scored."""

from collections.abc import Sequence
from typing import Any

from realjax.data.reviews import review_score


def positive_review(
    prompts: Sequence[str], completions: Sequence[str | None], **columns: Sequence[Any]
) -> list[float]:
    """Scores how positive a review of the example corpus is, from -1 to 1."""
    del prompts, columns
    return [review_score(completion or "") for completion in completions]
