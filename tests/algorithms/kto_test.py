"""Tests of `realjax/algorithms/kto.py`: its loss against NumPy, and what must hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import kto
from tests.algorithms.oracles import as_arrays, check, logprobs_like, ragged

IS_DESIRABLE = np.array([True, False, True, True, False, False, True, False])
HP = kto.KTO(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)


def labels(kl=0.4):
    """Six completions and two rows of padding."""
    mask = ragged(6, num_padding=2)
    batch = {
        "completion_mask": mask,
        "is_desirable": IS_DESIRABLE,
        "ref_logprobs": logprobs_like(mask, seed=1),
        "kl": np.full(len(mask), kl),
    }
    return logprobs_like(mask, seed=2), batch


def oracle(logprobs, batch, *, hp=HP):
    """λ_y - v(x, y) by loops (equation 8)."""
    z, losses = max(batch["kl"][0], 0.0), []
    for row in range(6):
        mask = batch["completion_mask"][row]
        r = (logprobs[row] - batch["ref_logprobs"][row])[mask].sum()
        sign = 1.0 if batch["is_desirable"][row] else -1.0
        weight = hp.desirable_weight if sign > 0 else hp.undesirable_weight
        value = weight / (1.0 + np.exp(-sign * hp.beta * (r - z)))
        losses.append(weight - value)
    return np.mean(losses)


@pytest.mark.parametrize("kl", [0.4, 0.0, -0.7])
def test_loss_and_gradient_are_those_of_the_formula(kl):
    bound = functools.partial(kto.loss, hp=HP)
    check(bound, oracle, *labels(kl))


def test_no_gradient_goes_into_the_divergence():
    logprobs, batch = labels()
    arrays = as_arrays(batch)
    loss = lambda kl: kto.loss(jnp.asarray(logprobs), arrays | {"kl": kl}, hp=HP)[0]
    gradient = jax.grad(lambda kl: loss(kl).value())(arrays["kl"])
    np.testing.assert_array_equal(gradient, 0.0)


def test_at_the_reference_the_gradient_is_a_quarter_of_beta_up_or_down():
    # σ'(0) = 1/4: a desirable completion is made likelier, another less so.
    _, batch = labels(kl=0.0)
    arrays, hp = as_arrays(batch), kto.KTO(beta=0.2)
    loss = lambda x: kto.loss(x, arrays, hp=hp)[0].value()
    gradient = jax.grad(loss)(arrays["ref_logprobs"])
    sign = np.where(IS_DESIRABLE, -1.0, 1.0)[:, None]
    expected = sign * 0.2 / 4 / 6 * batch["completion_mask"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_right_is_which_side_of_the_clipped_divergence_a_gain_is_on():
    # Gains of 0.1 a token, at least one token: above 0, and above a KL that is below.
    _, batch = labels(kl=-0.7)
    arrays = as_arrays(batch)
    for shift, is_ahead in ((0.1, True), (-0.1, False)):
        _, metrics = kto.loss(arrays["ref_logprobs"] + shift, arrays, hp=HP)
        expected = np.mean(IS_DESIRABLE == is_ahead)
        np.testing.assert_allclose(metrics["accuracy"].value(), expected, rtol=1e-6)


def mismatched():
    """Two prompts of 2 and 3 tokens with others' completions, and padding."""
    place = np.arange(8)[None, :]
    starts, ends = np.array([[2], [3], [0]]), np.array([[5], [7], [0]])
    logprobs = np.arange(24.0).reshape(3, 8) / 10
    return {
        "completion_mask": (place >= starts) & (place < ends),
        "mismatched_lengths": np.array([4, 8, 0]),
        "mismatched_logprobs": -logprobs,
        "mismatched_ref_logprobs": -1.5 * logprobs,
    }


def test_the_divergence_is_a_mean_over_whole_mismatched_completions():
    # The gain is half of each: tokens 2 and 3 of the first, 0.25; tokens 3 to 7 of the
    # second, (1.1 + 1.2 + 1.3 + 1.4 + 1.5) / 2 = 3.25. Prompts do not count.
    outputs, metrics = kto.divergence(as_arrays(mismatched()))
    np.testing.assert_allclose(outputs["kl"], 1.75, rtol=1e-6)
    np.testing.assert_allclose(metrics["objective/kl"].value(), 1.75, rtol=1e-6)


def test_a_stored_reference_has_no_call():
    with_calls, without = kto.graph(kto.KTO()), kto.KTO(stores_reference=True)
    assert set(with_calls.roles) == {"policy", "reference"}
    assert kto.stored_graph(kto.KTO()) is None
    graph, stored = kto.graph(without), kto.stored_graph(without)
    assert set(graph.roles) == {"policy"}
    assert stored is not None
    assert set(stored.roles) == {"reference"}
    assert {"ref_logprobs", "mismatched_ref_logprobs"} <= set(graph.inputs)


def test_numbers_that_make_no_loss_are_refused():
    with pytest.raises(ValueError, match="beta is 0"):
        kto.KTO(beta=0.0)
    with pytest.raises(ValueError, match="undesirable_weight is -1"):
        kto.KTO(undesirable_weight=-1.0)
