"""Adapters: which projections have one, what they compute, how they are stored."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.models import heads, hf, lora, lora_files
from realjax.models.config import PROJECTIONS, Adapters
from realjax.models.parameters import (
    LORA,
    abstract_parameters,
    divide,
    init_parameters,
    join,
    split,
    without_adapters,
)
from realjax.models.projection import reduced
from realjax.testing import tiny_model
from tests.functions.plain import (
    mesh_of,
    parameters_on,
    plain_hidden,
    plain_logits,
    sharp_parameters,
)
from tests.models.hf_families_test import FAMILIES

TINY = tiny_model()
DENSE = [name for name, config in FAMILIES.items() if config.moe is None]
TOKENS = np.random.default_rng(0).integers(2, 61, (2, 12)).astype(np.int32)


def adapted(config=TINY, *targets, **fields):
    fields = {"rank": 4, "alpha": 8.0} | fields
    return lora.with_adapters(config, targets=targets or ("all-linear",), **fields)


def is_leaf(node):
    return hasattr(node, "axes")


# -- which projections have one --------------------------------------------------------


def test_projections_go_by_our_names_and_by_those_of_transformers():
    targets = lambda *names: lora.named_targets(TINY, names)
    assert targets("query", "v_proj") == ("query", "value")
    assert targets("mlp.down_proj", "self_attn.o_proj") == ("output", "down")
    assert targets("all-linear") == PROJECTIONS


def test_one_tensor_for_query_key_and_value_has_one_adapter():
    config = adapted(FAMILIES["gpt2"], "c_attn", "mlp.c_proj")
    assert config.adapters.targets == ("query", "key", "value", "down")
    attention = abstract_parameters(config)["layers"]["attention"]
    assert attention["lora_a"].shape == (3, 32, 4)
    assert "lora_a" not in attention["query"] and "lora_b" in attention["query"]
    assert lora.module_ends(config) == ["c_attn", "mlp.c_proj"]
    with pytest.raises(ValueError, match="Name all three or none"):
        adapted(FAMILIES["gpt2"], "query")


def test_experts_are_refused():
    config = FAMILIES["mixtral"]
    with pytest.raises(ValueError, match=r"experts.*q_proj"):
        adapted(config, "all-linear")
    assert adapted(config, "q_proj").adapters.targets == ("query",)
    experts = Adapters(rank=2, alpha=1.0, targets=("up",))
    with pytest.raises(ValueError, match="experts'"):
        dataclasses.replace(config, adapters=experts)


def test_a_name_that_stands_for_nothing_is_refused():
    with pytest.raises(ValueError, match=r"q_porj.*Did you mean 'q_proj'"):
        adapted(TINY, "q_porj")


@pytest.mark.parametrize("name", DENSE)
def test_sizes_are_counted_from_the_config(name):
    config = adapted(FAMILIES[name])
    adapters, base = divide(abstract_parameters(config), LORA)
    leaves = jax.tree.leaves(adapters, is_leaf=is_leaf)
    sizes = [math.prod(leaf.real_shape) for leaf in leaves]
    assert sum(sizes) == config.num_adapter_parameters
    assert base == abstract_parameters(FAMILIES[name])


def test_what_is_trained_and_the_rest_are_the_whole():
    config = adapted(tiny_model(head="scalar"), "query", base_dtype="bfloat16")
    tree = abstract_parameters(config)
    trained, base = split(tree, config)
    assert set(trained) == {"layers", "score"}
    assert {leaf.dtype for leaf in jax.tree.leaves(trained, is_leaf=is_leaf)} == {""}
    types = {leaf.dtype for leaf in jax.tree.leaves(base, is_leaf=is_leaf)}
    assert types == {"bfloat16"}
    assert join(trained, base) == tree
    assert split(tree, without_adapters(config)) == (tree, {})


# -- what they compute -----------------------------------------------------------------


@pytest.mark.parametrize("scale", ["alpha", "rank_stabilized"])
def test_the_scale_is_alpha_by_the_rank_or_its_root(scale):
    adapters = Adapters(rank=16, alpha=8.0, targets=("up",))
    if scale == "alpha":
        assert adapters.scale == 0.5
    else:
        adapters = dataclasses.replace(adapters, is_rank_stabilized=True)
        assert adapters.scale == 2.0


def test_new_adapters_change_nothing():
    config = adapted()
    key = jax.random.key(3)
    parameters = jax.jit(init_parameters, static_argnums=0)(config, key)
    base = jax.jit(init_parameters, static_argnums=0)(TINY, key)
    found = divide(parameters, LORA)[1]
    jax.tree.map(np.testing.assert_array_equal, found, base)
    first = parameters["layers"]["mlp"]["down"]["lora_a"]
    assert first.shape == (2, 64, 4)
    # Uniform up to 1 / sqrt(64): the standard deviation is that by sqrt(3).
    assert 0.11 < np.abs(first).max() <= 0.125
    np.testing.assert_allclose(np.std(first), 0.125 / 3**0.5, rtol=0.1)
    logits = plain_logits(parameters, config, TOKENS)
    np.testing.assert_array_equal(logits, plain_logits(base, TINY, TOKENS))


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("llama", "gpt2")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in DENSE
    ],
)
def test_merged_logits_are_those_with_adapters(name, tmp_path):
    base = FAMILIES[name]
    config = adapted(base)
    parameters = sharp_parameters(config)
    hf.save(tmp_path / "merged", base, lora.merged(parameters, config))
    merged = hf.load(tmp_path / "merged")
    logits = plain_logits(parameters, config, TOKENS)
    np.testing.assert_allclose(
        plain_logits(merged, hf.read_config(tmp_path / "merged"), TOKENS),
        logits,
        atol=1e-5,
        rtol=0,
    )
    without = plain_logits(divide(parameters, LORA)[1], base, TOKENS)
    assert np.abs(without - logits).max() > 0.01  # The adapters do something.


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    adapters = Adapters(rank=256, alpha=1.0, targets=("up",), dropout=0.25)
    x, eye = jnp.ones((4, 8, 256)), jnp.eye(256)
    keys = jax.random.split(jax.random.key(0), 32).reshape(4, 8)
    found = reduced(x, eye, adapters, jax.random.key_data(keys), "up")
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(np.mean(np.asarray(found) == 0), 0.25, atol=0.02)
    other = reduced(x, eye, adapters, jax.random.key_data(keys), "gate")
    assert 0.2 < np.mean(np.asarray(found) != other) < 0.5
    without = reduced(x, eye, adapters, None, "up")
    np.testing.assert_array_equal(without, x)


def test_a_scalar_head_reads_what_adapters_changed():
    config = adapted(tiny_model(head="scalar"), "down")
    parameters = sharp_parameters(config)
    found = heads.scalars(parameters, plain_hidden(parameters, config, TOKENS))
    assert found.shape == TOKENS.shape


# -- how they are stored ---------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_saved_adapters_come_back_bit_for_bit(name, tmp_path):
    config = adapted(FAMILIES[name], is_rank_stabilized=True)
    parameters = sharp_parameters(config)
    lora_files.save_adapters(tmp_path / "a", config, parameters, base="some/model")
    read = lora_files.read_adapters(tmp_path / "a", FAMILIES[name])
    assert read == config
    trained = split(parameters, config)[0]
    found = lora_files.load_adapters(tmp_path / "a", read)
    jax.tree.map(np.testing.assert_array_equal, found, trained)


def test_adapters_are_saved_from_a_mesh_and_loaded_onto_one(tmp_path):
    config = adapted(tiny_model(head="scalar", vocab_multiple=2), "q_proj", "down")
    parameters = sharp_parameters(config)
    placed = parameters_on("f2t2", config, parameters)
    lora_files.save_adapters(tmp_path / "a", config, placed)
    trained = split(parameters, config)[0]
    shardings = jax.tree.map(lambda x: x.sharding, split(placed, config)[0])
    found = lora_files.load_adapters(tmp_path / "a", config, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, found, trained)
    assert found["score"]["kernel"].sharding.mesh == mesh_of("f2t2")


def test_what_does_not_belong_to_a_model_is_refused(tmp_path):
    config = adapted(TINY, "q_proj")
    lora_files.save_adapters(tmp_path / "a", config, sharp_parameters(config))
    with pytest.raises(ValueError, match="another model"):
        lora_files.read_adapters(tmp_path / "a", FAMILIES["gpt2"])
    wider = lora.with_adapters(
        tiny_model(width=48), rank=4, alpha=8.0, targets=("q_proj",)
    )
    with pytest.raises(ValueError, match=r"has shape \(4, 32\), and \(4, 48\)"):
        lora_files.check_adapters(tmp_path / "a", wider)
    deeper = dataclasses.replace(config, num_layers=3)
    with pytest.raises(ValueError, match="lacks 2 of 6 tensors"):
        lora_files.check_adapters(tmp_path / "a", deeper)
    path = tmp_path / "a" / lora_files.ADAPTER_CONFIG
    path.write_text(path.read_text().replace('"bias": "none"', '"use_dora": true'))
    with pytest.raises(ValueError, match="use_dora is True"):
        lora_files.read_adapters(tmp_path / "a", TINY)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        lora_files.read_adapters(tmp_path, TINY)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    config = adapted(TINY, "q_proj")
    with pytest.raises(FileExistsError, match=r"adapter_config\.json"):
        lora_files.save_adapters(tmp_path, config, sharp_parameters(config))
    with pytest.raises(ValueError, match="no adapters to save"):
        lora_files.save_adapters(tmp_path / "a", TINY, sharp_parameters(TINY))
