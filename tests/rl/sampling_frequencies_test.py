"""How often tokens are drawn: 100 000 draws of every option, by the chi-square test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.rl.sampling import History, Sampling, bad_word_tokens, sample
from tests.rl.exact_sampling import forbidden_tokens, probabilities

NUM_DRAWS, V, EOS = 100_000, 50, 7
# False alarms: one test in ten thousand, were the seeds not fixed.
SIGNIFICANCE = 1e-4

PROMPT, COMPLETION = (3, 8, 9, 30), (9, 12, 5)
WORDS = (
    (20,),
    (5, 21),
    (12, 5, 22),
    (30, 9, 12, 5, 24),
    # Not after these tokens.
    (12, 25),
    (9, 5, 26),
)

OPTIONS = {
    "none": Sampling(),
    "temperature": Sampling(temperature=0.6),
    "top-k": Sampling(top_k=12),
    "top-p": Sampling(top_p=0.8),
    "min-p": Sampling(min_p=0.05),
    "top-k and top-p": Sampling(top_k=12, top_p=0.8),
    "top-k and min-p": Sampling(top_k=12, min_p=0.1),
    "top-p and min-p": Sampling(top_p=0.9, min_p=0.1),
    "union": Sampling(top_k=12, top_p=0.6, union=True),
    "repetition": Sampling(repetition_penalty=1.8),
    "presence": Sampling(presence_penalty=1.1),
    "bad words": Sampling(bad_words=WORDS),
    "least length": Sampling(min_new_tokens=4),
    "all": Sampling(
        temperature=1.4,
        top_k=30,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.3,
        presence_penalty=-0.7,
        bad_words=WORDS,
        min_new_tokens=4,
    ),
}
SLOW = {"none", "temperature", "top-k", "top-p", "min-p", "top-p and min-p"}
SLOW |= {"repetition", "presence", "least length", "union"}


@functools.partial(jax.jit, static_argnums=(2, 3))
def drawn(row, keys, config: Sampling, num_draws: int):
    """Draw from copies of one row after PROMPT and COMPLETION."""
    seen = lambda ids: jnp.isin(jnp.arange(V), jnp.array(ids))[None]
    repeat = lambda x: jnp.tile(x, (num_draws, 1))
    history = History(seen(PROMPT + COMPLETION), seen(COMPLETION))
    recent = jnp.array([[-1, *PROMPT, *COMPLETION]])
    forbidden = bad_word_tokens(recent, config, V)
    if len(COMPLETION) < config.min_new_tokens:
        forbidden |= seen([EOS])
    has_sets = config.bad_words or config.min_new_tokens
    return sample(
        repeat(row),
        keys,
        config,
        forbidden=repeat(forbidden) if has_sets else None,
        history=jax.tree.map(repeat, history) if config.needs_history else None,
    )


def chance(tokens, p) -> float:
    """Return how likely draws deviate from a distribution as much as these, or more."""
    counts, expected = np.bincount(tokens, minlength=V), len(tokens) * p
    # Tokens that are expected less than five times count as one.
    is_rare = expected < 5
    merge = lambda x: np.append(x[~is_rare], x[is_rare].sum())
    counts, expected = merge(counts), merge(expected)
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = np.sum((counts - expected) ** 2 / expected)
    return float(jax.scipy.stats.chi2.sf(statistic, len(expected) - 1))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in OPTIONS
    ],
)
def test_tokens_come_as_often_as_their_probability_says(name):
    config = OPTIONS[name]
    row = 1.5 * jax.random.normal(jax.random.key(3), (1, V))
    seen = lambda ids: np.isin(np.arange(V), ids)[None]
    forbidden = forbidden_tokens(config, PROMPT, COMPLETION, EOS, V)[None]
    history = History(seen(PROMPT + COMPLETION), seen(COMPLETION))
    p = probabilities(row, config, forbidden, history)[0]

    keys = jax.random.split(jax.random.key(4), NUM_DRAWS)
    found = drawn(row, keys, config, NUM_DRAWS)
    assert not np.any(p[found.tokens] == 0)
    assert chance(found.tokens, p) > SIGNIFICANCE
    np.testing.assert_allclose(found.logprobs, np.log(p[found.tokens]), atol=1e-5)


def test_chi_square_tells_a_temperature_from_one_three_percent_higher():
    row = 1.5 * jax.random.normal(jax.random.key(3), (1, V))
    p, other = (
        probabilities(row, Sampling(temperature=temperature))[0]
        for temperature in (1.0, 1.03)
    )
    tokens = np.random.default_rng(0).choice(V, NUM_DRAWS, p=p)
    assert chance(tokens, p) > SIGNIFICANCE
    assert chance(tokens, other) < SIGNIFICANCE
