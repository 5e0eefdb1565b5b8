"""Tests of `realjax/rl/sampling.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.sampling.bisection import inverse_cdf
from realjax.rl import sampling
from realjax.rl.sampling import History, Sampling
from tests.rl.exact_sampling import entropies, probabilities

B, V = 64, 331  # Not a multiple of the words and blocks the code works in.
EOS = 7

FILTERS = {
    "none": Sampling(),
    "hot": Sampling(temperature=1.7),
    "top-k": Sampling(temperature=0.7, top_k=20),
    "top-k and top-p": Sampling(temperature=0.7, top_k=20, top_p=0.9),
    "top-p": Sampling(top_p=0.9),
    "small top-p": Sampling(temperature=1.3, top_p=0.05),
    "large top-k": Sampling(top_k=300),
    "large top-k and top-p": Sampling(top_k=300, top_p=0.8),
    "min-p": Sampling(min_p=0.05),
    "min-p of a smaller temperature": Sampling(temperature=0.5, min_p=0.02),
    "top-k and min-p": Sampling(top_k=20, min_p=0.1),
    "top-p and min-p": Sampling(top_p=0.9, min_p=0.1),
    "union": Sampling(top_k=20, top_p=0.6, union=True),
    "large union": Sampling(top_k=300, top_p=0.6, union=True),
    "eos forbidden": Sampling(min_new_tokens=4),
    "eos forbidden, top-k": Sampling(min_new_tokens=4, top_k=5),
    "eos forbidden, top-p": Sampling(min_new_tokens=4, top_p=0.9),
    "bad words": Sampling(bad_words=((EOS,),)),
    "bad words, top-k": Sampling(bad_words=((EOS,),), top_k=5),
    "repetition": Sampling(repetition_penalty=1.8),
    "presence": Sampling(presence_penalty=1.5, temperature=0.8),
    "penalties, top-k": Sampling(
        repetition_penalty=1.2, presence_penalty=-0.5, top_k=20, top_p=0.9
    ),
    "everything": Sampling(
        temperature=0.8,
        top_k=300,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        bad_words=((EOS,),),
        min_new_tokens=4,
    ),
    "greedy": Sampling(greedy=True, top_k=20, top_p=0.5, min_p=0.5),
    "greedy, penalties": Sampling(
        greedy=True, repetition_penalty=1.4, presence_penalty=0.3
    ),
    "greedy, eos forbidden": Sampling(temperature=0, min_new_tokens=4),
}

SLOW = {
    *("hot", "small top-p", "large top-k", "large union", "repetition", "presence"),
    *("min-p of a smaller temperature", "top-p and min-p", "bad words, top-k"),
    *("eos forbidden, top-k", "eos forbidden, top-p", "greedy, eos forbidden"),
}
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in FILTERS
]

sample = jax.jit(sampling.sample, static_argnums=2)


def random_logits(seed: int = 0, num_rows: int = B, vocab_size: int = V):
    return 2.0 * jax.random.normal(jax.random.key(seed), (num_rows, vocab_size))


def random_keys(num_rows: int = B, seed: int = 1):
    return jax.random.split(jax.random.key(seed), num_rows)


def restrictions(config: Sampling) -> dict:
    """Forbid one token in every other row, and make a history, where a config may."""
    found = {}
    if config.min_new_tokens or config.bad_words:
        forbidden = np.zeros((B, V), bool)
        forbidden[::2, EOS] = True
        found["forbidden"] = jnp.asarray(forbidden)
    if config.needs_history:
        in_completion = np.random.default_rng(0).random((B, V)) < 0.2
        in_prompt = np.random.default_rng(1).random((B, V)) < 0.2
        found["history"] = History(
            jnp.asarray(in_prompt | in_completion), jnp.asarray(in_completion)
        )
    return found


def kept_mask(kept, shape=(B, V)):
    if kept is None:
        return np.ones(shape, bool)
    return np.asarray(sampling.is_kept(kept, shape[1]))


def test_form_and_width_of_the_recorded_sets():
    width = lambda vocab_size=331, **fields: sampling.kept_width(
        Sampling(**fields), vocab_size
    )
    assert width() is None
    assert width(temperature=0.5) is None
    assert width(top_k=331) is None  # Keeps all.
    assert width(top_k=20) == ("ids", 20)
    assert width(top_k=256, top_p=0.9, min_new_tokens=3) == ("ids", 256)
    assert width(top_k=257) == ("bits", 11)  # 11 · 32 = 352
    assert width(top_p=0.9) == ("bits", 11)
    assert width(min_new_tokens=1) == ("bits", 11)
    assert width(min_p=0.1) == ("bits", 11)
    assert width(min_p=0.1, top_k=20) == ("ids", 20)
    assert width(bad_words=((1, 2),)) == ("bits", 11)
    assert width(bad_words=((1, 2),), top_k=20) == ("ids", 20)
    assert width(repetition_penalty=1.5, presence_penalty=0.5) is None
    assert width(greedy=True, top_k=20, top_p=0.5, min_p=0.5) is None
    assert width(greedy=True, top_k=20, min_new_tokens=1) == ("bits", 11)
    assert width(greedy=True, bad_words=((1,),)) == ("bits", 11)
    assert width(vocab_size=320, top_p=0.9) == ("bits", 10)


@pytest.mark.parametrize("name", NAMES)
def test_kept_sets_are_those_of_the_sorted_definition(name):
    config, logits = FILTERS[name], random_logits()
    more = restrictions(config)
    kept = sample(logits, random_keys(), config, **more).kept
    form = sampling.kept_width(config, V)
    assert (kept is None) == (form is None)
    if kept is not None:
        expected_type = jnp.int32 if form[0] == "ids" else jnp.uint32
        assert (kept.shape, kept.dtype) == ((B, form[1]), expected_type)
    expected = probabilities(logits, config, **more) > 0
    np.testing.assert_array_equal(kept_mask(kept), expected)


@pytest.mark.parametrize("name", NAMES)
def test_logprob_and_entropy_are_those_of_the_exact_distribution(name):
    config, logits = FILTERS[name], random_logits(2)
    more = restrictions(config)
    draw = sample(logits, random_keys(), config, **more)
    p = probabilities(logits, config, **more)
    exact = np.log(p[np.arange(B), draw.tokens])
    np.testing.assert_allclose(draw.logprobs, exact, atol=1e-5)
    np.testing.assert_allclose(draw.entropy, entropies(p), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_temperature_and_kept_set_give_the_logprob_again_or_a_penalty_is_there(name):
    config, logits = FILTERS[name], random_logits(2)
    draw = sample(logits, random_keys(), config, **restrictions(config))
    scaled = logits / config.temperature
    again = scaled[np.arange(B), draw.tokens] - sampling.normalizer(scaled, draw.kept)
    is_equal = bool(np.max(np.abs(again - draw.logprobs)) <= 1e-5)
    assert config.is_recomputable is is_equal
    assert config.is_recomputable is not config.needs_history


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=() if name in ("top-k and top-p", "everything") else pytest.mark.slow,
        )
        for name in FILTERS
    ],
)
def test_row_alone_is_the_row_among_7_and_among_64(name):
    config, keys = FILTERS[name], random_keys()
    more = restrictions(config)
    draws = []
    for rows in (slice(30, 31), slice(28, 35), slice(0, 64)):
        logits, some_keys, some = jax.tree.map(
            lambda x, rows=rows: x[rows], (random_logits(4), keys, more)
        )
        draw = sample(logits, some_keys, config, **some)
        draws.append(jax.tree.map(lambda x, rows=rows: x[30 - rows.start], draw))
    alone, *others = draws
    for other in others:
        assert alone.tokens == other.tokens
        np.testing.assert_allclose(alone.logprobs, other.logprobs, atol=1e-6)
        np.testing.assert_allclose(alone.entropy, other.entropy, atol=1e-6)
        if alone.kept is not None:
            np.testing.assert_array_equal(alone.kept, other.kept)


def test_rows_in_another_order_give_the_same_draws_in_that_order():
    config, logits, keys = FILTERS["everything"], random_logits(4), random_keys()
    more = restrictions(config)
    order = np.random.default_rng(0).permutation(B)
    whole = sample(logits, keys, config, **more)
    inputs = jax.tree.map(lambda x: x[order], (logits, keys, more))
    shuffled = sample(*inputs[:2], config, **inputs[2])
    for a, b in zip(*map(jax.tree.leaves, (whole, shuffled)), strict=True):
        np.testing.assert_allclose(b, a[order], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("none", P("data")),
        ("top-k and top-p", P("data", "tensor")),
        ("top-p", P("data", "tensor")),
        pytest.param("none", P("data", "tensor"), marks=pytest.mark.slow),
        pytest.param("top-k and top-p", P("data"), marks=pytest.mark.slow),
        pytest.param("top-p", P("data"), marks=pytest.mark.slow),
    ],
)
def test_sharded_logits_give_the_tokens_of_one_device(name, spec):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    config, logits, keys = FILTERS[name], random_logits(5, B, 256), random_keys()
    shard = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    alone = sample(logits, keys, config)
    sharded = sample(shard(logits, spec), shard(keys, P("data")), config)
    for a, b in zip(*map(jax.tree.leaves, (alone, sharded)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Six tokens of probability 1/8 and one of 1/4, the last: 1/4 + 3/8 < 0.7.
        (Sampling(top_p=0.7), [0, 1, 2, 3, 6]),
        (Sampling(top_k=4), [0, 1, 2, 6]),
        (Sampling(top_k=4, top_p=0.7), [0, 1, 6]),  # Of 2/5 and thrice 1/5.
        (Sampling(top_k=5, top_p=0.5, union=True), [0, 1, 6]),
        (Sampling(top_k=3, top_p=0.7, union=True), [0, 1, 6]),
    ],
)
def test_ties_are_kept_by_the_lower_id(config, expected):
    logits = jnp.log(jnp.array([[1.0] * 6 + [2.0]]))
    *_, kept = sample(logits, random_keys(1), config)
    np.testing.assert_array_equal(np.flatnonzero(kept_mask(kept, (1, 7))), expected)


def test_large_top_k_keeps_ties_by_the_lower_id():
    # All equal: the 257 lowest ids, though none of them is more likely than the rest.
    logits = jnp.zeros((1, 300))
    *_, kept = sample(logits, random_keys(1), Sampling(top_k=257))
    np.testing.assert_array_equal(kept_mask(kept, (1, 300))[0], np.arange(300) < 257)


def test_top_p_after_top_k_keeps_fewer_than_the_union_of_the_removed():
    # p = 0.4, 0.3, 0.2, 0.1 with k = 2, p = 0.5. Top-p of what is left, 4/7 and 3/7,
    # keeps one token; top-p of all tokens keeps two.
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    for union, num_kept in ((False, 1), (True, 2)):
        config = Sampling(top_k=2, top_p=0.5, union=union)
        *_, kept = sample(logits, random_keys(1), config)
        assert kept_mask(kept, (1, 4)).sum() == num_kept


def test_tiny_top_p_keeps_the_most_likely_token():
    logits = random_logits()
    for config in (Sampling(top_p=1e-6), Sampling(top_p=1e-6, top_k=9)):
        tokens, logprobs, _, kept = sample(logits, random_keys(), config)
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
        np.testing.assert_array_equal(kept_mask(kept).sum(-1), 1)
        np.testing.assert_array_equal(logprobs, 0)


def test_greedy_is_the_first_most_likely_token_scored_at_temperature_one():
    # p = 1/2, 1/4, 1/4: log ½. Of equals, the lower id.
    logits = jnp.log(jnp.array([[1.0, 2.0, 1.0], [1.0, 2.0, 2.0]]))
    for config in (
        Sampling(greedy=True, temperature=0.3, top_k=1),
        Sampling(temperature=0),
    ):
        assert config.greedy
        assert config.temperature == 1
        tokens, logprobs, _, kept = sample(logits, random_keys(2), config)
        np.testing.assert_array_equal(tokens, [1, 1])
        np.testing.assert_allclose(logprobs, np.log([1 / 2, 2 / 5]), rtol=1e-6)
        assert kept is None


def test_forbidden_token_is_never_drawn_however_likely():
    logits = random_logits().at[:, EOS].set(20.0)
    for name in (
        "eos forbidden",
        "eos forbidden, top-k",
        "bad words",
        "bad words, top-k",
        "greedy, eos forbidden",
    ):
        config = FILTERS[name]
        draw = sample(logits, random_keys(), config, **restrictions(config))
        np.testing.assert_array_equal(draw.tokens[1::2], EOS)
        assert not np.any(draw.tokens[::2] == EOS)
        assert not kept_mask(draw.kept)[::2, EOS].any()


def test_entropy_of_equal_probabilities_is_the_log_of_their_number():
    for config, num_kept in (
        (Sampling(), 300),
        (Sampling(top_k=8), 8),
        (Sampling(top_p=0.5), 150),
        (Sampling(top_p=0.5, greedy=True), 300),
    ):
        draw = sample(jnp.zeros((1, 300)), random_keys(1), config)
        np.testing.assert_allclose(draw.entropy, [np.log(num_kept)], rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        Sampling(temperature=0.7, top_k=200, top_p=0.9, min_p=0.01),
        pytest.param(Sampling(top_k=50), marks=pytest.mark.slow),
        pytest.param(Sampling(top_p=0.9), marks=pytest.mark.slow),
    ],
)
def test_a_large_vocabulary_is_cut_as_a_small_one(config):
    logits = random_logits(7, 3, 40_000)  # Where `most_likely` looks at blocks.
    draw = sample(logits, random_keys(3), config)
    p = probabilities(logits, config)
    np.testing.assert_array_equal(kept_mask(draw.kept, logits.shape), p > 0)
    exact = np.log(p[np.arange(3), draw.tokens])
    np.testing.assert_allclose(draw.logprobs, exact, atol=1e-5)


@pytest.mark.parametrize("top_k", [0, 2])
def test_steps_that_filter_nothing_record_empty_sets_of_everything(top_k):
    # ReaL marked such a step as all tokens removed when another step had removed some:
    # the log-probability became that of a uniform choice, with no gradient.
    logits = random_logits(6, B, 2 if top_k else V)
    config = Sampling(min_new_tokens=4, top_k=top_k)
    tokens, logprobs, _, kept = sample(logits, random_keys(), config)
    np.testing.assert_array_equal(kept, np.zeros_like(kept))
    assert kept_mask(kept, logits.shape).all()
    expected = jax.nn.log_softmax(logits)[np.arange(B), tokens]
    np.testing.assert_allclose(logprobs, expected, atol=1e-6)


def test_bits_take_an_eighth_of_the_bytes_of_a_mask():
    logits = jax.ShapeDtypeStruct((B, 4096), jnp.float32)
    kept_of = lambda config: jax.eval_shape(
        lambda x, keys: sampling.sample(x, keys, config).kept, logits, random_keys()
    )
    assert kept_of(FILTERS["top-p"]).size * 4 == B * 4096 // 8
    assert kept_of(FILTERS["top-k"]).size * 4 == B * 20 * 4


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-24])
def test_draw_never_lands_on_a_weight_of_zero(uniform):
    weights = jnp.array([[0.0, 0.0, 1e-30, 0.3, 0.0, 0.7, 0.0], [0, 0, 0, 5, 0, 0, 0]])
    places = inverse_cdf(weights, jnp.full((2,), uniform, jnp.float32))
    assert np.all(weights[np.arange(2), places] > 0)
    np.testing.assert_array_equal(places[1], 3)


def test_draw_never_lands_on_a_weight_of_zero_where_rounded_sums_rise_there():
    # Long sums are made in pieces: their rounding differs, and a sum may rise by 1e-7
    # at a weight of 0, or fall at another. Every place of such a rise is aimed at.
    rng = np.random.default_rng(0)
    weights = rng.random((500, 1000)) * (rng.random((500, 1000)) < 0.3)
    weights = weights.astype(np.float32)
    sums = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(weights))
    rises = (np.diff(sums, axis=-1) > 0) & (weights[:, 1:] == 0)
    rows, places = np.nonzero(rises)
    uniforms = sums[rows, places] / sums[rows, -1]
    found = jax.jit(inverse_cdf)(weights[rows], uniforms)
    assert np.all(weights[rows, found] > 0)


def test_extreme_logits_are_sampled():
    logits = jnp.array([[-1e30, 88.0, -jnp.inf, 1e4], [-jnp.inf, 0, -1e38, -jnp.inf]])
    for name in ("none", "top-p"):
        tokens, logprobs, *_ = sample(logits, random_keys(2), FILTERS[name])
        np.testing.assert_array_equal(tokens, [3, 1])
        np.testing.assert_array_equal(logprobs, 0)


def test_sampling_compiles_once_for_one_shape():
    num_traces = 0

    @functools.partial(jax.jit, static_argnums=2)
    def counted(logits, keys, config):
        nonlocal num_traces
        num_traces += 1
        return sampling.sample(logits, keys, config)

    for seed in range(3):
        counted(random_logits(seed), random_keys(seed=seed), Sampling(top_k=4))
    assert num_traces == 1
