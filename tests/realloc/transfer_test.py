"""Reallocation: the same bits elsewhere, device to device, sharing nothing."""

import gc
import logging
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realjax.models.config import ModelConfig
from realjax.models.transformer import abstract_parameters
from realjax.parallel import Allocation, make_mesh, parameter_shardings, rows_sharding
from realjax.realloc import (
    Traffic,
    live_bytes,
    move_array,
    move_batch,
    reallocate,
    to_host,
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


def no_host():
    """Raises on any copy from the host, also on those that ask for it."""
    return jax.transfer_guard_host_to_device("disallow_explicit")


def on(text, values, *axes):
    """Puts values on the mesh of an allocation, their dimensions cut over `axes`."""
    mesh = make_mesh(Allocation.parse(text))
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*axes)))


def sharding(text, *axes):
    mesh = make_mesh(Allocation.parse(text))
    return NamedSharding(mesh, PartitionSpec(*axes))


def parameters_on(text):
    rng = np.random.default_rng(0)
    abstract = abstract_parameters(CONFIG)
    return jax.tree.map(
        lambda leaf, where: jax.device_put(
            rng.standard_normal(leaf.shape, np.float32), where
        ),
        abstract,
        parameter_shardings(abstract, make_mesh(Allocation.parse(text))),
        is_leaf=lambda node: hasattr(node, "axes"),
    )


def parameter_places(text):
    mesh = make_mesh(Allocation.parse(text))
    return parameter_shardings(abstract_parameters(CONFIG), mesh)


def buffers(tree):
    return {
        (shard.device.id, shard.data.unsafe_buffer_pointer())
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    }


def least_bytes(array, destination):
    """What devices need and do not have, counted element by element."""
    source = array.sharding.devices_indices_map(array.shape)
    least = 0
    for device, wanted in destination.devices_indices_map(array.shape).items():
        need, have = np.zeros(array.shape, bool), np.zeros(array.shape, bool)
        need[wanted] = True
        if device in source:
            have[source[device]] = True
        least += int((need & ~have).sum()) * array.dtype.itemsize
    return least


