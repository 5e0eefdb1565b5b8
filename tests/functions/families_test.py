"""Every family: sampler and trainer agree, and a mesh samples what one device does."""

import functools

import jax
import numpy as np
import pytest

from realjax.functions.function import Generate, Infer
from realjax.functions.generate import GenerateProgram
from realjax.functions.infer import InferProgram
from realjax.parallel import Allocation, padded_for
from realjax.rl.sampling import Sampling
from realjax.rollout.settings import Settings
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    pack_all,
    parameters_on,
    sharp_parameters,
)
from tests.tiny_families import FAMILIES

SIZE, WIDTH, LIMIT = 8, 24, 14
LENGTHS = np.array([5, 1, 9, 3, 10, 2, 7, 4], np.int32)
PROMPTS = np.random.default_rng(0).integers(2, 61, (SIZE, 10), np.int32)
EOS = (1, 9, 33)
SAMPLING = Sampling(temperature=0.8, top_k=20, top_p=0.95, max_new_tokens=LIMIT)


@functools.cache
def rollout_of(family, text="d1"):
    """Completions sampled on an allocation, as numpy arrays."""
    config = padded_for(FAMILIES[family], [Allocation.parse(text)])
    program = GenerateProgram(
        Generate(sampling=SAMPLING),
        model_on(text, config),
        mesh_of(text),
        eos_ids=EOS,
        width=WIDTH,
        settings=Settings(slots=SIZE, page_size=4),
    )
    parameters = parameters_on(text, config, sharp_parameters(config))
    prompts = {"prompts": PROMPTS, "lengths": LENGTHS, "ids": np.arange(8, dtype="u4")}
    rollout = program(parameters, prompts, jax.random.key(3))
    return type(rollout)(*map(np.asarray, rollout))


def sampled_families(*names):
    return [
        pytest.param(name, marks=() if name in names else pytest.mark.slow)
        for name in FAMILIES
    ]


@pytest.mark.parametrize("family", sampled_families("gemma2", "mixtral"))
def test_the_trainer_gives_the_sampler_s_log_probabilities(family):
    rollout, config = rollout_of(family), FAMILIES[family]
    # Longer than the windows of 5 to 7, and of unlike lengths.
    assert rollout.completion_mask.sum(axis=1).max() == LIMIT
    assert len(set(rollout.lengths.tolist())) > 3
    spec = Infer(temperature=SAMPLING.temperature)
    program = InferProgram(spec, model_on("d1", config), mesh_of("d1"))
    batch = batch_on("d1", {"tokens": rollout.tokens, "kept": rollout.kept})
    packings = pack_all(rollout.lengths, width=WIDTH, num_rows=3, row_length=50)
    found = program(sharp_parameters(config), batch, packings)["logprobs"]
    mask = rollout.completion_mask
    np.testing.assert_allclose(
        np.asarray(found)[mask], rollout.old_logprobs[mask], atol=1e-5
    )
    assert np.abs(rollout.old_logprobs[mask]).max() > 0.5


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("mixtral", "e2t2"),
        pytest.param("gemma2", "f2t4", marks=pytest.mark.slow),
        *(
            pytest.param(family, text, marks=pytest.mark.slow)
            for family in FAMILIES
            for text in ("d2t4", "f4", "t8", "f4t2")
        ),
        *(
            pytest.param(family, text, marks=pytest.mark.slow)
            for family in ("mixtral", "qwen3_moe")
            for text in ("e4", "d2e2t2")
        ),
    ],
)
def test_a_mesh_samples_the_tokens_of_one_device(family, text):
    found, expected = rollout_of(family, text), rollout_of(family)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.old_logprobs, expected.old_logprobs, atol=2e-5)
