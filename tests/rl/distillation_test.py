"""Tests of `realjax/rl/distillation.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.rl.distillation import forward_kl

V = 7


def distributions(seed=0, shape=(4, 5)):
    """Log-probabilities of a student and a teacher over all tokens, in float64."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(2, *shape, V))
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def likeliest(teacher, num_top):
    return np.argsort(-teacher, axis=-1)[..., :num_top]


def taken(logprobs, ids):
    return np.take_along_axis(logprobs, ids, axis=-1)


def test_of_all_tokens_both_forms_are_the_divergence():
    student, teacher = distributions()
    expected = np.sum(np.exp(teacher) * (teacher - student), axis=-1)
    for rest in ("bucket", "left_out"):
        found = forward_kl(jnp.float32(student), jnp.float32(teacher), rest=rest)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_top", [1, 3, 6])
def test_the_rest_is_a_token_of_its_own_or_left_out(num_top):
    student, teacher = distributions(1)
    ids = likeliest(teacher, num_top)
    top = taken(student, ids), taken(teacher, ids)
    q, p = np.exp(top[0]), np.exp(top[1])
    rest_q, rest_p = 1 - q.sum(axis=-1), 1 - p.sum(axis=-1)
    bucket = (p * np.log(p / q)).sum(axis=-1) + rest_p * np.log(rest_p / rest_q)
    found = forward_kl(*map(jnp.float32, top))
    np.testing.assert_allclose(found, bucket, rtol=1e-4, atol=1e-5)
    p, q = (x / x.sum(axis=-1, keepdims=True) for x in (p, q))
    left_out = (p * np.log(p / q)).sum(axis=-1)
    found = forward_kl(*map(jnp.float32, top), rest="left_out")
    np.testing.assert_allclose(found, left_out, rtol=1e-4, atol=1e-5)


def test_of_fewer_tokens_the_bucket_says_less():
    student, teacher = distributions(2)
    found = [
        forward_kl(
            jnp.float32(taken(student, likeliest(teacher, k))),
            jnp.float32(taken(teacher, likeliest(teacher, k))),
        )
        for k in range(1, V + 1)
    ]
    assert (np.diff(found, axis=0) >= -1e-5).all()


def test_the_gradient_to_logits_is_the_difference_of_distributions():
    # d KL(p ‖ softmax z) / d z = softmax z - p, over all tokens.
    student, teacher = distributions(3, shape=())
    loss = lambda z: forward_kl(jax.nn.log_softmax(z), jnp.float32(teacher))
    found = jax.grad(loss)(jnp.float32(student))
    np.testing.assert_allclose(found, np.exp(student) - np.exp(teacher), atol=2e-5)


def test_equal_distributions_are_no_way_apart_and_certain_ones_finite():
    certain = jnp.log(jnp.array([1.0, 1e-30, 1e-30]))
    other = jnp.log(jnp.array([1e-30, 1.0, 1e-30]))
    for rest in ("bucket", "left_out"):
        value, gradient = jax.value_and_grad(forward_kl)(other, certain, rest=rest)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(
            forward_kl(certain, certain, rest=rest), 0, atol=1e-6
        )


def test_a_token_that_the_student_lacks_belongs_to_the_rest():
    teacher = jnp.log(jnp.array([0.5, 0.3, 0.1]))
    student = jnp.array([jnp.log(0.4), -jnp.inf, jnp.log(0.2)])
    p, q = np.array([0.5, 0.1, 0.4]), np.array([0.4, 0.2, 0.4])
    expected = (p * np.log(p / q)).sum()
    value, gradient = jax.value_and_grad(forward_kl)(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.isfinite(gradient).all()
