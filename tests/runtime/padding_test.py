"""A checkpoint goes on where the vocabulary and the layers are padded otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.dataflow.schedule import Place
from realjax.parallel.allocation import Allocation
from realjax.runtime.checkpoint import Checkpointer, MismatchedCheckpointError
from realjax.runtime.parameters import ParameterStore
from realjax.testing import tiny_model
from tests.runtime.small_runs import saved_arrays, sft_config, train, write_data

# 67 ids in rows of 68, 3 layers in stacks of 4.
MODEL = tiny_model(vocab_size=67, num_layers=3)
PADDED = dataclasses.replace(MODEL, vocab_multiple=4, layer_multiple=2)


def store_of(config):
    place = Place(Allocation.parse("d1"), "float32")
    return ParameterStore({"policy": config}, {"policy": place})


def saved(folder, shape):
    path = {"layers": {"mlp": {"up": {"kernel": np.ones(shape, np.float32)}}}}
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(1, {"policy": {"parameters": path}}, {})


def restored(folder, shape, config):
    leaf = jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    tree = {"policy": {"parameters": {"layers": {"mlp": {"up": {"kernel": leaf}}}}}}
    name = "policy/parameters/layers/mlp/up/kernel"
    real = store_of(config).real_shapes([name])
    with Checkpointer(folder, read_only=True) as checkpointer:
        found = checkpointer.restore(1, tree, real=real)
    return np.asarray(jax.tree.leaves(found)[0])


def test_moments_and_masters_have_their_parameter_s_size():
    names = (
        "policy/parameters/layers/mlp/up/kernel",
        "policy/optimizer/1/mu/embedding",
        "policy/optimizer/1/count",
        "critic/parameters/embedding",
    )
    assert store_of(PADDED).real_shapes(names) == {
        names[0]: (3, None, None),
        names[1]: (67, None),
    }


@pytest.mark.parametrize(("there", "here"), [(3, 4), (4, 3), (4, 8)])
def test_padding_is_added_and_cut_when_restoring(tmp_path, there, here):
    saved(tmp_path, (there, 32, 64))
    found = restored(tmp_path, (here, 32, 64), MODEL)
    assert found.shape == (here, 32, 64)
    np.testing.assert_array_equal(found[:3], 1)
    np.testing.assert_array_equal(found[there:], 0)


@pytest.mark.parametrize("shape", [(2, 32, 64), (4, 32, 63), (4, 33, 64)])
def test_another_model_s_arrays_are_no_padding(tmp_path, shape):
    saved(tmp_path, shape)
    with pytest.raises(MismatchedCheckpointError, match="kernel is float32"):
        restored(tmp_path, (4, 32, 64), MODEL)


@pytest.mark.slow
def test_a_run_goes_on_over_stages_with_an_odd_vocabulary(tmp_path):
    write_data(tmp_path)
    config = sft_config(tmp_path, steps=2)
    model = dict(config.roles["policy"].model, num_layers=3)
    role = dataclasses.replace(config.roles["policy"], model=model)
    checkpoint = dataclasses.replace(config.checkpoint, every_steps=1)
    config = dataclasses.replace(config, roles={"policy": role}, checkpoint=checkpoint)
    train(config, tmp_path / "run")
    before = saved_arrays(tmp_path / "run", 2)
    longer = dataclasses.replace(config, steps=4, allocation="s2f2t2@0-7")
    _, text = train(longer, tmp_path / "run")
    assert "resumed from the checkpoint of step 2" in text
    after = saved_arrays(tmp_path / "run", 4)
    name = "policy/parameters/layers/mlp/up/kernel"
    assert (before[name].shape[0], after[name].shape[0]) == (3, 4)
    assert not after[name][3].any()
