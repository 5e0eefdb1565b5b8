"""Heads: tied and untied vocabulary scores, scalars."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models import heads
from realjax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=5,
    width=2,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    mlp_width=1,
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
SCALAR = dataclasses.replace(CONFIG, head="scalar", tie_embeddings=True)
HIDDEN = jnp.asarray([[[1.0, 10.0]]])
MATRIX = jnp.arange(10.0).reshape(2, 5)


def test_a_tied_head_is_the_embedding():
    untied = heads.logits({"head": {"kernel": MATRIX}}, CONFIG, HIDDEN)
    tied = heads.logits({"embedding": MATRIX.T}, TIED, HIDDEN)
    # 1 x (0..4) + 10 x (5..9).
    np.testing.assert_array_equal(untied, [[[50, 61, 72, 83, 94]]])
    np.testing.assert_array_equal(tied, untied)


def test_the_kernel_scores_as_logits_do():
    for config, parameters in (
        (CONFIG, {"head": {"kernel": MATRIX}}),
        (TIED, {"embedding": MATRIX.T}),
    ):
        kernel = heads.language_kernel(parameters, config)
        scores = jnp.tensordot(HIDDEN, kernel, axes=1)
        np.testing.assert_array_equal(scores, heads.logits(parameters, config, HIDDEN))


def test_logits_of_bfloat16_hidden_states_are_float32_sums():
    # 256 + 1 is not a bfloat16; the sum of products is not rounded to one.
    hidden = jnp.asarray([256.0, 1.0], jnp.bfloat16)
    ones = {"head": {"kernel": jnp.ones((2, 5))}}
    logits = heads.logits(ones, CONFIG, hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, jnp.full(5, 257.0))


def test_scalars_are_one_number_per_token():
    hidden = jax.random.normal(jax.random.key(0), (3, 4, 2))
    parameters = {"score": {"kernel": jnp.asarray([[2.0], [-1.0]])}}
    expected = 2 * hidden[..., 0] - hidden[..., 1]
    np.testing.assert_allclose(heads.scalars(parameters, hidden), expected, rtol=1e-5)


def test_a_model_without_the_head_asked_for_is_refused():
    with pytest.raises(ValueError, match="scalar head and cannot score the vocabulary"):
        heads.logits({"embedding": MATRIX.T}, SCALAR, HIDDEN)
    with pytest.raises(ValueError, match="has no scalar head"):
        heads.scalars({"head": {"kernel": MATRIX}}, HIDDEN)
