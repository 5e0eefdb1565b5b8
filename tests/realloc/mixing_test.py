"""The mixing weight: averages of parameters that lie elsewhere."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from realjax.models.transformer import abstract_parameters
from realjax.parallel import Allocation, make_mesh
from realjax.parallel.sharding import padded_for, parameter_shardings
from realjax.realloc import Traffic, mix
from realjax.testing import tiny_model


def sharding(text, *axes):
    return NamedSharding(make_mesh(Allocation.parse(text)), PartitionSpec(*axes))


def on(place, values):
    return jax.device_put(np.asarray(values), place)


ROUTES = {
    "none": (sharding("f4@0-3", "fsdp"), sharding("f4@0-3", "fsdp")),
    "jit": (sharding("f4@0-3", "fsdp"), sharding("t4@0-3", None, "tensor")),
    "put": (sharding("f4@0-3", "fsdp"), sharding("f4@4-7", "fsdp")),
    "slice": (sharding("f4@0-3", "fsdp"), sharding("t2@2-3", None, "tensor")),
    "to one device": (sharding("f4@0-3", "fsdp"), sharding("d1@5")),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_mixing_is_the_average_in_float32_on_every_route(route, donate, chunk_bytes):
    rng = np.random.default_rng(0)
    old = rng.standard_normal((8, 16)).astype(jnp.bfloat16)
    new = rng.standard_normal((8, 16)).astype(np.float32)
    here, there = ROUTES[route]
    source, target, traffic = {"w": on(here, old)}, {"w": on(there, new)}, Traffic()
    jax.block_until_ready((source, target))
    eta = jnp.float32(0.25) if chunk_bytes else 0.25
    if chunk_bytes is None:  # A number is four bytes a device, an array is nothing.
        mix(source, {"w": on(there, new)}, eta=eta)
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        mixed = mix(
            source,
            target,
            eta=eta,
            donate=donate,
            traffic=traffic,
            chunk_bytes=chunk_bytes,
        )["w"]
    assert mixed.dtype == jnp.float32 and mixed.sharding == there
    np.testing.assert_allclose(
        mixed, 0.25 * old.astype(np.float32) + 0.75 * new, rtol=1e-6
    )
    assert target["w"].is_deleted() == donate and not source["w"].is_deleted()
    np.testing.assert_array_equal(source["w"], old)
    if not donate:
        np.testing.assert_array_equal(target["w"], new)
    # What travels is the bfloat16 of the source.
    assert sum(traffic.bytes.values()) == old.nbytes


@pytest.mark.parametrize("route", ["jit", "slice"])
def test_small_steps_close_the_gap_for_sources_in_bfloat16(route):
    # From 0 to 1 by eta = 1e-3: after 2000 steps, 1 - 0.999^2000 = 0.8648 of the way.
    here, there = ROUTES[route]
    source = on(here, np.ones((8, 4), jnp.bfloat16))
    average = on(there, np.zeros((8, 4), np.float32))
    for step in range(2000):
        average = mix(source, average, eta=1e-3, donate=True)
        if step % 100 == 0:
            jax.block_until_ready(average)
    np.testing.assert_allclose(average, 1 - 0.999**2000, rtol=1e-4)


def test_an_average_in_bfloat16_stands_still():
    # Between 1 and 2, bfloat16 steps by 2^-7: 1 + 1e-3 (2 - 1) is 1 again.
    here, there = ROUTES["slice"]
    source = on(here, np.full((8, 4), 2, jnp.bfloat16))
    average = on(there, np.ones((8, 4), jnp.bfloat16))
    for _ in range(20):
        average = mix(source, average, eta=1e-3)
    np.testing.assert_array_equal(average, np.ones((8, 4)))


def test_other_weights_compile_nothing(caplog):
    source, target = (on(place, np.ones((8, 4))) for place in ROUTES["slice"])
    mix(source, target, eta=0.5)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        third = mix(source, target, eta=1 / 3)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
    np.testing.assert_allclose(third, 1.0)


def test_what_the_source_lacks_stays_as_it_is():
    here, there = ROUTES["slice"]
    policy = {
        "layers": {"kernel": on(here, np.ones((8, 4), np.float32))},
        "head": on(here, np.ones((8, 4), np.float32)),
    }
    critic = {
        "layers": {"kernel": on(there, np.zeros((8, 4), np.float32))},
        "score": on(there, np.zeros((8, 4), np.float32)),
        "step": on(there, np.zeros((8, 4), np.int32)),
    }
    policy["step"] = critic["step"] + 1
    mixed = mix(policy, critic, eta=1.0)
    np.testing.assert_array_equal(mixed["layers"]["kernel"], np.ones((8, 4)))
    assert mixed["score"] is critic["score"] and mixed["step"] is critic["step"]


def test_what_cannot_be_mixed_is_named():
    x, y = np.ones((8, 4), np.float32), np.ones((8, 8), np.float32)
    here, there = ROUTES["slice"]
    with pytest.raises(ValueError, match=r"layers/w has shape \(8, 4\).*\(8, 8\)"):
        mix({"layers": {"w": on(here, x)}}, {"layers": {"w": on(there, y)}}, eta=0.5)
    with pytest.raises(ValueError, match=r"share no array: found a and b"):
        mix({"a": on(here, x)}, {"b": on(there, x)}, eta=0.5)


def test_a_tree_mixed_with_itself_is_not_used_up():
    x = on(ROUTES["none"][0], np.arange(32, dtype=np.float32).reshape(8, 4))
    np.testing.assert_array_equal(mix(x, x, eta=0.5, donate=True), x)


@pytest.mark.parametrize("source, target", (("f4@0-3", "d4@0-3"), ("d2f2t2", "d8")))
def test_copies_of_an_average_stay_equal_bit_for_bit(source, target):
    # Each device has another part of the source already and receives the rest. One
    # rounding instead of two in one of the programs would set the copies apart.
    allocations = [Allocation.parse(source), Allocation.parse(target)]
    model = padded_for(tiny_model(num_heads=8, num_kv_heads=4, head_dim=4), allocations)
    abstract, rng = abstract_parameters(model), np.random.default_rng(0)

    def draw(allocation):
        return jax.tree.map(
            lambda leaf, sharding: jax.device_put(
                rng.standard_normal(leaf.shape).astype(np.float32), sharding
            ),
            abstract,
            parameter_shardings(abstract, make_mesh(allocation)),
            is_leaf=lambda node: hasattr(node, "axes"),
        )

    for leaf in jax.tree.leaves(mix(*map(draw, allocations), eta=0.1)):
        first, *others = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        for other in others:
            np.testing.assert_array_equal(first, other)
