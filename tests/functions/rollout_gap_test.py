"""The gap between a sampler of 8 bits and the trainer: there, and within a bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.functions.function import Generate, Infer
from realjax.functions.generate import GenerateProgram
from realjax.functions.infer import InferProgram
from realjax.models import quantized
from realjax.rl import importance
from realjax.rl.sampling import Sampling
from realjax.rollout.settings import Settings
from realjax.testing import tiny_model
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    pack_all,
    parameters_on,
    sharp_parameters,
)

CONFIG, EOS, WIDTH, SIZE = tiny_model(vocab_size=72), (1,), 24, 16
GENERATOR = np.random.default_rng(0)
PROMPTS = GENERATOR.integers(2, 72, (SIZE, 8), np.int32)
LENGTHS = GENERATOR.integers(1, 9, SIZE).astype(np.int32)

# By (weights, keys and values): the most that the mean |Δ log-probability| of a token
# and the KL of the sampler from the trainer may be. Logits deviate by about 2.
BOUNDS = {
    ("int8", ""): (0.03, 1e-3),
    ("float8_e4m3fn", ""): (0.15, 3e-2),
    ("", "int8"): (0.01, 2e-4),
    ("", "float8_e4m3fn"): (0.05, 5e-3),
    ("int8", "int8"): (0.03, 1e-3),
    ("float8_e4m3fn", "float8_e4m3fn"): (0.15, 3e-2),
}
SAMPLE = (("int8", ""), ("", "float8_e4m3fn"))


@functools.cache
def parameters_of(weights):
    parameters = parameters_on("d1", CONFIG, sharp_parameters(CONFIG))
    if not weights:
        return parameters
    return jax.jit(quantized.quantize, static_argnums=1)(parameters, weights)


@functools.cache
def rollout_of(weights, kv_dtype):
    program = GenerateProgram(
        Generate(sampling=Sampling(max_new_tokens=16)),
        model_on("d1", CONFIG),
        mesh_of("d1"),
        eos_ids=EOS,
        width=WIDTH,
        settings=Settings(slots=SIZE, page_size=4, kv_dtype=kv_dtype),
    )
    inputs = {"lengths": LENGTHS, "ids": np.arange(SIZE, dtype=np.uint32)}
    inputs |= batch_on("d1", {"prompts": PROMPTS})
    return program(parameters_of(weights), inputs, jax.random.key(3))


@functools.cache
def scorer():
    return InferProgram(Infer(), model_on("d1", CONFIG), mesh_of("d1"))


def scored(rollout, weights=""):
    packings = pack_all(np.asarray(rollout.lengths))
    found = scorer()(parameters_of(weights), {"tokens": rollout.tokens}, packings)
    return found["logprobs"]


@pytest.mark.parametrize(
    "weights",
    ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)],
)
def test_sampler_and_trainer_with_the_same_quantized_weights_agree(weights):
    # Decoding token by token over pages, and packed rows: one product with 8 bits.
    rollout = rollout_of(weights, "")
    mask = np.asarray(rollout.completion_mask)
    gaps = np.asarray(scored(rollout, weights) - rollout.old_logprobs)[mask]
    assert np.abs(gaps).max() <= 1e-5
    assert mask.sum() > SIZE


@pytest.mark.parametrize(
    ("weights", "kv_dtype"),
    [c if c in SAMPLE else pytest.param(*c, marks=pytest.mark.slow) for c in BOUNDS],
)
def test_the_gap_of_8_bits_is_there_and_within_its_bound(weights, kv_dtype):
    rollout = rollout_of(weights, kv_dtype)
    compared = (scored(rollout), rollout.old_logprobs, rollout.completion_mask)
    means = {name: mean.value() for name, mean in importance.gap(*compared).items()}
    most, most_kl = BOUNDS[weights, kv_dtype]
    assert 1e-4 < means["rollout_gap/logprob"] < most
    assert 0 < means["rollout_gap/kl"] < most_kl
    assert importance.largest_gap(*compared) > means["rollout_gap/logprob"]


def test_truncated_weights_bring_the_samplers_mean_to_the_trainers():
    # Of any function f of a token: E_μ[w f] = E_π[f] without a cap. Here f = 1.
    rollout = rollout_of("int8", "")
    mask = rollout.completion_mask
    compared = (scored(rollout), rollout.old_logprobs)
    weights = importance.truncated_weights(*compared, cap=100.0)
    assert abs(float(jnp.mean(weights, where=mask)) - 1) < 0.02
    capped = importance.truncated_weights(*compared, cap=1.0)
    assert float(capped.max()) <= 1.0
    assert float(jnp.mean(capped, where=mask)) < float(jnp.mean(weights, where=mask))
