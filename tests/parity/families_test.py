"""Every family means here what it means to transformers, in both directions.

The numbers in `data/families` are transformers' (make_families.py); the folders
`exported_*` there are ours (make_exports.py).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from realjax.models import heads, hf, pages
from realjax.models.families import names
from realjax.models.transformer import hidden_states
from tests.models.paged import extend
from tests.parity import make_exports
from tests.parity.make_exports import FAMILIES as DATA

pytestmark = pytest.mark.parity

FOLDERS = sorted(path.name for path in DATA.iterdir() if path.is_dir())
LANGUAGE = [name for name in FOLDERS if "scalar" not in name]
SCALAR = [name for name in FOLDERS if "scalar" in name]
# One of each family, the one with more of what sets it apart.
SAMPLE = (
    *("gemma2_capped", "gemma3_scaled", "gemma_untied", "gpt2_scaled"),
    *("llama_dynamic", "mistral_window", "mixtral_window", "qwen2_window"),
    *("qwen3_window", "qwen3_moe_normalized", "exported_scalar_gemma2"),
)
PROMPT = 8


def sampled(folders):
    """The folders, those that are not in the sample marked as slow."""
    return [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow)
        for name in folders
    ]


def load(name):
    """Config, parameters and transformers' numbers of a stored checkpoint."""
    config = hf.read_config(DATA / name)
    numbers = {key: jnp.asarray(x) for key, x in np.load(DATA / f"{name}.npz").items()}
    return config, hf.load(DATA / name), numbers


@functools.partial(jax.jit, static_argnums=1)
def hidden_of(parameters, config, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return hidden_states(
        parameters, config, tokens, positions, jnp.ones(tokens.shape, jnp.int32)
    )


@functools.partial(jax.jit, static_argnums=(1, 3))
def greedy_of(parameters, config, prompts, num_new):
    """Continue prompts with pages: read them, then one token a step."""

    def next_token(tokens, start, pool):
        hidden, pool = extend(parameters, config, tokens, pool, start=start)
        logits = heads.logits(parameters, config, hidden[:, -1])
        return jnp.argmax(logits, axis=-1)[:, None].astype(jnp.int32), pool

    def step(carry, start):
        tokens, pool = next_token(carry[0], start, carry[1])
        return (tokens, pool), carry[0][:, 0]

    pool = pages.empty(config, len(prompts), PROMPT + num_new, "float32")
    first = next_token(prompts, 0, pool)
    return jax.lax.scan(step, first, PROMPT + jnp.arange(num_new))[1].T


def test_every_family_has_checkpoints_and_an_export():
    made = [hf.read_config(DATA / name).family for name in FOLDERS]
    exported = [
        hf.read_config(DATA / name).family
        for name in FOLDERS
        if name.startswith("exported")
    ]
    for family in names():
        assert made.count(family) - exported.count(family) >= 2, family
        assert family == "llama" or family in exported
    assert {hf.read_config(DATA / name).family for name in SAMPLE} == set(names())


@pytest.mark.parametrize("name", sampled(LANGUAGE))
def test_logits_are_those_of_transformers(name):
    config, parameters, numbers = load(name)
    hidden = hidden_of(parameters, config, numbers["tokens"])
    logits = heads.logits(parameters, config, hidden)
    np.testing.assert_allclose(logits, numbers["logits"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2_capped", {"window": 6}),
        ("gemma2_capped", {"windowed_layers": (False, True, False)}),
        ("gemma2_capped", {"attention_soft_cap": None}),
        ("gemma2_capped", {"logit_soft_cap": None}),
        ("gemma2_capped", {"attention_scale": None}),
        ("gemma3_scaled", {"local_rope_theta": None}),
        ("gemma3_scaled", {"rope_scaling": None}),
        ("gemma_tied", {"is_embedding_scaled": False}),
        ("gemma_tied", {"activation": "gelu"}),
        ("gemma_tied", {"norm": "rms"}),
        ("gpt2_scaled", {"is_scaled_by_layer": False}),
        ("gpt2_scaled", {"activation": "gelu_tanh"}),
        ("llama_dynamic", {"rope_scaling": None}),
        ("llama_longrope", {"rope_scaling": None}),
        ("llama_yarn", {"rope_scaling": None}),
        ("mistral_window", {"window": 8}),
        ("qwen2_window", {"windowed_layers": ()}),
        ("qwen3_plain", {"norm_epsilon": 1e-3}),
    ],
)
def test_a_config_that_is_read_wrong_gives_other_logits(name, changes):
    config, parameters, numbers = load(name)
    wrong = dataclasses.replace(config, **changes)
    hidden = hidden_of(parameters, wrong, numbers["tokens"])
    logits = heads.logits(parameters, wrong, hidden)
    assert jnp.max(jnp.abs(logits - numbers["logits"])) > 2e-4


@pytest.mark.parametrize("name", sampled(SCALAR))
def test_scalars_are_those_of_transformers(name):
    config, parameters, numbers = load(name)
    hidden = hidden_of(parameters, config, numbers["tokens"])
    scalars = heads.scalars(parameters, hidden)
    np.testing.assert_allclose(scalars, numbers["scalars"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sampled(LANGUAGE))
def test_greedy_tokens_with_pages_are_those_of_transformers(name):
    config, parameters, numbers = load(name)
    prompts, expected = numbers["tokens"][:, :PROMPT], numbers["greedy"]
    greedy = greedy_of(parameters, config, prompts, expected.shape[1])
    np.testing.assert_array_equal(greedy, expected)


@pytest.mark.parametrize("name", sampled(FOLDERS))
def test_a_checkpoint_loaded_and_saved_has_the_tensors_it_had(name, tmp_path):
    config, parameters, _ = load(name)
    hf.save(tmp_path / name, config, parameters)
    new = load_file(tmp_path / name / "model.safetensors")
    stored = load_file(DATA / name / "model.safetensors")
    assert new.keys() == stored.keys()
    for tensor in new:
        np.testing.assert_array_equal(new[tensor], stored[tensor])


@pytest.mark.parametrize("name", make_exports.FAMILY_CONFIGS)
def test_exporting_again_writes_the_stored_files(name, tmp_path):
    config = make_exports.FAMILY_CONFIGS[name]
    hf.save(tmp_path / name, config, make_exports.parameters(config))
    written = sorted(path.name for path in (tmp_path / name).iterdir())
    assert written == sorted(path.name for path in (DATA / name).iterdir())
    for file in written:
        new, stored = tmp_path / name / file, DATA / name / file
        if new.suffix == ".json":
            assert new.read_text() == stored.read_text()
        else:
            new, stored = load_file(new), load_file(stored)
            assert new.keys() == stored.keys()
            for tensor in new:
                np.testing.assert_array_equal(new[tensor], stored[tensor])


@pytest.mark.parametrize("name", make_exports.FAMILY_CONFIGS)
def test_a_stored_export_loads_as_what_was_exported(name):
    config, parameters, _ = load(name)
    assert config == make_exports.FAMILY_CONFIGS[name]
    jax.tree.map(
        np.testing.assert_array_equal, parameters, make_exports.parameters(config)
    )
