"""Checkpoint folders: exact round trips, parts, atomic saving, and clear refusals."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from realjax.models import hf
from realjax.models.config import ModelConfig
from realjax.models.tensor_files import INDEX_FILE, SINGLE_FILE, TensorFiles
from realjax.models.transformer import abstract_parameters, init_parameters
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings

CONFIG = ModelConfig(
    vocab_size=18,
    width=8,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=4,
    mlp_width=10,
)
KEY = jax.random.key(0)


def draw(config):
    return jax.jit(init_parameters, static_argnums=0)(config, KEY)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of one file, and what is in it; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "saved"
    parameters = draw(CONFIG)
    hf.save(folder, CONFIG, parameters)
    return folder, parameters


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of it, to be broken."""
    return shutil.copytree(saved[0], tmp_path / "copied")


def assert_equal_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("head", ("language", "scalar"))
@pytest.mark.parametrize("tie_embeddings", (False, True))
@pytest.mark.parametrize("max_shard_bytes", (10**9, 2000))
def test_what_is_saved_loads_exactly(head, tie_embeddings, max_shard_bytes, tmp_path):
    config = dataclasses.replace(CONFIG, head=head, tie_embeddings=tie_embeddings)
    parameters = draw(config)
    hf.save(tmp_path / "m", config, parameters, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "m" / SINGLE_FILE).exists() == (max_shard_bytes > 2000)
    assert (tmp_path / "m" / INDEX_FILE).exists() == (max_shard_bytes == 2000)
    assert hf.read_config(tmp_path / "m") == config
    assert_equal_trees(hf.load(tmp_path / "m"), parameters)


@pytest.mark.parametrize("allocation", ("d8", "f4", "t2", "t4@1-4", "d2f2t2"))
def test_every_device_gets_its_part(saved, allocation):
    config = dataclasses.replace(CONFIG, num_heads=8, num_kv_heads=2, mlp_width=8)
    config, (folder, parameters) = CONFIG, saved
    mesh = make_mesh(Allocation.parse(allocation))
    shardings = jax.tree.map(
        lambda sharding, x: _where_it_divides(sharding, x.shape),
        parameter_shardings(
            jax.tree.map(
                lambda p: p.axes, abstract_parameters(config), is_leaf=_is_parameter
            ),
            mesh,
        ),
        parameters,
    )
    loaded = hf.load(folder, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    assert_equal_trees(loaded, parameters)


def _is_parameter(x):
    return hasattr(x, "axes")


def _where_it_divides(sharding, shape):
    """Keep only the mesh axes that divide a dimension."""
    sizes = sharding.mesh.shape
    names = [n if n is None or d % sizes[n] == 0 else None for n, d in zip(sharding.spec, shape, strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*names))
