"""Tests of `realjax/algorithms/dpo.py`: its loss against NumPy, and what must hold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import dpo, orpo
from tests.algorithms.oracles import (
    as_arrays,
    check,
    log_sigmoid,
    logprobs_like,
    ragged,
)

# Three pairs of one prompt's two and another's one, and a pair of padding.
WEIGHTS = np.array([0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 0.0, 0.0])


def pairs():
    mask = ragged(6, num_padding=2)
    batch = {
        "completion_mask": mask,
        "pair_weights": WEIGHTS,
        "ref_logprobs": logprobs_like(mask, seed=1),
    }
    return logprobs_like(mask, seed=2), batch


def oracle(logprobs, batch, *, hp):
    total = 0.0
    for pair in range(3):
        gained = []
        for row in (2 * pair, 2 * pair + 1):
            mask = batch["completion_mask"][row]
            value = logprobs[row][mask].sum()
            if hp.has_reference:
                value -= batch["ref_logprobs"][row][mask].sum()
            gained.append(value / mask.sum() if hp.is_per_token else value)
        h = gained[0] - gained[1]
        right = -log_sigmoid(hp.beta * h - hp.target_margin)
        wrong = -log_sigmoid(hp.target_margin - hp.beta * h)
        e = hp.label_smoothing
        loss = {
            "sigmoid": (1 - e) * right + e * wrong,
            "robust": ((1 - e) * right - e * wrong) / (1 - 2 * e),
            "hinge": max(0.0, 1 - hp.beta * h + hp.target_margin),
            "ipo": (h - 1 / (2 * hp.beta)) ** 2,
        }[hp.kind]
        total += WEIGHTS[2 * pair] * loss
    return total / WEIGHTS[::2].sum()


@pytest.mark.parametrize(
    "hp",
    [
        dpo.DPO(beta=0.3),
        dpo.DPO(beta=0.3, label_smoothing=0.2),
        dpo.DPO(beta=0.3, kind="robust", label_smoothing=0.2),
        dpo.DPO(beta=0.3, kind="hinge"),
        dpo.DPO(beta=0.3, kind="ipo"),
        dpo.DPO(beta=0.3, is_per_token=True),
        dpo.DPO(beta=2.0, has_reference=False, is_per_token=True, target_margin=0.5),
    ],
    ids=["sigmoid", "smoothed", "robust", "hinge", "ipo", "per_token", "simpo"],
)
def test_loss_and_gradient_are_those_of_the_formula(hp):
    bound = functools.partial(dpo.loss, hp=hp)
    check(bound, functools.partial(oracle, hp=hp), *pairs())


def test_gradient_at_the_reference_is_the_likelihood_difference_times_half_of_beta():
    # σ(0) = 1/2: -β/2 for every token of the chosen one, β/2 for the rejected one's.
    _, batch = pairs()
    hp = dpo.DPO(beta=0.3)
    arrays = as_arrays(batch)
    loss = lambda x: dpo.loss(x, arrays, hp=hp)[0].value()
    gradient = np.asarray(jax.grad(loss)(arrays["ref_logprobs"]))
    sign = np.where(np.arange(8) % 2 == 0, -1.0, 1.0)
    share = WEIGHTS / WEIGHTS[::2].sum()
    expected = sign * share * 0.3 / 2
    expected = expected[:, None] * batch["completion_mask"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


def test_a_label_that_is_smoothed_by_half_would_say_nothing():
    with pytest.raises(ValueError, match=r"label_smoothing is 0.5"):
        dpo.DPO(label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"beta is 0"):
        dpo.DPO(beta=0.0)


def test_the_loss_is_the_same_from_microbatches():
    logprobs, batch = pairs()
    arrays, hp = as_arrays(batch), dpo.DPO()
    logprobs = jnp.asarray(logprobs, jnp.float32)
    whole, metrics = dpo.loss(logprobs, arrays, hp=hp)
    cut = lambda rows: dpo.loss(
        logprobs[rows], {k: v[rows] for k, v in arrays.items()}, hp=hp
    )
    (first, one), (second, two) = cut(slice(0, 2)), cut(slice(2, 8))
    np.testing.assert_allclose(first.combine(second).value(), whole.value(), rtol=1e-6)
    for name, mean in metrics.items():
        together = one[name].combine(two[name]).value()
        np.testing.assert_allclose(together, mean.value(), rtol=1e-5)


def test_without_a_reference_there_is_no_call_of_one():
    assert set(dpo.graph(dpo.DPO()).roles) == {"policy", "reference"}
    alone = dpo.graph(dpo.DPO(has_reference=False))
    assert set(alone.roles) == {"policy"}


def orpo_oracle(logprobs, batch, *, weight):
    total = 0.0
    for pair in range(3):
        odds, nll = [], 0.0
        for row in (2 * pair, 2 * pair + 1):
            mask = batch["completion_mask"][row]
            p = np.exp(logprobs[row][mask].mean())
            odds.append(p / (1 - p))
            nll = nll or -np.log(p)
        loss = nll - weight * log_sigmoid(np.log(odds[0] / odds[1]))
        total += WEIGHTS[2 * pair] * loss
    return total / WEIGHTS[::2].sum()


def test_orpo_is_its_formula():
    hp = orpo.ORPO(odds_weight=0.5)
    bound = functools.partial(orpo.loss, hp=hp)
    check(bound, functools.partial(orpo_oracle, weight=0.5), *pairs())


def test_orpo_without_odds_is_supervised_fine_tuning_on_the_chosen_ones():
    logprobs, batch = pairs()
    hp = dataclasses.replace(orpo.ORPO(), odds_weight=0.0)
    found, _ = orpo.loss(jnp.asarray(logprobs, jnp.float32), as_arrays(batch), hp=hp)
    means = [logprobs[r][batch["completion_mask"][r]].mean() for r in (0, 2, 4)]
    expected = -np.average(means, weights=WEIGHTS[[0, 2, 4]])
    np.testing.assert_allclose(found.value(), expected, rtol=1e-5)


def test_orpo_is_finite_where_an_answer_is_all_but_certain():
    _, batch = pairs()
    certain = jnp.zeros(batch["completion_mask"].shape)
    arrays, hp = as_arrays(batch), orpo.ORPO()
    loss = lambda x: orpo.loss(x, arrays, hp=hp)[0].value()
    assert np.isfinite(jax.value_and_grad(loss)(certain)[1]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "ipo", "target_margin": 1.0},
        {"kind": "ipo", "label_smoothing": 0.1},
        {"kind": "hinge", "label_smoothing": 0.1},
    ],
)
def test_what_a_kind_of_loss_has_not_is_refused(changes):
    with pytest.raises(
        ValueError, match=f"the loss of kind '{changes['kind']}' has none"
    ):
        dpo.DPO(**changes)
