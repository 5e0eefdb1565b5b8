"""A thousand random pairs of layouts: the same bits, no host, no shared buffer."""

import collections
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.testing.hlo import collectives
from realjax.realloc import Traffic, reallocate
from realjax.realloc.layouts import Layout
from realjax.realloc.requests import Request

NUM_PAIRS = 1000
NUM_QUICK = 40
BATCH = 20
DEVICE_COUNTS = (1, 2, 3, 4, 6, 8)
DTYPES = (np.float32, jnp.bfloat16, np.int32, np.int8, bool)
SIZES = (24, 48)


def random_mesh(rng, devices):
    """Up to three axes over some devices, in any order."""
    count, sizes = len(devices), []
    for _ in range(rng.randint(0, 2)):
        size = rng.choice([n for n in range(1, count + 1) if count % n == 0])
        sizes.append(size)
        count //= size
    sizes.append(count)
    rng.shuffle(sizes)
    return Mesh(np.array(devices).reshape(sizes), tuple("abc"[: len(sizes)]))


def random_spec(rng, mesh, ndim):
    """Every axis cuts one of the dimensions, or none."""
    cuts = [[] for _ in range(ndim)]
    for axis in rng.sample(mesh.axis_names, len(mesh.axis_names)):
        if rng.random() < 0.75 and ndim:
            cuts[rng.randrange(ndim)].append(axis)
    return PartitionSpec(*(tuple(axes) or None for axes in cuts))


def random_pair(seed):
    rng = random.Random(seed)
    ndim = rng.choice([1, 2, 2, 3, 3])
    shape = tuple(rng.choice(SIZES) for _ in range(ndim))
    values = np.random.default_rng(seed).integers(-100, 100, shape)
    devices = jax.devices()
    first = rng.sample(devices, rng.choice(DEVICE_COUNTS))
    again = rng.random()
    if again < 0.25:  # the same devices in the same order
        second = first
    elif again < 0.35:  # the same, in another
        second = rng.sample(first, len(first))
    else:
        second = rng.sample(devices, rng.choice(DEVICE_COUNTS))
    source, destination = (random_mesh(rng, found) for found in (first, second))
    places = (
        NamedSharding(mesh, random_spec(rng, mesh, ndim))
        for mesh in (source, destination)
    )
    return values.astype(rng.choice(DTYPES)), *places


def least_bytes(values, source, destination):
    """What devices need and do not have, counted element by element."""
    held = source.devices_indices_map(values.shape)
    least = 0
    for device, wanted in destination.devices_indices_map(values.shape).items():
        need, have = np.zeros(values.shape, bool), np.zeros(values.shape, bool)
        need[wanted] = True
        if device in held:
            have[held[device]] = True
        least += int((need & ~have).sum()) * values.dtype.itemsize
    return least


def buffers(arrays):
    return {
        (shard.device.id, shard.data.unsafe_buffer_pointer())
        for array in arrays
        for shard in array.addressable_shards
        if shard.data.nbytes
    }


class Sent:
    """Stands in for `jax.device_put`, and adds up what goes to another device."""

    def __init__(self, device_put):
        self.device_put, self.bytes = device_put, 0

    def __call__(self, arrays, places, **options):
        # Parcels are copied; what only says that a step is done may be shared.
        if options.get("may_alias") is False:
            self.bytes += sum(
                array.nbytes
                for array, place in zip(arrays, places, strict=True)
                if array.sharding.device_set != place.device_set
            )
        return self.device_put(arrays, places, **options)


def check_pairs(seeds, monkeypatch):
    """Moves arrays of many pairs; returns how many took each route."""
    kinds, moved_in_collectives = collections.Counter(), 0
    for seed in seeds:
        values, source, destination = random_pair(seed)
        array = jax.device_put(values, source)
        traffic = Traffic()
        chunk_bytes = 256 if seed % 5 == 0 else None  # in slabs
        sent = Sent(jax.device_put)
        with (
            jax.transfer_guard_host_to_device("disallow_explicit"),
            monkeypatch.context() as patch,
        ):
            patch.setattr(jax, "device_put", sent)
            moved = reallocate(
                array, destination, traffic=traffic, chunk_bytes=chunk_bytes
            )
        (kind,) = (kind for kind, count in traffic.leaves.items() if count)
        kinds[kind] += 1
        assert not buffers([array]) & buffers([moved]), seed
        least = least_bytes(values, source, destination)
        if kind == "slice":
            assert traffic.sent_bytes == sent.bytes == least, seed
        elif kind == "jit":
            assert traffic.collective_bytes == least, seed
            moved_in_collectives += collective_bytes(array, destination)
        else:
            assert traffic.sent_bytes == least, seed
        array.delete()
        assert moved.sharding == destination and moved.dtype == values.dtype
        np.testing.assert_array_equal(moved, values, err_msg=str(seed))
    return kinds, moved_in_collectives


def collective_bytes(array, destination):
    """What the compiled collectives of the jitted identity give out, on all devices."""
    program = jax.jit(jnp.copy, out_shardings=destination).lower(array).compile()
    found = collectives(program.as_text())
    num_devices = len(Layout.of(destination).devices)
    return num_devices * sum(one.num_bytes * one.times for one in found)


def test_random_pairs_arrive_bit_for_bit_and_nothing_is_sent_twice(monkeypatch):
    kinds, _ = check_pairs(range(NUM_QUICK), monkeypatch)
    assert set(kinds) >= {"slice", "jit"}


def test_most_of_a_thousand_random_pairs_take_the_slice_route():
    kinds = collections.Counter()
    for seed in range(NUM_PAIRS):
        values, source, destination = random_pair(seed)
        request = Request(source, destination, values.shape, values.dtype, values.dtype)
        kinds[request.route.kind] += 1
    assert kinds["slice"] >= 600 and all(kinds[k] > 10 for k in ("none", "jit", "put"))
    counts = {math.prod(random_pair(seed)[1].mesh.shape.values()) for seed in range(99)}
    assert counts == set(DEVICE_COUNTS)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(NUM_QUICK, NUM_PAIRS, BATCH))
def test_a_thousand_random_pairs_arrive_bit_for_bit(
    first, monkeypatch, record_property
):
    seeds = range(first, min(first + BATCH, NUM_PAIRS))
    kinds, moved = check_pairs(seeds, monkeypatch)
    record_property("kinds", dict(kinds))
    record_property("collective_bytes", moved)
