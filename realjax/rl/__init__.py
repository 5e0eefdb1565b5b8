"""The arithmetic of reinforcement learning from feedback: pure functions of arrays.

Reading order: `masking` (means over tokens that count), `logprobs` and `sampling` (one
definition of a log-probability), `rewards`, `advantages`, `normalization`, `kl`,
`losses`.
"""

from realjax.rl import (
    advantages,
    kl,
    logprobs,
    losses,
    masking,
    normalization,
    rewards,
    sampling,
)

__all__ = [
    "advantages",
    "kl",
    "logprobs",
    "losses",
    "masking",
    "normalization",
    "rewards",
    "sampling",
]
