"""What evaluation estimates from several completions of each prompt.

Arrays of the host, [B, N]: N completions of each of B prompts. Standard errors are over
prompts: completions of one prompt are no independent draws of what a policy can do.
"""

import numpy as np

from realjax.core.arrays import Bool, Float


def pass_at_k(passed: Bool[np.ndarray, "B N"], k: int) -> Float[np.ndarray, " B"]:
    """Estimate how likely one of k completions passes, prompt by prompt.

        1 - C(n-c, k) / C(n, k) = 1 - Π_{i = n-c+1}^{n} (1 - k/i)

    with c of n completions that passed. The estimate has no bias, unlike
    1 - (1 - c/n)^k.

    Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1 and figure 3.

    Raises:
        ValueError: k is not from 1 to N.
    """
    num_completions = passed.shape[1]
    if not 1 <= k <= num_completions:
        raise ValueError(
            f"pass@{k} of {num_completions} completions: k must be from 1 to their"
            " number. Draw more of each prompt."
        )
    numbers = np.arange(1, num_completions + 1)
    num_failed = num_completions - passed.sum(axis=1)
    # Below i = k a factor would be negative; C(n-c, k) is 0 there, and so is i = k's.
    factors = np.maximum(1.0 - k / numbers, 0.0)
    return 1.0 - np.where(numbers > num_failed[:, None], factors, 1.0).prod(axis=1)


def win_rates(
    scores: Float[np.ndarray, "B N"], against: Float[np.ndarray, "B N"]
) -> Float[np.ndarray, " B"]:
    """Return how often completions score above others, prompt by prompt.

    Every completion of a prompt meets every other one; a tie is half a win.

        (1 / N²) Σ_i Σ_j [s_i > a_j] + [s_i = a_j] / 2

    which is the Mann-Whitney statistic, divided by its largest value.
    """
    mine, other = scores[:, :, None], against[:, None, :]
    return ((mine > other) + 0.5 * (mine == other)).mean(axis=(1, 2))


def mean_and_error(values: Float[np.ndarray, " B"]) -> tuple[float, float]:
    """Return the mean of independent values, and its standard error (0 of one value).

    s / sqrt(n), with the variance s² over n - 1.
    """
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
