"""Adapters mean here what they mean to PEFT, in both directions.

The folders in `data/peft` and the numbers beside them are PEFT's (make_peft.py).
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from realjax.models import heads, hf, lora_files
from realjax.models.parameters import join, split
from tests.functions.plain import plain_hidden
from tests.parity.make_exports import DATA

pytestmark = pytest.mark.parity

PEFT = DATA / "peft"
BASES = {
    "llama": "hf_tied",
    "qwen2": "families/qwen2_window",
    "gpt2": "families/gpt2_plain",
    "scalar": "hf_scalar",
}


def load(name):
    """The model with adapters, its parameters, and PEFT's numbers."""
    base = hf.load(DATA / BASES[name])
    config = lora_files.read_adapters(PEFT / name, hf.read_config(DATA / BASES[name]))
    trained = lora_files.load_adapters(PEFT / name, config)
    return config, join(trained, base), dict(np.load(PEFT / f"{name}.npz"))


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("llama", "gpt2")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in BASES
    ],
)
def test_a_model_with_adapters_of_peft_computes_what_peft_does(name):
    config, parameters, numbers = load(name)
    hidden = plain_hidden(parameters, config, jnp.asarray(numbers["tokens"]))
    if config.head == "scalar":
        found, wanted = heads.scalars(parameters, hidden)[:, -1], numbers["scalars"]
    else:
        found, wanted = heads.logits(parameters, config, hidden), numbers["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_saved_adapters_have_the_names_shapes_and_numbers_of_peft(name, tmp_path):
    config, parameters, _ = load(name)
    lora_files.save_adapters(tmp_path / "saved", config, parameters)
    found = load_file(tmp_path / "saved" / lora_files.ADAPTER_FILE)
    wanted = load_file(PEFT / name / lora_files.ADAPTER_FILE)
    assert {key: x.shape for key, x in found.items()} == {
        key: x.shape for key, x in wanted.items()
    }
    for key, x in wanted.items():
        np.testing.assert_array_equal(found[key], x, err_msg=key)


@pytest.mark.parametrize("name", BASES)
def test_the_config_that_is_written_says_what_that_of_peft_does(name):
    config, _, _ = load(name)
    found = lora_files.written_config(config)
    wanted = json.loads((PEFT / name / lora_files.ADAPTER_CONFIG).read_text())
    same = ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias")
    assert {key: found[key] for key in same} == {key: wanted[key] for key in same}
    assert found.keys() <= wanted.keys()
    assert found["fan_in_fan_out"] == wanted["fan_in_fan_out"]
    assert set(found["target_modules"]) == set(wanted["target_modules"])
    assert set(found["modules_to_save"] or ()) <= set(wanted["modules_to_save"] or ())


def test_what_is_trained_is_what_peft_stores():
    config, parameters, _ = load("llama")
    trained, base = split(parameters, config)
    assert set(trained) == {"layers"} and "embedding" in base
