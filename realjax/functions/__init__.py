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
from realjax.functions.rollouts import SAMPLED, Rollouts
from realjax.functions.score import RewardFunction

__all__ = [
    "SAMPLED",
    "Delivery",
    "Follow",
    "Function",
    "Generate",
    "Infer",
    "RewardFunction",
    "Rollouts",
    "Score",
    "Train",
    "Transform",
    "is_filtered",
]
