"""Scores of completions by rule, where no reward model is needed.

    answers     exact_answer, gsm8k, numeric_answer, boxed_answer
    formats     matches_pattern, length_near, length_at_most, valid_json
    programs    python_tests
    reviews     positive_review, of the example corpus

Every verifier has the signature `fn(prompts, completions, **columns) -> scores`: texts
in, one float a completion out. Columns are the extra fields of the records, one value a
completion; a verifier names those it reads and ignores the others. What else it is told
are its options:

    RewardFunction(fn="realjax.data.verifiers:gsm8k")
    RewardFunction(
        fn="realjax.data.verifiers:length_at_most",
        options={"maximum": 200, "margin": 50},
        weight=0.1,
    )
"""

from realjax.data.verifiers.answers import (
    boxed_answer,
    exact_answer,
    final_number,
    gsm8k,
    numeric_answer,
)
from realjax.data.verifiers.formats import (
    length_at_most,
    length_near,
    matches_pattern,
    valid_json,
)
from realjax.data.verifiers.programs import python_tests
from realjax.data.verifiers.reviews import positive_review

__all__ = [
    "boxed_answer",
    "exact_answer",
    "final_number",
    "gsm8k",
    "length_at_most",
    "length_near",
    "matches_pattern",
    "numeric_answer",
    "positive_review",
    "python_tests",
    "valid_json",
]
