"""Tests of `realjax/rl/logprobs.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from realjax.rl import logprobs as logprobs_lib
from realjax.rl import sampling
from realjax.rl.logprobs import token_logprobs
from realjax.rl.sampling import Sampling

R, S, D, V = 4, 12, 8, 300
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 2, 2, 2, 3, 4, 4, 0, 0],
        [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)
# Tokens that follow another of their segment.
CHOSEN = np.array(
    [
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)

scored = jax.jit(
    token_logprobs, static_argnames=("temperature", "chunk_size", "constrain_kernel")
)


def rows(seed: int = 0):
    """Return hidden states, a kernel and tokens; the logits spread by several nats."""
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = 2.0 * jax.random.normal(keys[0], (R, S, D))
    kernel = jax.random.normal(keys[1], (D, V))
    tokens = jax.random.randint(keys[2], (R, S), 0, V)
    return hidden, kernel, tokens


def test_each_token_is_scored_by_the_state_before_it_of_its_own_segment():
    hidden, kernel, tokens = rows()
    found, entropy = scored(hidden, kernel, tokens, SEGMENTS, temperature=0.7)
    for r in range(R):
        for p in range(S):
            if not CHOSEN[r, p]:
                assert found[r, p] == 0
                assert entropy[r, p] == 0
                continue
            # The trainer of ReaL left the division by the temperature out.
            logits = np.float64(hidden[r, p - 1]) @ np.float64(kernel) / 0.7
            log_p = logits - np.log(np.sum(np.exp(logits)))
            np.testing.assert_allclose(found[r, p], log_p[tokens[r, p]], atol=2e-5)
            np.testing.assert_allclose(
                entropy[r, p], -np.sum(np.exp(log_p) * log_p), atol=2e-5
            )


SAMPLERS = {
    "temperature": Sampling(temperature=0.7),
    "top-k": Sampling(top_k=20),
    "temperature, top-k and top-p": Sampling(temperature=0.7, top_k=20, top_p=0.9),
    "top-p": Sampling(top_p=0.9),
    "large top-k": Sampling(temperature=1.2, top_k=280),
    "union": Sampling(temperature=0.7, top_k=20, top_p=0.6, union=True),
    "eos forbidden": Sampling(min_new_tokens=2),
    "eos forbidden, top-p": Sampling(min_new_tokens=2, top_p=0.9, temperature=0.7),
    "nothing": Sampling(),
    "greedy": Sampling(temperature=0),
    "greedy, eos forbidden": Sampling(greedy=True, min_new_tokens=2),
}


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [
        *((name, None) for name in SAMPLERS),
        ("temperature, top-k and top-p", 16),
        ("eos forbidden, top-p", 16),
    ],
)
def test_trainer_gives_the_logprobs_of_the_sampler(name, chunk_size):
    config = SAMPLERS[name]
    hidden, kernel, _ = rows(1)
    logits = (hidden @ kernel).reshape(-1, V)
    forbidden = None
    if config.min_new_tokens:  # Of the earlier half of the places only.
        early = jnp.tile(jnp.arange(S)[None] < S // 2, (R, 1)).reshape(-1, 1)
        forbidden = early & (jnp.arange(V)[None] == 3)
    keys = jax.random.split(jax.random.key(2), R * S)
    draw = jax.jit(sampling.sample, static_argnums=2)
    tokens, drawn, _, kept = draw(logits, keys, config, forbidden=forbidden)
    # The token drawn at place p stands at place p + 1, and so does its set.
    stands = lambda x: jnp.roll(x.reshape(R, S, *x.shape[1:]), 1, axis=1)
    tokens, drawn = stands(tokens), stands(drawn)
    found, _ = scored(
        hidden,
        kernel,
        tokens,
        SEGMENTS,
        temperature=config.temperature,
        kept=None if kept is None else stands(kept),
        chunk_size=chunk_size,
    )
    ratio = np.exp(found - drawn)[CHOSEN]
    np.testing.assert_allclose(ratio, 1.0, atol=1e-5)


def test_trainer_without_temperature_or_sets_has_other_ratios():
    # What the test above would have caught: ReaL's ratios before the first update.
    hidden, kernel, _ = rows(1)
    logits = (hidden @ kernel).reshape(-1, V)
    config = SAMPLERS["temperature, top-k and top-p"]
    keys = jax.random.split(jax.random.key(2), R * S)
    tokens, drawn, *_ = sampling.sample(logits, keys, config)
    plain = jax.nn.log_softmax(logits)[np.arange(R * S), tokens]
    outside = np.abs(np.exp(plain - drawn) - 1) > 0.2
    assert outside.mean() > 0.5


def test_empty_sets_mean_that_everything_is_kept():
    hidden, kernel, tokens = rows()
    everything, _ = scored(hidden, kernel, tokens, SEGMENTS)
    for empty in (-jnp.ones((R, S, 5), jnp.int32), jnp.zeros((R, S, 10), jnp.uint32)):
        found, _ = scored(hidden, kernel, tokens, SEGMENTS, kept=empty)
        np.testing.assert_allclose(found, everything, atol=1e-6)


@pytest.mark.parametrize("form", ["none", "ids", "bits"])
def test_gradients_reach_only_states_that_chose_a_token_and_are_finite(form):
    hidden, kernel, tokens = rows()
    # Sets that hold the token in the first row, empty ones below; on padding and at
    # the start of segments they hold anything.
    ids = jnp.stack([tokens, (tokens + 1) % V], axis=-1)
    ids = jnp.where(jnp.arange(R)[:, None, None] == 0, ids, -1)
    bits = jax.random.bits(jax.random.key(0), (R, S, 10))
    bits = jnp.where(jnp.arange(R)[:, None, None] == 0, bits, jnp.uint32(0))
    kept = {"none": None, "ids": ids, "bits": bits}[form]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(hidden, kernel):
        found, entropy = token_logprobs(
            hidden, kernel, tokens, jnp.asarray(SEGMENTS), kept=kept, chunk_size=16
        )
        finite = jnp.where(found > -jnp.inf, found, 0.0)
        return jnp.sum(finite) + jnp.sum(entropy)

    by_hidden, by_kernel = gradients(hidden, kernel)
    assert np.isfinite(by_hidden).all()
    assert np.isfinite(by_kernel).all()
    chooses = np.roll(CHOSEN, -1, axis=1)
    np.testing.assert_array_equal(by_hidden[~chooses], 0)
    if form != "bits":  # A random set need not hold the token.
        assert np.all(np.abs(by_hidden[chooses]).sum(-1) > 0)


def test_packing_does_not_change_a_sequence():
    hidden, kernel, tokens = rows()
    packed, _ = scored(hidden, kernel, tokens, SEGMENTS, temperature=0.7)
    # Segment 2 of row 1, alone in a row.
    alone, _ = scored(
        hidden[1:2, 4:7], kernel, tokens[1:2, 4:7], np.ones((1, 3), np.int32)
    )
    again, _ = scored(hidden, kernel, tokens, SEGMENTS)
    np.testing.assert_allclose(alone[0], again[1, 4:7], atol=1e-6)
    assert np.abs(packed[1, 5] - again[1, 5]) > 1e-3


def test_kernel_is_constrained_once_in_the_type_of_the_hidden_states():
    hidden, kernel, tokens = rows()
    seen = []

    def constrain(x):
        seen.append(x.dtype)
        return x

    found, _ = token_logprobs(
        hidden.astype(jnp.bfloat16),
        kernel,
        tokens,
        jnp.asarray(SEGMENTS),
        constrain_kernel=constrain,
    )
    assert seen == [jnp.bfloat16]
    assert found.dtype == jnp.float32


@pytest.mark.parametrize("form", ["none", "bits"])
def test_rows_sharded_over_devices_give_what_one_device_gives(form):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shard = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    hidden, kernel, tokens = rows()
    kept = None if form == "none" else jnp.full((R, S, 10), 0xFFFFFFFF, jnp.uint32)
    gathered = NamedSharding(mesh, P(None, "tensor"))
    constrain = lambda x: jax.lax.with_sharding_constraint(x, gathered)
    alone, _ = scored(hidden, kernel, tokens, SEGMENTS, kept=kept, chunk_size=16)
    args = (
        shard(hidden, "data"),
        shard(kernel, "data", "tensor"),
        shard(tokens, "data"),
        shard(SEGMENTS, "data"),
    )
    options = {
        "kept": None if kept is None else shard(kept, "data"),
        "chunk_size": 16,  # 3 chunks, each a third of every row.
        "constrain_kernel": constrain,
    }
    found, _ = scored(*args, **options)
    np.testing.assert_allclose(found, alone, atol=1e-5)
    text = scored.lower(*args, **options).compile().as_text()
    assert "f32[4,150]" in text  # The logits of a chunk, on a device.
    gathers = [line for line in text.splitlines() if " all-gather" in line]
    assert len(gathers) == 1, gathers  # The kernel.


def test_values_are_those_of_the_state_before_each_token():
    values = jnp.arange(R * S, dtype=jnp.float32).reshape(R, S) + 100
    found = logprobs_lib.token_values(values, jnp.asarray(SEGMENTS))
    expected = np.where(CHOSEN, np.arange(R * S).reshape(R, S) + 99, 0)
    np.testing.assert_array_equal(found, expected)
    assert (
        logprobs_lib.token_values(
            values.astype(jnp.bfloat16), jnp.asarray(SEGMENTS)
        ).dtype
        == jnp.float32
    )


def test_garbage_on_padding_does_not_reach_values():
    values = jnp.where(SEGMENTS == 0, jnp.nan, 1.0)
    found = logprobs_lib.token_values(values, jnp.asarray(SEGMENTS))
    np.testing.assert_array_equal(found, CHOSEN)


def test_shift_right_moves_what_is_said_to_the_token_it_is_about():
    x = jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(logprobs_lib.shift_right(x), [[0, 1, 2]])
    np.testing.assert_array_equal(logprobs_lib.is_chosen(jnp.asarray(SEGMENTS)), CHOSEN)
