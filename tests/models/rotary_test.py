"""Rotary embeddings: angles, the relative position, context extensions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from realjax.models import rotary
from realjax.models.config import ModelConfig, RopeScaling

CONFIG = ModelConfig(
    vocab_size=2,
    width=2,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=1,
    rope_theta=10000.0,
)


def scaled(**scaling):
    return dataclasses.replace(CONFIG, rope_scaling=RopeScaling(**scaling))


def frequencies(config):
    return rotary.frequencies(config.rope_theta, config.head_dim, config.rope_scaling)


def rotate_at(x, position):
    """Rotate [K] at a position."""
    place = jnp.full((1, 1), position, jnp.int32)
    turned = rotary.rotation(CONFIG, place, place + 1)
    return rotary.rotate(x[None, None, None], turned)[0, 0, 0]


def test_frequencies_fall_by_theta_over_the_pairs():
    # 10000^(-2k/8) for k = 0..3.
    expected = [1, 0.1, 0.01, 0.001]
    np.testing.assert_allclose(frequencies(CONFIG), expected, rtol=1e-12)


def test_coordinate_k_turns_with_coordinate_k_plus_half():
    # At position 3, pair 1 (coordinates 1 and 5) turns by 3 x 0.1.
    rotated = rotate_at(jnp.zeros(8).at[1].set(1.0), 3)
    expected = np.zeros(8)
    expected[1], expected[5] = np.cos(0.3), np.sin(0.3)
    np.testing.assert_allclose(rotated, expected, atol=1e-6)


def test_position_zero_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (8,))
    np.testing.assert_array_equal(rotate_at(x, 0), x)


def test_products_depend_on_the_distance_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 8))
    near = jnp.vdot(rotate_at(query, 7), rotate_at(key, 2))
    far = jnp.vdot(rotate_at(query, 107), rotate_at(key, 102))
    np.testing.assert_allclose(near, far, atol=1e-4)


def test_linear_scaling_divides_positions():
    stretched = frequencies(scaled(kind="linear", factor=4.0))
    np.testing.assert_allclose(4 * stretched, frequencies(CONFIG))


def test_llama3_scaling_keeps_fast_frequencies_and_divides_slow_ones():
    # 1000 tokens make 1000/2π x (1, .1, .01, .001) = 159, 15.9, 1.59, 0.159 turns: more
    # than 4, more than 4, between 1 and 4, less than 1.
    config = scaled(kind="llama3", factor=8.0, original_max_positions=1000)
    kept = (1000 * 0.01 / (2 * np.pi) - 1) / 3
    blend = kept * 0.01 + (1 - kept) * 0.01 / 8
    expected = [1, 0.1, blend, 0.001 / 8]
    np.testing.assert_allclose(frequencies(config), expected, rtol=1e-12)


def test_angles_are_float32_whatever_the_dtype_of_x():
    # In bfloat16 position 1001 would be 1000.
    places = jnp.asarray([[1000, 1001]], jnp.int32)
    turned = rotary.rotation(CONFIG, places, places + 1)
    assert turned.cos.dtype == jnp.float32
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    rotated = rotary.rotate(x, turned)
    assert rotated.dtype == jnp.bfloat16
    assert not np.array_equal(rotated[0, 0], rotated[0, 1])
