"""Advantage estimation: how much better a token was than expected."""

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, Bool, Float
from realjax.rl.masking import EPSILON


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    bootstrap_values: Float[Array, "B"],
    discount: float = 1.0,
    lambda_: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return generalized advantage estimates and value targets.

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γλ A_{t+1}

    over the completion tokens of each sequence. After the last one, V is
    `bootstrap_values` and A is 0. The recurrence runs in log2(T) parallel steps.

    Source: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equation 16.

    Args:
        rewards: one per token, KL penalty included.
        values: of the state before each token is chosen.
        mask: completion tokens, contiguous in each sequence.
        bootstrap_values: of the state after the last completion token: 0 where the
            completion ended, the critic's value where it was cut.
        discount: γ; 1 does not discount.
        lambda_: λ; 0 is one-step TD, 1 is the return minus the value.

    Returns:
        Advantages A_t, not whitened, and value targets A_t + V_t; 0 outside `mask`.
    """
    is_last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    next_values = jnp.where(is_last, bootstrap_values[:, None], next_values)
    deltas = jnp.where(mask, rewards + discount * next_values - values, 0.0)
    decays = jnp.where(mask, discount * lambda_, 0.0)

    def follow(later, earlier):
        # A_t = δ_t + decay_t A_{t+1} is an affine map; maps compose associatively.
        later_decay, later_delta = later
        decay, delta = earlier
        return decay * later_decay, delta + decay * later_delta

    _, advantages = jax.lax.associative_scan(
        follow, (decays, deltas), reverse=True, axis=1
    )
    return advantages, jnp.where(mask, advantages + values, 0.0)


def to_come(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Return at each token of the mask the sum of x over it and those after it.

    Args:
        x: of every token.
        mask: completion tokens; elsewhere the sum is 0.
    """
    x = jnp.flip(jnp.where(mask, x, 0.0), axis=1)
    return jnp.where(mask, jnp.flip(jnp.cumsum(x, axis=1), axis=1), 0.0)


def group_relative(
    scores: Float[Array, "B"],
    counts: Bool[Array, "B"],
    *,
    group_size: int,
    is_scaled: bool = True,
) -> Float[Array, "B"]:
    """Return each score minus its group's mean, by default in units of its deviation.

        A_i = (r_i - mean(r)) / (std(r) + 1e-5)

    A group of one keeps its score, which nothing is known to compare with.

    Sources: Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300, section 4.1.2;
    not scaled, Liu et al. 2025 (Dr. GRPO), https://arxiv.org/abs/2503.20783.

    Args:
        scores: one per completion; those of a prompt follow each other.
        counts: False for rows that only pad the batch.
        group_size: completions of a prompt.
        is_scaled: whether the deviation (biased, over those that count) divides.
    """
    if group_size == 1:
        return jnp.where(counts, scores, 0.0)
    scores, counts = _groups(scores, counts, group_size)
    centred = _centred(scores, counts)
    if is_scaled:
        number = jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
        variance = jnp.square(centred).sum(axis=1, keepdims=True) / number
        centred = centred / (jnp.sqrt(variance) + EPSILON)
    return centred.reshape(-1)


def leave_one_out(
    scores: Float[Array, "B"], counts: Bool[Array, "B"], *, group_size: int
) -> Float[Array, "B"]:
    """Return each score minus the mean of the others of its group.

        A_i = r_i - mean of r_j, j ≠ i    =    n / (n - 1) (r_i - mean(r))

    Source: Kool et al. 2019; Ahmadian et al. 2024 (RLOO),
    https://arxiv.org/abs/2402.14740, equation 8.

    Args:
        scores: one per completion; those of a prompt follow each other.
        counts: False for rows that only pad the batch.
        group_size: n, completions of a prompt, at least 2.

    Raises:
        ValueError: a group of one, which leaves no others.
    """
    if group_size < 2:
        raise ValueError(
            f"group_size is {group_size}; leaving one out needs at least 2 completions"
            " of each prompt. Set completions_per_prompt."
        )
    scores, counts = _groups(scores, counts, group_size)
    number = counts.sum(axis=1, keepdims=True)
    centred = _centred(scores, counts) * number / jnp.maximum(number - 1, 1)
    return centred.reshape(-1)


def differing_groups(
    scores: Float[Array, "B"],
    counts: Bool[Array, "B"],
    *,
    group_size: int,
    num_groups: int | None = None,
) -> Bool[Array, "B"]:
    """Tell which completions are of the first groups whose scores differ.

    A group of one is taken for one that does: there is nothing to compare it with.

    Source: Yu et al. 2025 (DAPO, dynamic sampling), https://arxiv.org/abs/2503.14476,
    equation 11: groups that are all right or all wrong teach nothing.

    Args:
        scores: one per completion, as they were given: what shapes them would differ.
        counts: False for rows that only pad the batch.
        group_size: completions of a prompt.
        num_groups: the most groups that are taken; None takes all.
    """
    scores, counts = _groups(scores, counts, group_size)
    differs = (counts & (_centred(scores, counts) != 0)).any(axis=1)
    if group_size == 1:
        differs = counts[:, 0]
    most = len(differs) if num_groups is None else num_groups
    is_taken = differs & (jnp.cumsum(differs) <= most)
    return (counts & is_taken[:, None]).reshape(-1)


def best_of_group(
    scores: Float[Array, "B"],
    counts: Bool[Array, "B"],
    *,
    group_size: int,
    num_best: int = 1,
) -> Bool[Array, "B"]:
    """Tell which completions have the best scores of their group, exactly so many.

    Of equal ones the first are taken.

    Args:
        scores: one per completion; those of a prompt follow each other.
        counts: False for rows that only pad the batch: never among the best.
        group_size: completions of a prompt.
        num_best: of them.
    """
    scores, counts = _groups(scores, counts, group_size)
    order = jnp.argsort(jnp.where(counts, -scores, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    return (counts & (rank < num_best)).reshape(-1)


def _groups(
    scores: Float[Array, "B"], counts: Bool[Array, "B"], group_size: int
) -> tuple[Float[Array, "P G"], Bool[Array, "P G"]]:
    if scores.shape[0] % group_size:
        raise ValueError(
            f"{scores.shape[0]} scores do not split into groups of {group_size}. Each"
            " prompt needs `group_size` completions in a row."
        )
    shape = (-1, group_size)
    return scores.reshape(shape), counts.reshape(shape)


def _centred(
    scores: Float[Array, "P G"], counts: Bool[Array, "P G"]
) -> Float[Array, "P G"]:
    """Return scores minus their group's mean: exactly 0 where all are equal."""
    # The rounded mean of equal numbers need not be that number.
    origin = jnp.min(scores, axis=1, keepdims=True, initial=jnp.inf, where=counts)
    distance = jnp.where(counts, scores - origin, 0.0)
    number = jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
    mean = distance.sum(axis=1, keepdims=True) / number
    return jnp.where(counts, distance - mean, 0.0)
