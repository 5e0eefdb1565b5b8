"""Model function calls: what is asked of a role, and the programs that do it."""

from realjax.functions.function import (
    Delivery,
    Follow,
    Function,
    Generate,
    Infer,
    Score,
    Train,
    Transform,
    is_filtered,
)
from realjax.functions.score import RewardFunction

__all__ = [
    "Delivery",
    "Follow",
    "Function",
    "Generate",
    "Infer",
    "RewardFunction",
    "Score",
    "Train",
    "Transform",
    "is_filtered",
]
