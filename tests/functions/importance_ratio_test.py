"""Sampler, trainer and reference: one definition of a token's log-probability.

Before the first update the importance ratio is 1, whatever the sampling settings.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.functions.function import Generate, Infer, Train
from realjax.functions.generate import GenerateProgram
from realjax.functions.infer import InferProgram
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.train import TrainProgram
from realjax.rl.masking import Mean
from realjax.rl.sampling import Sampling, is_kept
from realjax.rollout.settings import Settings
from realjax.testing import tiny_model
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    pack_all,
    parameters_on,
    plain_logprobs,
    sharp_parameters,
)

CONFIG = tiny_model(vocab_size=72)  # No multiple of 32: the last word has unused bits.
EOS, WIDTH, LIMIT, SIZE = (1, 9, 33), 24, 12, 8
GENERATOR = np.random.default_rng(0)
PROMPTS = GENERATOR.integers(2, 72, (SIZE, 8), np.int32)
LENGTHS = np.array([5, 1, 8, 3, 8, 2, 7, 4], np.int32)

SETTINGS = {
    "all filters": Sampling(temperature=0.7, top_k=20, top_p=0.9),
    "top-p alone": Sampling(top_p=0.9),
    "least length": Sampling(min_new_tokens=8),
    "no filter": Sampling(),
    "temperature": Sampling(temperature=1.7),
    "union": Sampling(temperature=0.7, top_k=20, top_p=0.9, union=True),
    "filters and least length": Sampling(top_k=5, top_p=0.8, min_new_tokens=8),
    "min-p": Sampling(min_p=0.1),
    "min-p of top-k and top-p": Sampling(top_k=20, top_p=0.95, min_p=0.05),
    "bad words": Sampling(bad_words=((5,), (9, 10), (30, 3, 7))),
    "all that sets describe": Sampling(
        temperature=0.8, top_p=0.95, min_p=0.02, bad_words=((5,),), min_new_tokens=4
    ),
    "greedy": Sampling(greedy=True),
    "greedy with least length": Sampling(greedy=True, min_new_tokens=8),
}
SAMPLE = ("all filters", "top-p alone", "least length", "no filter", "bad words")
UNFILTERED = ("no filter", "temperature", "greedy")


def marked(names):
    """The names; those outside the sample are slow."""
    return [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]


ALL = marked(SETTINGS)
FILTERED = marked(name for name in SETTINGS if name not in UNFILTERED)


def sampling_of(name):
    sampling = SETTINGS[name]
    return type(sampling)(**{**vars(sampling), "max_new_tokens": LIMIT})


@functools.cache
def rollout_of(name, place="d1"):
    """Completions by the setting, as keys of a batch."""
    spec = Generate(sampling=sampling_of(name))
    program = GenerateProgram(
        spec,
        model_on(place, CONFIG),
        mesh_of(place),
        eos_ids=EOS,
        width=WIDTH,
        settings=Settings(slots=SIZE, page_size=4),
    )
    parameters = parameters_on(place, CONFIG, sharp_parameters(CONFIG))
    inputs = {"lengths": LENGTHS, "ids": np.arange(SIZE, dtype=np.uint32)}
    inputs |= batch_on(place, {"prompts": PROMPTS})
    rollout = program(parameters, inputs, jax.random.key(3))
    return {
        key: np.asarray(value)
        for key, value in rollout._asdict().items()
        if value is not None
    }


@functools.cache
def scorer(temperature, place):
    spec = Infer(temperature=temperature, reads=("tokens", "kept"))
    return InferProgram(spec, model_on(place, CONFIG), mesh_of(place))


def scored(rollout, name, parameters, place="d1", keys=("tokens", "kept")):
    """Log-probabilities of the rollout's tokens, under the setting it was made with."""
    program = scorer(sampling_of(name).temperature, place)
    batch = batch_on(place, {key: rollout[key] for key in keys if key in rollout})
    packings = pack_all(rollout["lengths"], num_rows=4, num_shards=4)
    found = program(parameters_on(place, CONFIG, parameters), batch, packings)
    return np.asarray(found["logprobs"])


def ratios(rollout, logprobs):
    mask = rollout["completion_mask"]
    difference = logprobs.astype(np.float64) - rollout["old_logprobs"]
    return np.exp(difference)[mask]


@pytest.mark.parametrize("name", ALL)
def test_the_importance_ratio_is_one_before_the_first_update(name):
    rollout = rollout_of(name)
    found = scored(rollout, name, sharp_parameters(CONFIG))
    assert np.abs(ratios(rollout, found) - 1).max() <= 1e-5


@pytest.mark.parametrize("name", FILTERED)
def test_the_set_kept_matters_and_holds_the_chosen_token(name):
    rollout = rollout_of(name)
    sets = np.asarray(is_kept(jnp.asarray(rollout["kept"]), CONFIG.vocab_size))
    chosen = np.take_along_axis(sets, rollout["tokens"][:, :, None], axis=2)[:, :, 0]
    mask = rollout["completion_mask"]
    assert chosen[mask].all()
    assert not sets[mask].all()
    # Outside the completion every token may stand: its set is empty, which is all.
    assert sets[~mask].all()
    whole = scored(rollout, name, sharp_parameters(CONFIG), keys=("tokens",))
    assert np.abs(ratios(rollout, whole) - 1).max() > 1e-3