def random_sharding(rng, ndim):
    count = rng.choice([1, 2, 4, 8])
    rows = rng.choice([n for n in (1, 2, 4, 8) if count % n == 0])
    devices = np.array(jax.devices())[rng.sample(range(8), count)]
    mesh = Mesh(devices.reshape(rows, count // rows), ("a", "b"))
    axes = rng.choice([[], ["a"], ["b"], ["a", "b"], [("b", "a")], [("a", "b")]])
    spec = [None] * ndim
    axes = axes[:ndim]
    for axis, dimension in zip(axes, rng.sample(range(ndim), len(axes)), strict=True):
        spec[dimension] = axis
    return NamedSharding(mesh, PartitionSpec(*spec))


def check_random_reallocation(seed):
    rng, values = random.Random(seed), np.random.default_rng(seed)
    wanted = {
        "matrix": values.standard_normal((16, 8)).astype(np.float32),
        "layers": values.standard_normal((8, 8, 16)).astype(jnp.bfloat16),
        "tokens": values.integers(0, 99, (8, 24), np.int32),
        "mask": values.integers(0, 2, (16,)).astype(bool),
        "step": np.float32(seed),
    }
    tree = {
        key: jax.device_put(value, random_sharding(rng, np.ndim(value)))
        for key, value in wanted.items()
    }
    places = {key: random_sharding(rng, value.ndim) for key, value in tree.items()}
    least = {key: least_bytes(tree[key], places[key]) for key in tree}
    traffic = Traffic()
    with no_host():
        moved = reallocate(
            tree, places, traffic=traffic, chunk_bytes=rng.choice([1, 1 << 30])
        )
    assert traffic.sent_bytes + traffic.collective_bytes == sum(least.values())
    assert sum(traffic.leaves.values()) == len(tree)
    assert not buffers(tree) & buffers(moved)
    for leaf in tree.values():
        leaf.delete()
    for key, leaf in moved.items():
        assert leaf.sharding == places[key] and leaf.dtype == wanted[key].dtype
        np.testing.assert_array_equal(leaf, wanted[key])


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts_arrive_bit_for_bit(seed):
    check_random_reallocation(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 212))
def test_random_layouts_arrive_bit_for_bit_in_full(seed):
    check_random_reallocation(seed)


@pytest.mark.parametrize(
    "source, destination",
    [
        ("d2f2t2", "t4@4-7"),  # kv heads become replicated, and cut again
        ("f4@0-3", "t2@6-7"),
        ("d2f2t2", "t8"),
    ],
)
def test_a_model_goes_and_comes_back(source, destination):
    parameters = parameters_on(source)
    with no_host():
        there = reallocate(parameters, parameter_places(destination))
        back = reallocate(there, parameter_places(source))
    keys = there["layers"]["attention"]["key"]["kernel"]
    assert keys.is_fully_replicated == (destination != "t2@6-7")
    jax.tree.map(np.testing.assert_array_equal, there, parameters)
    jax.tree.map(np.testing.assert_array_equal, back, parameters)
    places = parameter_places(source)
    assert jax.tree.map(lambda leaf: leaf.sharding, back) == places


def test_the_guard_sees_what_a_plain_device_put_does():
    # Why none of this is one device_put: two parts to four go through the host.
    x = on("t2@0-1", np.ones((8, 8), np.float32), "tensor")
    with no_host(), pytest.raises(jax.errors.JaxRuntimeError, match="host-to-device"):
        jax.device_put(x, sharding("t4@0-3", "tensor"))


@pytest.mark.parametrize(
    "source, destination",
    [
        (("d4@0-3",), ("d8@0-7",)),  # superset: whole shards stay on 0-3
        (("d8@0-7",), ("d4@4-7",)),  # subset
        (("t4@0-3", "tensor"), ("t4@0-3", "tensor")),  # equal layouts
        (("d8@0-7",), ("f8@0-7", "fsdp")),  # slices in place
        (("f2@0-1", "fsdp"), ("f2@2-3", "fsdp")),  # native copies
    ],
)
def test_a_donated_source_leaves_its_copy_alive(source, destination):
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    x = on(source[0], values, *source[1:])
    with no_host():
        y = reallocate(x, sharding(destination[0], *destination[1:]))
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    jax.block_until_ready(overwrite(x))
    assert x.is_deleted()
    np.testing.assert_array_equal(y, values)


@pytest.mark.parametrize(
    "source, destination, kind",
    [
        (("f4@0-3", "fsdp"), ("t2@2-3", None, "tensor"), "slice"),
        (("t2@0-1", "tensor"), ("t4@0-3", "tensor"), "slice"),
        (("d2f2t2", "fsdp", "tensor"), ("t8", None, "tensor"), "slice"),
        (("f4@0-3", "fsdp"), ("f4@4-7", "fsdp"), "put"),
    ],
)
def test_sent_bytes_are_the_bytes_that_were_not_there(source, destination, kind):
    x = on(source[0], np.ones((8, 16), np.float32), *source[1:])
    place, traffic = sharding(destination[0], *destination[1:]), Traffic()
    reallocate({"x": x}, {"x": place}, traffic=traffic)
    assert traffic.sent_bytes == least_bytes(x, place)
    assert traffic.leaves[kind] == 1 and traffic.bytes[kind] == x.nbytes
    assert traffic.collective_bytes == 0


def test_collectives_are_counted_apart_from_what_is_sent():
    x, place = (
        on("f8", np.ones((8, 8), np.float32), "fsdp"),
        sharding("t8", None, "tensor"),
    )
    traffic = Traffic()
    reallocate(x, place, traffic=traffic)
    # Each of 8 devices keeps 1/8 of its eighth: 7/8 of the array crosses.
    assert traffic.collective_bytes == least_bytes(x, place) == 8 * 8 * 4 * 7 // 8
    assert traffic.sent_bytes == 0 and traffic.leaves["jit"] == 1


def test_equal_layouts_cost_nothing_when_sharing_is_allowed():
    parameters, traffic = parameters_on("d2f2t2"), Traffic()
    same = reallocate(
        parameters, parameter_places("d2f2t2"), traffic=traffic, alias=True
    )
    assert all(
        new is old
        for new, old in zip(
            jax.tree.leaves(same), jax.tree.leaves(parameters), strict=True
        )
    )
    assert traffic.sent_bytes == traffic.collective_bytes == 0
    assert traffic.leaves["none"] == len(jax.tree.leaves(parameters))


def test_a_shared_array_carries_the_sharding_that_was_asked_for():
    x = on("f4", np.arange(8), "fsdp")
    place = sharding("d2f2", ("data", "fsdp"))
    with no_host():
        y = reallocate(x, place, alias=True)
    assert y.sharding == place and buffers(y) == buffers(x)
    np.testing.assert_array_equal(y, x)


def test_shards_that_stay_are_shared_when_that_is_allowed():
    x = on("t4@0-3", np.arange(64, dtype=np.float32).reshape(4, 16), None, "tensor")
    place = sharding("d2t4", None, "tensor")
    with no_host():
        copied, shared = reallocate(x, place), reallocate(x, place, alias=True)
    assert not buffers(x) & buffers(copied)
    assert buffers(x) < buffers(shared)
    np.testing.assert_array_equal(shared, x)
    # A cast is a copy, whatever is allowed.
    cast = reallocate(x, place, dtype=jnp.bfloat16, alias=True)
    assert not buffers(x) & buffers(cast)


def test_a_repeated_reallocation_compiles_nothing(caplog):
    places = parameter_places("d2t2@2-5"), parameter_places("f2t4")

    def there_and_back():
        moved = reallocate(parameters_on("f2t4"), places[0], dtype=jnp.bfloat16)
        return reallocate(moved, places[1])

    def num_compiled():
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
            there_and_back()
        return sum("Compiling" in record.getMessage() for record in caplog.records)

    assert num_compiled() > 0
    assert num_compiled() == 0


@pytest.mark.parametrize(
    "source, destination",
    [
        ("f4@0-3", "t2@4-5"),  # slice
        ("f4@0-3", "f4@4-7"),  # put
        ("f8", "t8"),  # jit
        ("f8", "f8"),  # none
        ("d2t2@0-3", "t2@1-2"),  # slice, with parts that stay on their device
    ],
)
def test_types_change_as_astype_does_wherever_it_happens(source, destination):
    parameters, narrow = parameters_on(source), Traffic()
    with no_host():
        small = reallocate(
            parameters,
            parameter_places(destination),
            dtype=jnp.bfloat16,
            traffic=narrow,
        )
        large = reallocate(small, parameter_places(source), dtype=jnp.float32)
    expected = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), parameters)
    jax.tree.map(np.testing.assert_array_equal, small, expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(np.float32)),
        large,
        expected,
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(large)} == {"float32"}


