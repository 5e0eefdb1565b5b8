"""The columns that a verifier reads, checked."""

from collections.abc import Sequence
from typing import Any


def needed_column(
    verifier: str,
    column: str,
    values: Sequence[Any] | None,
    completions: Sequence[Any],
) -> Sequence[Any]:
    """Return the column's values, one for each completion.

    Args:
        verifier: that reads it, for the error.
        column: its name.
        values: what came; None where the records have no such field.
        completions: to be scored.

    Raises:
        ValueError: there is no column, or it is of another length.
    """
    if values is None or len(values) != len(completions):
        found = "none" if values is None else f"{len(values)} values"
        raise ValueError(
            f"`{verifier}` needs a column `{column}` with a value for each of "
            f"{len(completions)} completions; it got {found}. Add the field to the "
            "records."
        )
    return values
