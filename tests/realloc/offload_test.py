"""Offload: the same arrays in pinned host memory, and the device bytes given back."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from realjax.parallel import Allocation, make_mesh
from realjax.realloc import is_on_host, live_bytes, to_device, to_host
from realjax.realloc.offload import HostCopy, moved_in_program
from tests.processes.launch import launch
from tests.realloc import offload_processes

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


def test_an_array_whose_sharding_is_in_host_memory_stays_there():
    tree = tree_on("f4")
    host = to_host(tree)
    shardings = {key: leaf.sharding for key, leaf in tree.items()}
    shardings["cut"] = host["cut"].sharding
    found = to_device(host, shardings)
    assert found["cut"] is host["cut"]
    assert not is_on_host(found["whole"]) and not is_on_host(found["step"])
    jax.tree.map(np.testing.assert_array_equal, found, tree)


def test_a_changed_layout_is_refused_on_the_way_back():
    tree = tree_on("f4")
    shardings = {key: leaf.sharding for key, leaf in tree.items()}
    shardings["cut"] = shardings["whole"]
    with pytest.raises(ValueError, match="offloading changes the kind of memory alone"):
        to_device(to_host(tree), shardings)


def test_a_host_copy_is_made_once_and_comes_back_as_often_as_needed():
    gc.collect()
    empty = live_bytes("pinned_host")
    tree = tree_on("f4")
    copy = HostCopy(tree)
    made = jax.block_until_ready(copy.tree)
    size = live_bytes("pinned_host") - empty
    # On 4 devices: a quarter of 512 bytes each, 256 bytes each, 4 bytes each.
    assert size == 4 * (512 // 4 + 256 + 4)
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    for _ in range(3):
        back = copy.reload()
        jax.tree.map(np.testing.assert_array_equal, back, tree)
        jax.block_until_ready(overwrite(back["cut"]))
    del back
    gc.collect()
    assert live_bytes("pinned_host") - empty == size
    assert all(copy.tree[key] is made[key] for key in made)


def test_a_host_copy_leaves_on_the_host_what_was_there_before():
    tree = tree_on("d2f2")
    tree["whole"] = to_host(tree["whole"])
    copy = HostCopy(tree)
    back = copy.reload()
    assert is_on_host(copy.tree)
    assert back["whole"] is tree["whole"]
    assert not is_on_host(back["cut"]) and not is_on_host(back["step"])


def test_reloading_needs_nothing_but_the_destination():
    host = jax.block_until_ready(to_host(tree_on("f4")))
    gc.collect()
    empty = live_bytes()
    back = to_device(host)
    assert live_bytes() - empty == 4 * (512 // 4 + 256 + 4)
    jax.block_until_ready(back)


def test_programs_move_arrays_to_the_host_and_back():
    tree = tree_on("d2f2")
    to_memory = jax.jit(moved_in_program, static_argnums=1)
    host = to_memory(tree, "pinned_host")
    assert is_on_host(host)
    back = to_memory(host, "device")
    assert not any(is_on_host(leaf) for leaf in back.values())
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.slow
def test_arrays_of_other_processes_are_handles_in_both_kinds_of_memory():
    found = launch(offload_processes.offload_and_reload, num_processes=2)
    # Shards on the host and back on the devices, of two devices of the second process.
    assert found == [[0, 0], [2, 2]]