@pytest.mark.parametrize("destination", ["t2@4-5", "f4@4-7"])
def test_narrowed_arrays_travel_narrow_and_widened_ones_before(destination):
    parameters, places = parameters_on("f4@0-3"), parameter_places(destination)
    plain, narrowed, widened = Traffic(), Traffic(), Traffic()
    reallocate(parameters, places, traffic=plain)
    half = reallocate(parameters, places, dtype=jnp.bfloat16, traffic=narrowed)
    reallocate(half, parameter_places("f4@0-3"), dtype=jnp.float32, traffic=widened)
    assert narrowed.sent_bytes * 2 == plain.sent_bytes
    assert sum(widened.bytes.values()) * 2 == sum(plain.bytes.values())


def test_only_floating_arrays_are_cast():
    tree = {"step": on("d2", np.arange(4)), "scale": on("d2", np.ones(4, np.float32))}
    moved = reallocate(tree, sharding("d2@2-3"), dtype=jnp.bfloat16)
    assert moved["step"].dtype == jnp.int32 and moved["scale"].dtype == jnp.bfloat16


def test_chunks_change_nothing_but_the_memory():
    parameters, places = parameters_on("f4@0-3"), parameter_places("d2t2@2-5")
    together, apart = Traffic(), Traffic()
    whole = reallocate(parameters, places, traffic=together)
    parts = reallocate(parameters, places, traffic=apart, chunk_bytes=8192)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert together == apart


def test_nothing_but_the_result_stays_alive():
    parameters = parameters_on("f4@0-3")
    gc.collect()
    before = live_bytes()
    moved = jax.block_until_ready(reallocate(parameters, parameter_places("d2t2@2-5")))
    gc.collect()
    result = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(moved)
        for shard in leaf.addressable_shards
    )
    assert live_bytes() == before + result


