"""Tests of `realjax/bench/precision.py`."""

import itertools

import numpy as np
import pytest

from realjax.bench.precision import NEXT, NUM_TOKENS, Case, Chain, Sizes, measure
from realjax.testing import tiny_model


def test_a_chain_goes_on_with_one_of_the_few_tokens_that_may_follow():
    chain = Chain()
    tokens = chain.draw(3, 4, 50)
    assert tokens.min() >= 0
    assert tokens.max() < NUM_TOKENS
    for row in tokens:
        for before, after in itertools.pairwise(row):
            assert after in chain.following[before]
    np.testing.assert_array_equal(tokens, chain.draw(3, 4, 50))
    assert chain.following.shape == (NUM_TOKENS, NEXT)


@pytest.mark.slow
def test_every_case_is_measured_before_and_after_sft():
    model = tiny_model(vocab_size=72)
    sizes = Sizes(
        model=model, num_prompts=4, prompt_length=8, new_tokens=8, sft_steps=3
    )
    cases = (Case(), Case(weights="int8", kv_dtype="float8_e4m3fn"))
    found = measure(sizes, cases)
    assert found["sft_loss"]["last"] < found["sft_loss"]["first"]
    for name in ("drawn", "tuned"):
        exact, small = found[name]
        assert exact["largest"] < 1e-5 < small["mean"] < small["largest"]
        assert small["kl"] > exact["kl"] >= 0
        assert small["weights"] == "int8"
