"""Offload: the same arrays in pinned host memory, and the device bytes given back."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from realjax.parallel import Allocation, make_mesh
from realjax.realloc import is_on_host, live_bytes, to_device, to_host

VALUES = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)


def tree_on(text):
    mesh = make_mesh(Allocation.parse(text))
    return {
        "cut": jax.device_put(VALUES, NamedSharding(mesh, PartitionSpec("fsdp"))),
        "whole": jax.device_put(
            VALUES.astype(jnp.bfloat16), NamedSharding(mesh, PartitionSpec())
        ),
        "step": jax.device_put(np.int32(7), NamedSharding(mesh, PartitionSpec())),
    }


@pytest.mark.parametrize("text", ["d1@3", "d2f2t2", "f4@4-7"])
def test_arrays_come_back_as_they_were(text):
    tree = tree_on(text)
    # Neither way passes through ordinary host memory.
    with (
        jax.transfer_guard_device_to_host("disallow_explicit"),
        jax.transfer_guard_host_to_device("disallow_explicit"),
    ):
        host = to_host(tree)
        back = to_device(host)
    assert is_on_host(host) and not is_on_host(tree) and not is_on_host(back)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert all(back[key].sharding == tree[key].sharding for key in tree)
    kinds = {leaf.sharding.memory_kind for leaf in host.values()}
    assert kinds == {"pinned_host"}
    assert host["cut"].sharding.spec == tree["cut"].sharding.spec


def test_dropping_the_source_frees_the_device_and_reloading_fills_it():
    gc.collect()
    empty, empty_host = live_bytes(), live_bytes("pinned_host")
    tree = tree_on("d2f2t2")
    # On 8 devices: half of 512 bytes each, 256 bytes each, 4 bytes each.
    size = 8 * (512 // 2 + 256 + 4)
    assert live_bytes() == empty + size
    host = jax.block_until_ready(to_host(tree))
    assert live_bytes("pinned_host") == empty_host + size
    del tree
    gc.collect()
    assert live_bytes() == empty
    back = jax.block_until_ready(to_device(host))
    assert live_bytes() == empty + size
    np.testing.assert_array_equal(back["cut"], VALUES)


def test_the_host_copy_outlives_a_donated_source():
    tree = tree_on("f4@0-3")
    host = to_host(tree)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    jax.block_until_ready(overwrite(tree["cut"]))
    np.testing.assert_array_equal(host["cut"], VALUES)
    back = to_device(host)
    jax.block_until_ready(overwrite(back["cut"]))
    np.testing.assert_array_equal(host["cut"], VALUES)


def test_what_is_there_already_stays():
    tree = tree_on("d2")
    host = to_host(tree)
    assert to_host(host)["cut"] is host["cut"]
    assert to_device(tree)["cut"] is tree["cut"]


def test_a_tree_partly_offloaded_is_not_on_host():
    tree = tree_on("d2")
    assert not is_on_host({"a": to_host(tree["cut"]), "b": tree["cut"]})


def test_shared_buffers_count_once():
    gc.collect()
    empty = live_bytes()
    x = jax.block_until_ready(tree_on("d1@0")["cut"])
    gc.collect()
    same = jax.make_array_from_single_device_arrays(
        x.shape, x.sharding, [shard.data for shard in x.addressable_shards]
    )
    assert live_bytes() == empty + x.nbytes
    assert same.shape == x.shape