@pytest.mark.parametrize("name", FILTERED)
def test_the_reference_normalises_over_the_policys_set(name):
    rollout, other = rollout_of(name), sharp_parameters(CONFIG, seed=1)
    sets = np.asarray(is_kept(jnp.asarray(rollout["kept"]), CONFIG.vocab_size))
    expected = plain_logprobs(
        other,
        CONFIG,
        rollout["tokens"],
        rollout["lengths"],
        temperature=sampling_of(name).temperature,
        is_kept=sets,
    )
    mask = rollout["completion_mask"]
    found = scored(rollout, name, other)
    assert np.isfinite(found[mask]).all()
    np.testing.assert_allclose(found[mask], expected[mask], atol=2e-5)


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty"])
def test_penalties_are_refused_for_training(penalty):
    with pytest.raises(ValueError, match=rf"{penalty} is 1.5.*`realjax.sample` takes"):
        Generate(sampling=Sampling(**{penalty: 1.5}))


def test_greedy_without_a_least_length_has_no_sets():
    # ReaL replaced the missing masks of single steps by "all filtered", and crashed
    # where all were missing.
    spec = Generate(sampling=sampling_of("greedy"))
    assert "kept" not in spec.writes
    rollout = rollout_of("greedy")
    assert "kept" not in rollout
    expected = plain_logprobs(
        sharp_parameters(CONFIG), CONFIG, rollout["tokens"], rollout["lengths"]
    )
    mask = rollout["completion_mask"]
    np.testing.assert_allclose(rollout["old_logprobs"][mask], expected[mask], atol=2e-5)


def test_steps_after_the_least_length_keep_every_token():
    # Forbidden tokens: the three that end, in the first 8 of up to 12 steps.
    rollout = rollout_of("least length")
    sets = np.asarray(is_kept(jnp.asarray(rollout["kept"]), CONFIG.vocab_size))
    place = np.arange(WIDTH)[None, :] - LENGTHS[:, None]
    is_early = rollout["completion_mask"] & (place < 8)
    is_late = rollout["completion_mask"] & (place >= 8)
    assert is_late.any()
    assert (sets[is_early].sum(axis=1) == CONFIG.vocab_size - 3).all()
    assert not sets[is_early][:, EOS].any()
    assert sets[is_late].all()


@pytest.mark.parametrize(
    "place", ["d2t2", pytest.param("d2f2t2", marks=pytest.mark.slow)]
)
def test_the_ratio_is_one_where_sampler_and_scorer_are_on_other_meshes(place):
    rollout = rollout_of("all filters", place)
    found = scored(rollout, "all filters", sharp_parameters(CONFIG))
    assert np.abs(ratios(rollout, found) - 1).max() <= 1e-5
    back = scored(
        rollout_of("all filters"), "all filters", sharp_parameters(CONFIG), place
    )
    assert np.abs(ratios(rollout_of("all filters"), back) - 1).max() <= 1e-5


def surrogate(logprobs, batch):
    """A policy gradient that likes every other completion, and the ratio so far."""
    mask, old = batch["completion_mask"], batch["old_logprobs"]
    ratio = jnp.exp(jnp.where(mask, logprobs - old, 0.0))
    return Mean.over(-ratio * batch["advantages"][:, None], mask), {
        "ratio": Mean.over(ratio, mask),
        "infinite": Mean.over(~jnp.isfinite(logprobs), mask),
        "entropy": Mean.over(batch["entropy"], mask),
    }


def test_updates_leave_every_logprob_finite():
    # Four minibatches, at a rate that moves the policy far.
    name = "all filters"
    rollout = rollout_of(name)
    keys = ("tokens", "kept", "completion_mask", "old_logprobs", "advantages")
    spec = Train(loss=surrogate, reads=keys, temperature=sampling_of(name).temperature)
    config = OptimizerConfig(learning_rate=3e-2, schedule="constant")
    program = TrainProgram(spec, model_on("d1", CONFIG), mesh_of("d1"), config, 4)
    signs = np.where(np.arange(SIZE) % 2, 1.0, -1.0).astype(np.float32)
    batch = batch_on("d1", {**rollout, "advantages": signs})
    state = program.init_optimizer(
        parameters_on("d1", CONFIG, sharp_parameters(CONFIG))
    )
    minibatches = [
        pack_all(np.where(np.arange(SIZE) // 2 == index, rollout["lengths"], 0))
        for index in range(4)
    ]
    state, reports = program(state, batch, minibatches)
    values = [{k: float(m.value()) for k, m in report.items()} for report in reports]
    assert values[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert abs(values[2]["ratio"] - 1.0) > 1e-3
    for report in values:
        assert report["infinite"] == report["skipped"] == 0
        assert 0 < report["entropy"] < np.log(20)
