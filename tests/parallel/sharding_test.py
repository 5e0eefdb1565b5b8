"""Shardings: parameters and activations really lie in parts."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from realjax.models.config import ModelConfig, MoEConfig
from realjax.models.transformer import abstract_parameters
from realjax.parallel import (
    Allocation,
    bytes_per_device,
    check_fit,
    constrain_for,
    make_mesh,
    padded_for,
    parameter_shardings,
    replicated,
    rows_sharding,
)

CONFIG = ModelConfig(
    vocab_size=64,
    width=16,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=32,
)


class Leaf(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def mesh_of(text):
    return make_mesh(Allocation.parse(text))


def test_every_matrix_is_cut_where_the_table_says():
    tree = parameter_shardings(abstract_parameters(CONFIG), mesh_of("f2t2"))
    attention, mlp = tree["layers"]["attention"], tree["layers"]["mlp"]
    specs = {
        "embedding": tree["embedding"],
        "query": attention["query"]["kernel"],
        "key": attention["key"]["kernel"],
        "output": attention["output"]["kernel"],
        "up": mlp["up"]["kernel"],
        "down": mlp["down"]["kernel"],
        "norm": tree["layers"]["mlp_norm"]["scale"],
        "head": tree["head"]["kernel"],
    }
    assert {name: sharding.spec for name, sharding in specs.items()} == {
        "embedding": PartitionSpec("tensor", "fsdp"),
        "query": PartitionSpec(None, "fsdp", "tensor"),
        "key": PartitionSpec(None, "fsdp", "tensor"),
        "output": PartitionSpec(None, "tensor", None, "fsdp"),
        "up": PartitionSpec(None, "fsdp", "tensor"),
        "down": PartitionSpec(None, ("tensor", "fsdp")),
        "norm": PartitionSpec(),
        "head": PartitionSpec("fsdp", "tensor"),
    }


@pytest.mark.parametrize("text", ["d8", "f8", "t8", "d2f2t2", "f2t4@7,6,5,4,3,2,1,0"])
def test_devices_hold_the_bytes_that_were_promised(text):
    abstract, mesh = abstract_parameters(CONFIG), mesh_of(text)
    leaves = [
        jax.jit(lambda shape=leaf.shape: jnp.zeros(shape), out_shardings=sharding)()
        for leaf, sharding in zip(
            jax.tree.leaves(abstract, is_leaf=lambda node: hasattr(node, "axes")),
            jax.tree.leaves(parameter_shardings(abstract, mesh)),
            strict=True,
        )
    ]
    for device in mesh.devices.flat:
        held = sum(
            shard.data.nbytes
            for leaf in leaves
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert held == bytes_per_device(abstract, mesh)


def test_fsdp_cuts_all_but_the_norms():
    abstract = abstract_parameters(CONFIG)
    # Norms: 2 layers × 2 + 1 scales of 16 floats stay whole on every device.
    norms = 5 * 16 * 4
    whole = bytes_per_device(abstract, mesh_of("d8"))
    assert bytes_per_device(abstract, mesh_of("f8")) == (whole - norms) // 8 + norms


def test_kv_heads_that_tensor_does_not_divide_are_replicated_and_nothing_else():
    abstract = abstract_parameters(CONFIG)  # 8 query heads share 2 kv heads
    attention = parameter_shardings(abstract, mesh_of("t4"))["layers"]["attention"]
    assert attention["key"]["kernel"].is_fully_replicated
    assert attention["value"]["kernel"].is_fully_replicated
    assert attention["query"]["kernel"].shard_shape((2, 16, 8, 4)) == (2, 16, 2, 4)


def test_other_dimensions_that_do_not_divide_are_errors():
    tree = {"head": Leaf((16, 30), ("embed", "vocab"))}
    with pytest.raises(ValueError, match="'vocab' dimension of 30") as error:
        parameter_shardings(tree, mesh_of("t4"))
    assert "['head']" in str(error.value)


def test_a_score_head_is_cut_along_its_width_only():
    tree = {"score": Leaf((16, 1), ("embed", None))}
    assert parameter_shardings(tree, mesh_of("f2t4"))["score"].spec == PartitionSpec(
        "fsdp"
    )


def test_trees_of_bare_axis_names_do():
    tree = {"a": ("vocab", "embed"), "b": [(None, "mlp"), ()]}
    shardings = parameter_shardings(tree, mesh_of("f2t2"))
    assert shardings["a"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["b"][0].spec == PartitionSpec(None, "tensor")
    assert shardings["b"][1].spec == PartitionSpec()


def test_mesh_axes_of_size_one_leave_no_trace_in_the_spec():
    # One layout, one name: programs are compiled once for it.
    tree = {"up": Leaf((2, 16, 32), ("layer", "embed", "mlp"))}
    assert parameter_shardings(tree, mesh_of("d8"))["up"].spec == PartitionSpec()


def test_unknown_axis_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown dimension name 'width'.*vocab"):
        parameter_shardings({"a": Leaf((4,), ("width",))}, mesh_of("d2"))


def test_as_many_axis_names_as_dimensions():
    with pytest.raises(ValueError, match=r"shape \(4, 4\) and 1 axis names"):
        parameter_shardings({"a": Leaf((4, 4), ("embed",))}, mesh_of("d2"))


@pytest.mark.parametrize(
    "text, shape, axes, shard",
    [
        # rows over data × fsdp
        ("d2f2t2", (8, 6, 16), ("batch", "length", "embed_act"), (2, 6, 16)),
        # two rows: data alone divides them
        ("d2f2t2", (2, 6, 16), ("batch", "length", "embed_act"), (1, 6, 16)),
        # one row: replicated
        ("d2f2t2", (1, 6, 16), ("batch", "length", "embed_act"), (1, 6, 16)),
        ("d2t4", (4, 6, 8, 4), ("batch", "length", "heads", "head_dim"), (2, 6, 2, 4)),
        # 2 kv heads over tensor 4: replicated
        (
            "d2t4",
            (3, 4, 2, 6, 4),
            ("layer", "batch", "kv_heads", "slots", "head_dim"),
            (3, 2, 2, 6, 4),
        ),
    ],
)
def test_constrain_drops_the_axes_that_do_not_divide(text, shape, axes, shard):
    constrain = constrain_for(mesh_of(text))
    x = jax.jit(lambda: constrain(jnp.zeros(shape), axes))()
    assert x.sharding.shard_shape(shape) == shard


def test_the_sequence_option_splits_tokens_between_blocks_over_tensor():
    allocation = Allocation.parse("d2t4+sequence")
    constrain = constrain_for(make_mesh(allocation), options=allocation.options)
    hidden = ("batch", "length", "embed_act")
    heads = ("batch", "length", "heads", "head_dim")
    x = jax.jit(lambda: constrain(jnp.zeros((4, 8, 16)), hidden))()
    assert x.sharding.shard_shape(x.shape) == (2, 2, 16)
    step = jax.jit(lambda: constrain(jnp.zeros((4, 1, 16)), hidden))()  # one token
    assert step.sharding.shard_shape(step.shape) == (2, 1, 16)
    y = jax.jit(lambda: constrain(jnp.zeros((4, 8, 8, 4)), heads))()
    assert y.sharding.shard_shape(y.shape) == (2, 8, 2, 4)


def test_constrain_changes_no_number():
    constrain = constrain_for(mesh_of("d2f2t2"))
    x = jnp.arange(4 * 6 * 16.0).reshape(4, 6, 16)
    y = jax.jit(lambda x: constrain(x, ("batch", "length", "embed_act")))(x)
    np.testing.assert_array_equal(x, y)


def test_rows_are_split_where_they_divide_and_replicated_where_not():
    mesh = mesh_of("d2f2t2")
    assert rows_sharding(mesh, 8).shard_shape((8, 3)) == (2, 3)
    assert rows_sharding(mesh, 6).is_fully_replicated
    assert replicated(mesh).shard_shape((8, 3)) == (8, 3)


@pytest.mark.parametrize("text", ["d8", "f8", "t8", "d2f2t2", "t4"])
def test_fitting_allocations_pass(text):
    check_fit(Allocation.parse(text), CONFIG, batch_rows=8)


def test_check_fit_names_all_that_does_not_divide_and_what_would():
    with pytest.raises(ValueError) as error:
        check_fit(Allocation.parse("f3t3@0-8"), CONFIG, batch_rows=4)
    message = str(error.value)
    assert "f3t3@0-8 does not fit" in message
    assert (
        "tensor=3 does not divide num_heads=8 (sizes up to 9 that do: 1, 2, 4, 8)"
        in (message)
    )
    for problem in ("mlp_width=32", "width=16", "microbatch=4"):
        assert problem in message
    # Key and value heads are replicated instead, and the vocabulary is padded.
    assert "num_kv_heads" not in message
    assert "vocab_size" not in message


def test_experts_are_split_only_where_a_model_has_them():
    with pytest.raises(ValueError, match=r"splits experts over 2 parts.* has none"):
        check_fit(Allocation.parse("e2"), CONFIG)
    mixture = dataclasses.replace(CONFIG, moe=MoEConfig(num_experts=6, top_k=2))
    check_fit(Allocation.parse("e2"), mixture)
    with pytest.raises(ValueError, match="expert=4 does not divide num_experts=6"):
        check_fit(Allocation.parse("e4"), mixture)


def test_one_padding_serves_all_calls_of_a_role():
    # Vocabulary over 6 parts (3 stages x 2) and over 4; layers over 3 stages.
    allocations = [Allocation.parse(text) for text in ("s3t2", "t4", "d8")]
    padded = padded_for(CONFIG, allocations)
    assert (padded.vocab_size, padded.padded_vocab_size) == (64, 72)
    assert (padded.num_layers, padded.padded_num_layers) == (2, 3)
    assert padded_for(CONFIG, allocations[1:]).padded_vocab_size == 64


def test_zero1_cuts_no_parameter_over_fsdp():
    abstract, mesh = abstract_parameters(CONFIG), mesh_of("f4t2")
    options = frozenset({"zero1"})
    whole = bytes_per_device(abstract, mesh_of("d4t2"))
    assert bytes_per_device(abstract, mesh, options=options) == whole
