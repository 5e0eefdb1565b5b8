"""Tests of `sft.py` and `reward_model.py`: losses and gradients against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from realjax.algorithms import reward_model, sft
from tests.algorithms.oracles import (
    as_arrays,
    check,
    log_sigmoid,
    logprobs_like,
    ragged,
)


def test_the_loss_of_sft_is_the_mean_over_all_answer_tokens():
    mask = ragged(4, num_padding=1)
    batch = {"completion_mask": mask, "entropy": np.zeros(mask.shape)}
    oracle = lambda logprobs, batch: -logprobs[mask].mean()
    check(sft.loss, oracle, logprobs_like(mask), batch)


def test_sft_reports_the_perplexity_of_each_answer():
    mask = ragged(3, num_padding=1)
    logprobs = logprobs_like(mask)
    batch = as_arrays({"completion_mask": mask, "entropy": np.zeros(mask.shape)})
    _, metrics = sft.loss(jnp.asarray(logprobs, jnp.float32), batch)
    each = [np.exp(-logprobs[row][mask[row]].mean()) for row in range(3)]
    np.testing.assert_allclose(metrics["ppl"].value(), np.mean(each), rtol=1e-5)


def test_the_loss_of_a_reward_model_is_the_logistic_one_of_pairs():
    scores = np.random.default_rng(0).normal(size=8)
    weights = np.array([0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 0.0, 0.0])
    graph = reward_model.graph(reward_model.RewardModel())
    (node,) = graph.calls.values()
    batch = {key: weights for key in node.function.reads if "weight" in key}
    (key,) = batch  # Pairs of one prompt share its weight; padding has none.
    arrays = {key: jnp.asarray(weights, jnp.float32)}
    value = lambda x: node.function.loss(x, arrays)[0].value()
    found, gradient = jax.value_and_grad(value)(jnp.asarray(scores, jnp.float32))
    margins, own = scores[::2] - scores[1::2], weights[::2]
    expected = -(own * log_sigmoid(margins)).sum() / own.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    slope = -own / (1 + np.exp(margins)) / own.sum()
    both = np.stack([slope, -slope], axis=1).reshape(-1)
    np.testing.assert_allclose(gradient, both, rtol=1e-4, atol=1e-7)
