"""Losses on pairs of completions, of which the first is preferred, and on labels.

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


def sides(
    values: Float[Array, "B"],
) -> tuple[Float[Array, "B//2"], Float[Array, "B//2"]]:
    """Return the values of the chosen completions, and of the rejected ones.

    Raises:
        ValueError: an odd number of sequences.
    """
    if values.shape[0] % 2:
        raise ValueError(
            f"{values.shape[0]} sequences are not pairs: each chosen one needs its"
            " rejected one right after it."
        )
    return values[0::2], values[1::2]


def margins(values: Float[Array, "B"]) -> Float[Array, "B//2"]:
    """Return chosen minus rejected of each pair.

    Raises:
        ValueError: an odd number of sequences.
    """
    chosen, rejected = sides(values)
    return chosen - rejected


def best_and_worst(
    scores: Float[Array, "B"], counts: Bool[Array, "B"], *, group_size: int
) -> tuple[Bool[Array, "B"], Bool[Array, "B"]]:
    """Return which completion of each group is its pair's chosen, which its rejected.

    The first of the highest scores, and the first of the lowest; where these are equal,
    there is no pair.

    Args:
        scores: one per completion; those of a prompt follow each other.
        counts: False for rows that only pad the batch.
        group_size: completions of a prompt.

    Raises:
        ValueError: the scores do not split into groups.
    """
    if scores.shape[0] % group_size:
        raise ValueError(
            f"{scores.shape[0]} scores do not split into groups of {group_size}. Each"
            " prompt needs `group_size` completions in a row."
        )
    counts = counts.reshape(-1, group_size)
    highest = jnp.where(counts, scores.reshape(counts.shape), -jnp.inf)
    lowest = jnp.where(counts, scores.reshape(counts.shape), jnp.inf)
    is_pair = highest.max(axis=1, keepdims=True) > lowest.min(axis=1, keepdims=True)
    place = jnp.arange(group_size)[None, :]
    is_chosen = is_pair & (place == jnp.argmax(highest, axis=1)[:, None])
    is_rejected = is_pair & (place == jnp.argmin(lowest, axis=1)[:, None])
    return is_chosen.reshape(-1), is_rejected.reshape(-1)


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


def prospect(
    gained: Float[Array, "B"],
    is_desirable: Bool[Array, "B"],
    *,
    kl: Float[Array, "B"],
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "B"]:
    """Return KTO's loss of completions, each labelled by itself.

        λ_D (1 - σ(β (r - z)))    desirable        r = log π(y) / π_ref(y)
        λ_U (1 - σ(β (z - r)))    undesirable      z = max(0, KL(π ‖ π_ref))

    Source: Ethayarajh et al. 2024 (KTO), https://arxiv.org/abs/2402.01306, equation 8,
    whose λ_y - v is this.

    Args:
        gained: r, in nats.
        is_desirable: the label.
        kl: the KL divergence that z is made of; no gradient goes into it.
        beta: β, in 1 / nat.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.
    """
    ahead = beta * (gained - jax.lax.stop_gradient(jnp.maximum(kl, 0.0)))
    # 1 - σ(x) = σ(-x), also where σ(x) is 1 in float32.
    return jnp.where(
        is_desirable,
        desirable_weight * jax.nn.sigmoid(-ahead),
        undesirable_weight * jax.nn.sigmoid(ahead),
    )
