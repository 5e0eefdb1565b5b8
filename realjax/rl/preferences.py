"""Losses on pairs of completions, of which the first is preferred.

Sequences come in pairs: chosen, rejected, chosen, rejected, … A pair's *margin* is how
much more the policy has come to prefer the chosen one, in nats:

    h = log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l)

or without a reference log π(y_w) - log π(y_l); per token of each completion, if lengths
are to count for nothing.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float
from realjax.core.config import check_choice

PreferenceLoss = Literal["sigmoid", "robust", "hinge", "ipo"]


def sequence_logprobs(
    logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    is_per_token: bool = False,
) -> Float[Array, "B"]:
    """Return log π of whole completions, or its mean over their tokens.

    Args:
        logprobs: of the tokens.
        mask: completion tokens; a row without any gives 0.
        is_per_token: whether the sum is divided by how many there are.
    """
    total = jnp.where(mask, logprobs, 0.0).sum(axis=1)
    return total / jnp.maximum(mask.sum(axis=1), 1) if is_per_token else total


def margins(values: Float[Array, "B"]) -> Float[Array, "B//2"]:
    """Return chosen minus rejected of each pair.

    Raises:
        ValueError: an odd number of sequences.
    """
    if values.shape[0] % 2:
        raise ValueError(
            f"{values.shape[0]} sequences are not pairs: each chosen one needs its"
            " rejected one right after it."
        )
    return values[0::2] - values[1::2]


def preference(
    margin: Float[Array, "P"],
    *,
    beta: float,
    kind: PreferenceLoss = "sigmoid",
    label_smoothing: float = 0.0,
    target_margin: float = 0.0,
) -> Float[Array, "P"]:
    """Return the loss of each pair; ε is the share of labels that are wrong.

        sigmoid   -(1 - ε) log σ(βh - γ) - ε log σ(γ - βh)
        robust    (-(1 - ε) log σ(βh - γ) + ε log σ(γ - βh)) / (1 - 2ε)
        hinge     max(0, 1 - (βh - γ))
        ipo       (h - 1 / 2β)²

    Sources: DPO, Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7,
    and with ε its conservative form, Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf, equation 3; robust, Chowdhury et al. 2024,
    https://arxiv.org/abs/2403.00409, equation 13; hinge, Zhao et al. 2023 (SLiC),
    https://arxiv.org/abs/2305.10425, equation 1; IPO, Azar et al. 2023,
    https://arxiv.org/abs/2310.12036, equation 17; γ, Meng et al. 2024 (SimPO),
    https://arxiv.org/abs/2405.14734, equation 6.

    Args:
        margin: h.
        beta: β, in 1 / nat: the larger, the nearer the policy stays to the reference.
        kind: of loss.
        label_smoothing: ε, below a half; of "sigmoid" and "robust".
        target_margin: γ, what the chosen one shall be ahead by.
    """
    check_choice("kind", kind, get_args(PreferenceLoss))
    ahead = beta * margin - target_margin
    right, wrong = -jax.nn.log_sigmoid(ahead), -jax.nn.log_sigmoid(-ahead)
    match kind:
        case "sigmoid":
            return (1 - label_smoothing) * right + label_smoothing * wrong
        case "robust":
            both = (1 - label_smoothing) * right - label_smoothing * wrong
            return both / (1 - 2 * label_smoothing)
        case "hinge":
            return jax.nn.relu(1 - ahead)
        case "ipo":
            return jnp.square(margin - 0.5 / beta)


def log_odds(logprobs: Float[Array, "B"]) -> Float[Array, "B"]:
    """Return log p / (1 - p) of completions, where p is e to their mean log π.

    Source: Hong et al. 2024 (ORPO), https://arxiv.org/abs/2403.07691, equation 3.

    Args:
        logprobs: means over tokens, below 0.
    """
    # 1 - p is 0 in float32 where a completion is all but certain.
    nearly_one = jnp.minimum(logprobs, -1e-6)
    return logprobs - jnp.log(-jnp.expm1(nearly_one))
