"""Llama checkpoints mean here what they mean to transformers, in both directions.

The numbers in `data` are transformers' (make_llama.py); the folders `exported_*` are
ours (make_exports.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from realjax.models import heads, hf, pages
from realjax.models.transformer import hidden_states
from tests.models.paged import extend
from tests.parity import make_exports
from tests.parity.make_exports import DATA

pytestmark = pytest.mark.parity

LANGUAGE = ("hf_untied", "hf_tied", "exported_untied", "exported_tied")
SCALAR = ("hf_scalar", "exported_scalar")


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


@pytest.mark.parametrize("name", LANGUAGE)
def test_logits_are_those_of_transformers(name):
    config, parameters, numbers = load(name)
    hidden = hidden_of(parameters, config, numbers["tokens"])
    logits = heads.logits(parameters, config, hidden)
    np.testing.assert_allclose(logits, numbers["logits"], atol=1e-4)


@pytest.mark.parametrize("name", SCALAR)
def test_scalars_are_those_of_transformers(name):
    config, parameters, numbers = load(name)
    scalars = heads.scalars(
        parameters, hidden_of(parameters, config, numbers["tokens"])
    )
    np.testing.assert_allclose(scalars, numbers["scalars"], atol=1e-4)


@pytest.mark.parametrize("name", LANGUAGE)
def test_greedy_tokens_with_pages_are_those_of_transformers(name):
    config, parameters, numbers = load(name)
    prompts, expected = numbers["tokens"][:, :8], numbers["greedy"]

    @jax.jit
    def next_tokens(tokens, start, pool):
        hidden, pool = extend(parameters, config, tokens, pool, start=start)
        logits = heads.logits(parameters, config, hidden[:, -1])
        return jnp.argmax(logits, axis=-1)[:, None], pool

    pool = pages.empty(config, 2, 24, "float32")
    tokens, pool = next_tokens(prompts, jnp.int32(0), pool)
    generated = [tokens]
    for position in range(8, 8 + 15):
        tokens, pool = next_tokens(tokens, jnp.int32(position), pool)
        generated.append(tokens)
    np.testing.assert_array_equal(jnp.concatenate(generated, axis=1), expected)


@pytest.mark.parametrize("name", make_exports.CONFIGS)
def test_exporting_again_writes_the_stored_files(name, tmp_path):
    config = make_exports.CONFIGS[name]
    parameters = make_exports.parameters(config)
    limit = make_exports.MAX_SHARD_BYTES
    hf.save(tmp_path / name, config, parameters, max_shard_bytes=limit)
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


@pytest.mark.parametrize("name", make_exports.CONFIGS)
def test_a_stored_export_loads_as_what_was_exported(name):
    config, parameters, _ = load(name)
    assert config == make_exports.CONFIGS[name]
    jax.tree.map(
        np.testing.assert_array_equal, parameters, make_exports.parameters(config)
    )
