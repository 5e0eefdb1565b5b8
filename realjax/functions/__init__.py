"""Model function calls: what is asked of a role, and the programs that do it."""

from realjax.functions.function import (
    Function,
    Generate,
    Infer,
    Score,
    Train,
    Transform,
    is_filtered,
)

__all__ = [
    "Function",
    "Generate",
    "Infer",
    "Score",
    "Train",
    "Transform",
    "is_filtered",
]
