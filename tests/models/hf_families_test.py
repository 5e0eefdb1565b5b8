"""Checkpoints of every family: padding, experts, fused tensors, chunks, prefixes."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from realjax.models import gathering, hf, layout, streaming
from realjax.models.families import llama
from realjax.models.parameters import abstract_parameters
from realjax.models.tensor_checks import is_parameter
from realjax.models.tensor_files import SINGLE_FILE
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings
from tests import tiny_families

# In a config.json GPT-2 has no head width, and Gemma the inverse square of the scale.
CHANGES = {
    "gpt2": {"head_dim": 4},
    "gemma2": {"attention_scale": 0.25},
    "gemma3": {"attention_scale": 0.25},
}
FAMILIES = {
    name: dataclasses.replace(config, **CHANGES.get(name, {}))
    for name, config in tiny_families.FAMILIES.items()
}


def draw(config):
    """Parameters by numpy, with zeros where there is padding."""
    generator = np.random.default_rng(0)

    def leaf(parameter):
        real = generator.normal(size=parameter.real_shape).astype(np.float32)
        sizes = zip(parameter.shape, parameter.real_shape, strict=True)
        return jnp.asarray(np.pad(real, [(0, n - m) for n, m in sizes]))

    abstract = abstract_parameters(config)
    return jax.tree.map(leaf, abstract, is_leaf=is_parameter)


def assert_equal_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def shardings(config, allocation):
    mesh = make_mesh(Allocation.parse(allocation))
    return parameter_shardings(abstract_parameters(config), mesh)


def padded(config):
    return dataclasses.replace(config, vocab_multiple=8, layer_multiple=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_of_a_family_loads_with_and_without_padding(name, tmp_path):
    config = FAMILIES[name]
    hf.save(tmp_path / "m", config, draw(config))
    assert_equal_trees(hf.load(tmp_path / "m"), draw(config))
    wide = padded(config)
    assert_equal_trees(hf.load(tmp_path / "m", config=wide), draw(wide))
    hf.save(tmp_path / "padded", wide, draw(wide))
    plain, unpadded = (
        load_file(tmp_path / folder / SINGLE_FILE) for folder in ("m", "padded")
    )
    assert_equal_trees(unpadded, plain)


@pytest.fixture
def small_chunks(monkeypatch):
    """Everything is streamed in pieces and gathered from devices."""
    stream, sizes = streaming.stream, []

    def in_chunks(reader, sharding):
        sizes.append(reader.shape)
        return stream(reader, sharding, chunk_bytes=2000)

    monkeypatch.setattr(hf, "stream", in_chunks)
    monkeypatch.setattr(gathering, "SMALL_BYTES", 0)
    return sizes


SAMPLE = [("gpt2", "f2t2"), ("mixtral", "e2t2"), ("llama", "s2f2")]
REST = [(name, allocation) for name in FAMILIES for allocation in ("f8", "s2f2t2")]


@pytest.mark.parametrize(
    ("name", "allocation"),
    [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_pieces_of_a_model_on_any_mesh_are_the_model(
    name, allocation, tmp_path, small_chunks
):
    config = padded(FAMILIES[name])
    hf.save(tmp_path / "m", config, jax.tree.map(np.asarray, draw(config)))
    wanted = shardings(config, allocation)
    loaded = hf.load(tmp_path / "m", config=config, shardings=wanted)
    assert len(small_chunks) > 10
    assert jax.tree.map(lambda x: x.sharding, loaded) == wanted
    assert_equal_trees(loaded, draw(config))
    hf.save(tmp_path / "again", config, loaded, dtype=jnp.bfloat16)
    stored, again = (load_file(tmp_path / n / SINGLE_FILE) for n in ("m", "again"))
    for tensor, array in stored.items():
        np.testing.assert_array_equal(again[tensor], array.astype(jnp.bfloat16))


def test_the_fused_projection_of_gpt2_is_query_key_value_side_by_side(tmp_path):
    config, parameters = FAMILIES["gpt2"], draw(FAMILIES["gpt2"])
    hf.save(tmp_path / "m", config, parameters)
    name = "transformer.h.2.attn.c_attn.weight"
    stored = load_file(tmp_path / "m" / SINGLE_FILE)[name]
    kernels = [
        np.asarray(parameters["layers"]["attention"][part]["kernel"][2])
        for part in ("query", "key", "value")
    ]
    expected = np.concatenate([kernel.reshape(32, 32) for kernel in kernels], axis=1)
    np.testing.assert_array_equal(stored, expected)


def test_a_padded_vocabulary_is_cut_where_it_is_stored(tmp_path):
    config = padded(FAMILIES["llama"])
    hf.save(tmp_path / "m", config, draw(config))
    stored = load_file(tmp_path / "m" / SINGLE_FILE)
    assert stored["lm_head.weight"].shape == (61, 32)
    assert stored["model.embed_tokens.weight"].shape == (61, 32)
    assert not [name for name in stored if "layers.3." in name]


def test_names_without_the_first_part_are_understood(tmp_path):
    config = FAMILIES["gpt2"]
    hf.save(tmp_path / "m", config, draw(config))
    stored = load_file(tmp_path / "m" / SINGLE_FILE)
    bare = {name.removeprefix("transformer."): array for name, array in stored.items()}
    assert "h.0.ln_1.weight" in bare
    # As published: with the causal masks.
    bare["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.uint8)
    save_file(bare, tmp_path / "m" / SINGLE_FILE)
    assert_equal_trees(hf.load(tmp_path / "m"), draw(config))
    bare["h.0.surprise"] = np.ones(2, np.float32)
    save_file(bare, tmp_path / "m" / SINGLE_FILE)
    with pytest.raises(ValueError, match=r"holds 1 tensors .*'transformer.h.0.surpr"):
        hf.load(tmp_path / "m")


def test_a_missing_expert_is_named(tmp_path):
    config = FAMILIES["qwen3_moe"]
    hf.save(tmp_path / "m", config, draw(config))
    stored = load_file(tmp_path / "m" / SINGLE_FILE)
    del stored["model.layers.2.mlp.experts.7.up_proj.weight"]
    save_file(stored, tmp_path / "m" / SINGLE_FILE)
    with pytest.raises(ValueError, match=r"lacks 1 of .*layers.2.mlp.experts.7.up"):
        hf.check(tmp_path / "m")


@pytest.mark.parametrize("role", ("critic", None))
def test_a_checkpoint_says_what_it_was_trained_to_be(role, tmp_path):
    config = dataclasses.replace(FAMILIES["llama"], head="scalar")
    hf.save(tmp_path / "m", config, draw(config), role=role)
    assert hf.read_role(tmp_path / "m") == role
    assert hf.read_config(tmp_path / "m") == config
    assert_equal_trees(hf.load(tmp_path / "m"), draw(config))


def test_a_family_of_ones_own_is_saved_and_loaded(tmp_path, monkeypatch):
    own = types.ModuleType("somebodys.family")
    own.IGNORED_TENSORS, own.size = (), llama.size
    own.stored_tensors = llama.stored_tensors
    own.write_config = lambda config: (
        llama.write_config(dataclasses.replace(config, family="llama"))
        | {"model_type": "own"}
    )
    own.read_config = lambda fields: dataclasses.replace(
        llama.read_config({**fields, "model_type": "llama"}), family=own.__name__
    )
    monkeypatch.setitem(sys.modules, "somebodys", types.ModuleType("somebodys"))
    monkeypatch.setitem(sys.modules, own.__name__, own)
    config = dataclasses.replace(FAMILIES["llama"], family=own.__name__)
    hf.save(tmp_path / "m", config, draw(config))
    assert hf.read_config(tmp_path / "m", family=own) == config
    assert_equal_trees(hf.load(tmp_path / "m", config=config), draw(config))
    with pytest.raises(ValueError, match="Models of type 'own' are not supported"):
        hf.load(tmp_path / "m")


def test_items_come_from_shards_without_a_copy_of_the_whole(monkeypatch):
    monkeypatch.setattr(gathering, "SMALL_BYTES", 0)
    array = np.arange(96, dtype=np.float32).reshape(4, 6, 4)
    wanted = NamedSharding(
        make_mesh(Allocation.parse("f2t2")), jax.P(None, "fsdp", "tensor")
    )
    sharded = jax.make_array_from_callback(array.shape, wanted, array.__getitem__)
    tensor = layout.Stored("x.{layer}", ((1,), (0,)))
    sources = gathering.stored_sources([(tensor, sharded, (3, 5, 4))])
    assert list(sources) == ["x.0", "x.1", "x.2"]
    found = gathering.gather(sources["x.1"], np.dtype("float32"))
    np.testing.assert_array_equal(found, array[1, :5].T)
    assert gathering.gather(sources["x.1"], array.dtype, is_wanted=False) is None
    # Had the array been copied to the host, it would have kept the copy.
    assert sharded._npy_value is None