def test_one_sharding_serves_a_branch():
    tree = {
        "a": [on("d2", np.arange(4)), on("d2", np.arange(2))],
        "b": on("d2", np.ones(2)),
    }
    place, other = sharding("d2@4-5"), sharding("d4@0-3")
    moved = reallocate(tree, {"a": place, "b": other})
    assert [leaf.sharding for leaf in moved["a"]] == [place, place]
    assert moved["b"].sharding == other


def test_single_device_arrays_and_empty_ones_move_too():
    tree = {
        "one": jnp.arange(8.0),
        "none": on("t2@0-1", np.zeros((0, 4)), None, "tensor"),
    }
    places = {
        "one": sharding("f4@4-7", "fsdp"),
        "none": sharding("t4@4-7", None, "tensor"),
    }
    with no_host():
        moved = reallocate(tree, places)
    np.testing.assert_array_equal(moved["one"], np.arange(8.0))
    assert moved["none"].shape == (0, 4) and moved["none"].sharding == places["none"]


def test_what_cannot_be_reallocated_is_named():
    place = sharding("d2")
    x = on("d2", np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match=r"Array \['w'\] is a ndarray.*move_array"):
        reallocate({"w": np.ones(2)}, place)
    with pytest.raises(ValueError, match="shardings do not match the arrays"):
        reallocate({"w": x}, {"v": place})
    with pytest.raises(ValueError, match=r"memory kind 'pinned_host'.*to_device"):
        reallocate({"w": to_host(x)}, place)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) does not divide into 8×1"):
        reallocate({"w": x}, sharding("t8", "tensor"))
    x.delete()
    with pytest.raises(ValueError, match=r"Array \['w'\] was donated or deleted"):
        reallocate({"w": x}, place)


def test_a_batch_goes_key_by_key():
    arrays = {
        "tokens": on("d4@0-3", np.arange(32, dtype=np.int32).reshape(8, 4), "data"),
        "logprobs": on("d4@0-3", np.ones((8, 4), np.float32), "data"),
        "scores": np.arange(8, dtype=np.float32),
        "values": None,
    }
    mesh, traffic = make_mesh(Allocation.parse("f2t2@4-7")), Traffic()
    moved = move_batch(arrays, lambda x: rows_sharding(mesh, len(x)), traffic=traffic)
    assert list(moved) == list(arrays) and moved["values"] is None
    for key in ("tokens", "logprobs", "scores"):
        assert moved[key].sharding == rows_sharding(mesh, 8)
        np.testing.assert_array_equal(moved[key], arrays[key])
    # Two arrays of 128 bytes, each half to two devices; 32 bytes from the host.
    assert traffic.sent_bytes == 2 * 2 * 8 * 4 * 4
    assert traffic.uploaded_bytes == 8 * 4
    assert traffic.leaves["slice"] == 2


def test_a_batch_needs_a_sharding_for_every_key():
    with pytest.raises(ValueError, match=r"No sharding for \['scores'\]"):
        move_batch({"scores": np.ones(2)}, {"tokens": sharding("d2")})


@pytest.mark.parametrize("offset", [0, 4])
def test_an_uploaded_array_does_not_see_later_writes(offset):
    # Where a buffer begins decides whether JAX would use it as it is.
    memory = np.empty(4096 + 128, np.uint8)
    first = -memory.ctypes.data % 64 + offset
    values = memory[first : first + 4096].view(np.float32)
    values[:] = np.arange(1024)
    moved = move_array(values, sharding("d1@0"))
    values[:] = -1
    np.testing.assert_array_equal(moved, np.arange(1024))


def test_traffic_adds_up_and_names_its_metrics():
    x, total = on("f2@0-1", np.ones((4, 4), np.float32), "fsdp"), Traffic()
    for destination in ("f2@2-3", "d2@2-3"):
        step = Traffic()
        axes = ("fsdp",) if destination.startswith("f") else ()
        move_array(x, sharding(destination, *axes), traffic=step)
        total.merge(step)
    metrics = total.as_dict()
    assert metrics["realloc/leaves_put"] == metrics["realloc/leaves_slice"] == 1
    # put: 64 bytes in all; slice: 64 bytes to each of two devices.
    assert metrics["realloc/sent_bytes"] == 64 + 2 * 64
    assert metrics["realloc/bytes_put"] == metrics["realloc/bytes_slice"] == 64
    assert math.isclose(sum(metrics.values()), 1 + 1 + 64 + 64 + 192)
