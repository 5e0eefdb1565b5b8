"""Routers: who goes where, who is dropped, and what is measured of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models.config import MoEConfig
from realjax.models.moe import _jittered, route, router_sums

# Logits of three experts with probabilities 1/8, 2/8 and 5/8.
EIGHTHS = np.log([1.0, 2.0, 5.0])

ROUTE = jax.jit(route, static_argnums=2)
SUMS = jax.jit(router_sums, static_argnums=2)
JITTERED = jax.jit(_jittered, static_argnums=2)


def routed(logits, segment_ids=None, **options):
    """The routing of tokens with given logits [B, T, E]: the router is the identity."""
    logits = jnp.asarray(logits, jnp.float32)
    num_experts = logits.shape[-1]
    moe = MoEConfig(num_experts=num_experts, **{"top_k": 1, **options})
    if segment_ids is None:
        segment_ids = np.ones(logits.shape[:2])
    identity = jnp.asarray(np.eye(num_experts), jnp.float32)
    return ROUTE(logits, identity, moe, jnp.asarray(segment_ids, jnp.int32)), moe


def experts_of(routing):
    """The expert of each token of one row, where there is but one."""
    return np.asarray(routing.choice.experts)[0, :, 0]


def logits_of(probabilities):
    """Logits [1, T, 2] of tokens that go to expert 0 with these probabilities."""
    first = np.asarray(probabilities)
    return np.log(np.stack([first, 1 - first], axis=-1))[None]


# -- the choice --------------------------------------------------------------------


def test_the_best_experts_have_their_probabilities_of_all_experts():
    routing, _ = routed([[EIGHTHS]], top_k=2, is_normalized=False)
    np.testing.assert_array_equal(routing.choice.experts, [[[2, 1]]])
    np.testing.assert_allclose(routing.choice.weights, [[[5 / 8, 2 / 8]]], rtol=1e-6)
    np.testing.assert_allclose(routing.probabilities, [[[1 / 8, 2 / 8, 5 / 8]]], 1e-6)


def test_normalized_weights_are_a_softmax_over_the_chosen_experts():
    routing, _ = routed([[EIGHTHS]], top_k=2)
    np.testing.assert_allclose(routing.choice.weights, [[[5 / 7, 2 / 7]]], rtol=1e-6)
    alone, _ = routed([[EIGHTHS]], top_k=1)
    np.testing.assert_array_equal(alone.choice.weights, [[[1.0]]])


def test_of_equal_experts_the_first_is_chosen():
    routing, _ = routed([[[1.0, 3.0, 3.0, 3.0]]], top_k=2)
    np.testing.assert_array_equal(routing.chosen, [[[1, 2]]])
    np.testing.assert_array_equal(routing.choice.weights, [[[0.5, 0.5]]])


def test_padding_goes_to_no_expert():
    routing, _ = routed([[EIGHTHS, EIGHTHS]], segment_ids=[[1, 0]], top_k=2)
    np.testing.assert_array_equal(routing.choice.experts, [[[2, 1], [3, 3]]])
    np.testing.assert_array_equal(np.asarray(routing.choice.weights)[0, 1], [0, 0])


def test_routing_is_float32_where_tokens_are_bfloat16():
    x = jnp.asarray(np.ones((1, 1, 4)), jnp.bfloat16)
    router = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    moe = MoEConfig(num_experts=3, top_k=2)
    routing = ROUTE(x, router, moe, jnp.asarray([[1]]))
    for leaf in (routing.probabilities, routing.choice.weights, routing.log_normalizer):
        assert leaf.dtype == jnp.float32
    assert np.asarray(routing.probabilities).sum() == pytest.approx(1, abs=1e-6)


# -- capacity ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "factor", "kept"),
    [
        # Expert 0 has room for ceil(factor 4 / 2): one, or two.
        ("probs", 0.5, [False, True, False, False]),
        ("position", 0.5, [True, False, False, False]),
        ("probs", 1.0, [False, True, False, True]),
        ("position", 1.0, [True, True, False, False]),
        ("position", 1.01, [True, True, True, False]),
        ("probs", 2.0, [True, True, True, True]),
        ("position", 0.0, [True, True, True, True]),  # No limit.
    ],
)
def test_a_full_expert_drops_the_least_probable_or_the_last(policy, factor, kept):
    logits = logits_of([0.6, 0.9, 0.7, 0.8])
    routing, moe = routed(
        logits, capacity_factor=factor, drop_policy=policy, is_normalized=False
    )
    np.testing.assert_array_equal(experts_of(routing) == 0, kept)
    weights = np.where(kept, [0.6, 0.9, 0.7, 0.8], 0)
    found = np.asarray(routing.choice.weights)[0, :, 0]
    np.testing.assert_allclose(found, weights, rtol=1e-6)
    # What was chosen before is counted; the drops are counted apart.
    sums = SUMS(routing, jnp.asarray([[1, 1, 1, 1]], jnp.int32), moe)
    np.testing.assert_array_equal(sums.counts, [4, 0])
    assert float(sums.dropped) == 4 - sum(kept)


def test_of_equally_probable_pairs_the_first_keep_their_expert():
    routing, _ = routed(logits_of([0.7] * 4), capacity_factor=1.0)
    np.testing.assert_array_equal(experts_of(routing), [0, 0, 2, 2])


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_padding_takes_no_room_and_makes_none(policy):
    # Two tokens of five places: room for ceil(2 / 2) = 1.
    routing, _ = routed(
        logits_of([0.9, 0.6, 0.8, 0.9, 0.9]),
        [[0, 1, 1, 0, 0]],
        capacity_factor=1.0,
        drop_policy=policy,
    )
    kept = 2 if policy == "probs" else 1
    expected = np.where(np.arange(5) == kept, 0, 2)
    np.testing.assert_array_equal(experts_of(routing), expected)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_sequences_fill_their_experts_alone_wherever_they_lie(policy):
    # Of 4 tokens 2 are kept and of 2 tokens 1: in one row, or in two.
    first, second = [0.6, 0.9, 0.7, 0.8], [0.95, 0.85]
    options = {"capacity_factor": 1.0, "drop_policy": policy}
    packed, _ = routed(logits_of(second + first), [[1, 1, 2, 2, 2, 2]], **options)
    alone, _ = routed(logits_of(first), **options)
    other, _ = routed(logits_of(second), **options)
    found = experts_of(packed)
    np.testing.assert_array_equal(found[2:], experts_of(alone))
    np.testing.assert_array_equal(found[:2], experts_of(other))
    np.testing.assert_array_equal(found == 0, found != 2)
    assert (found == 0).sum() == 3


def test_room_is_not_rounded_up_by_the_error_of_a_product():
    # 25 / 2 × 1.2 = 15, and 15.000001 in float32.
    logits = logits_of([0.7] * 25)
    routing, _ = routed(logits, capacity_factor=1.2, drop_policy="position")
    assert (np.asarray(routing.choice.experts) == 0).sum() == 15


# -- losses ------------------------------------------------------------------------


def sums_of(logits, segment_ids=None, **options):
    if segment_ids is None:
        segment_ids = np.ones(np.shape(logits)[:2], np.int32)
    segment_ids = jnp.asarray(segment_ids, jnp.int32)
    routing, moe = routed(logits, np.asarray(segment_ids) != 0, **options)
    return SUMS(routing, segment_ids, moe)


def test_the_balance_loss_is_the_number_of_choices_at_a_perfect_balance():
    # Each of 4 tokens prefers another two of 4 experts, as probable as can be.
    logits = 3.0 * np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]])
    sums = sums_of(logits[None], top_k=2)
    assert float(sums.aux) == pytest.approx(4 * 2, rel=1e-6)
    np.testing.assert_array_equal(sums.counts, [2, 2, 2, 2])


def test_the_balance_loss_grows_with_the_share_and_probability_of_an_expert():
    # All of 2 tokens choose expert 0, of mean probability (0.9 + 0.6) / 2 = 0.75:
    # 2 experts × 1 × 0.75 = 1.5, which counts for 2 tokens.
    sums = sums_of(logits_of([0.9, 0.6]))
    assert float(sums.aux) == pytest.approx(2 * 1.5, rel=1e-6)
    # One each: 2 × (0.5 × 0.65 + 0.5 × 0.35) = 1.
    sums = sums_of(logits_of([0.9, 0.4]))
    assert float(sums.aux) == pytest.approx(2 * 1.0, rel=1e-6)


def test_sequences_of_a_row_are_balanced_each_for_itself():
    # Two sequences of 2 and 1 tokens, a place of padding between: 2 × 1.5 as above,
    # and 2 × (1 × 0.8) = 1.6 for the one that goes to expert 1.
    logits = logits_of([0.9, 0.6, 0.5, 0.2])
    sums = sums_of(logits, [[1, 1, 0, 2]])
    assert float(sums.aux) == pytest.approx(2 * 1.5 + 1.6, rel=1e-6)
    assert float(sums.tokens) == 3
    np.testing.assert_array_equal(sums.counts, [2, 1])
    # As in rows of their own.
    rows = np.stack([logits[0, [0, 1]], logits[0, [3, 2]]])
    apart = sums_of(rows, [[1, 1], [1, 0]])
    for found, expected in zip(sums, apart, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_z_loss_is_the_squared_log_of_the_normalizer():
    # exp(logits) sum to 8 and, shifted by 1, to 8 e; padding counts nothing.
    sums = sums_of([[EIGHTHS, EIGHTHS + 1, EIGHTHS + 5]], [[1, 1, 0]])
    expected = np.log(8) ** 2 + (np.log(8) + 1) ** 2
    assert float(sums.z) == pytest.approx(expected, rel=1e-6)


def float64_losses(x, router, segments, top_k):
    """Both sums, with nothing of JAX."""
    aux = z = 0.0
    num_experts = router.shape[1]
    for segment in segments:
        logits = x[segment] @ router
        normalizer = np.log(np.exp(logits).sum(axis=1, keepdims=True))
        probabilities = np.exp(logits - normalizer)
        best = np.argsort(-logits, axis=1)[:, :top_k]
        counts = np.bincount(best.ravel(), minlength=num_experts)
        shares = counts / len(segment)
        mean = probabilities.mean(axis=0)
        aux += len(segment) * num_experts * (shares * mean).sum()
        z += np.square(normalizer).sum()
    return np.array([aux, z])


@pytest.mark.parametrize("index", [0, 1])
def test_gradients_of_both_losses_are_their_differences_in_float64(index):
    # Counts have no gradient: the router learns by its probabilities alone.
    generator = np.random.default_rng(0)
    x, router = generator.standard_normal((7, 4)), generator.standard_normal((4, 5))
    segments, ids = (np.arange(4), np.arange(4, 7)), [[1, 1, 1, 1, 2, 2, 2]]
    moe = MoEConfig(num_experts=5, top_k=2)

    @jax.jit
    @jax.grad
    def gradient(router):
        ids_ = jnp.asarray(ids, jnp.int32)
        routing = route(jnp.asarray(x[None], jnp.float32), router, moe, ids_)
        return router_sums(routing, ids_, moe)[index]

    found = gradient(jnp.asarray(router, jnp.float32))
    step, expected = 1e-5, np.zeros_like(router)
    for at in np.ndindex(router.shape):
        change = np.zeros_like(router)
        change[at] = step
        ahead, behind = (
            float64_losses(x, router + sign * change, segments, 2)[index]
            for sign in (1, -1)
        )
        expected[at] = (ahead - behind) / (2 * step)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


# -- jitter ------------------------------------------------------------------------


def noise_keys(seed, shape):
    keys = jax.random.split(jax.random.key(seed), shape)
    return jax.random.key_data(keys)


def test_jitter_multiplies_every_coordinate_by_noise_of_its_width():
    moe = MoEConfig(num_experts=2, top_k=1, jitter=0.1)
    x = jnp.asarray(np.full((2, 3, 500), 2.0), jnp.float32)
    noise = np.asarray(JITTERED(x, noise_keys(0, (2, 3)), moe)) / 2
    assert noise.min() >= 0.9
    assert noise.max() <= 1.1
    # Uniform: a deviation of 0.2 / sqrt(12) around 1, each token by its own.
    assert noise.mean() == pytest.approx(1, abs=0.005)
    assert noise.std() == pytest.approx(0.2 / np.sqrt(12), rel=0.05)
    assert len(np.unique(noise.reshape(6, -1)[:, 0])) == 6


def test_there_is_no_jitter_without_keys_or_width():
    x = jnp.asarray(np.ones((1, 2, 4)), jnp.float32)
    moe = MoEConfig(num_experts=2, top_k=1, jitter=0.1)
    np.testing.assert_array_equal(JITTERED(x, None, moe), x)
    still = MoEConfig(num_experts=2, top_k=1)
    np.testing.assert_array_equal(JITTERED(x, noise_keys(0, (1, 2)), still), x)
