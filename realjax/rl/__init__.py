"""The arithmetic of reinforcement learning from feedback: pure functions of arrays.

Reading order: `masking` (means over tokens that count), `logprobs` and `sampling` (one
definition of a log-probability), `rewards`, `advantages`, `normalization`, `kl`,
`losses`, `preferences` (losses on pairs), `distillation`, `importance` (a sampler that
is not quite the policy in training).
"""

from realjax.rl import (
    advantages,
    distillation,
    importance,
    kl,
    logprobs,
    losses,
    masking,
    normalization,
    preferences,
    rewards,
    sampling,
)
from realjax.rl.kl import KLControl
from realjax.rl.masking import Mean
from realjax.rl.rewards import ScoreShaping
from realjax.rl.sampling import Sampling

__all__ = [
    "KLControl",
    "Mean",
    "Sampling",
    "ScoreShaping",
    "advantages",
    "distillation",
    "importance",
    "kl",
    "logprobs",
    "losses",
    "masking",
    "normalization",
    "preferences",
    "rewards",
    "sampling",
]
