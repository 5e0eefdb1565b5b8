"""Random moves between devices of several processes, and what the least of them is.

Every process makes the same arrays and layouts of the same seed.
"""

import math
import random

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realjax.realloc import Traffic, crossing, reallocate
from realjax.realloc.layouts import Layout
from realjax.runtime import cluster

SHAPES = ((24, 12), (12, 24, 6), (48,), (6, 12, 24), ())
DTYPES = ("float32", "bfloat16", "int32", "bool", "float16", "uint8")


def random_sharding(rng, shape):
    """A layout of permuted devices, that may leave processes out."""
    devices = jax.devices()
    count = rng.choice([n for n in (1, 2, 3, 4, 6, 8) if n <= len(devices)])
    axes = rng.choice([(count,), *((n, count // n) for n in (2, 3) if count % n == 0)])
    chosen = np.array(rng.sample(devices, count)).reshape(axes)
    names = ("a", "b")[: len(axes)]
    spec = [[] for _ in shape]
    for name in rng.sample(names, len(names)):
        size = dict(zip(names, axes, strict=True))[name]
        places = [
            place
            for place, length in enumerate(shape)
            if not length % (size * math.prod(len_of(axes, names, spec[place])))
        ]
        if places and rng.random() < 0.8:
            spec[rng.choice(places)].append(name)
    entries = [tuple(entry) or None for entry in spec]
    return NamedSharding(Mesh(chosen, names), PartitionSpec(*entries))


def len_of(axes, names, entry):
    return [size for size, name in zip(axes, names, strict=True) if name in entry]


def random_tree(seed, num_pairs):
    """Arrays by NumPy, and two layouts of each."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    values, sources, destinations = [], [], []
    for _ in range(num_pairs):
        shape = rng.choice(SHAPES)
        value = numbers.integers(0, 200, shape) * (1.0 - 2 * numbers.random(shape))
        value = np.asarray(value).astype(rng.choice(DTYPES))
        values.append(value)
        sources.append(random_sharding(rng, shape))
        destinations.append(random_sharding(rng, shape))
    return values, sources, destinations


def make(value, sharding):
    return jax.make_array_from_callback(
        np.shape(value), sharding, lambda index: value[index], dtype=value.dtype
    )


def is_right(array, value):
    """Whether the shards of this process hold their parts, bit for bit."""
    return array.shape == value.shape and all(
        np.array_equal(bits(shard.data), bits(value[shard.index]))
        for shard in array.addressable_shards
    )


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


def least_crossing(value, source, destination):
    """What processes need and have not, counted element by element."""
    need, have = {}, {}
    for masks, sharding in ((have, source), (need, destination)):
        for device, index in sharding.devices_indices_map(value.shape).items():
            empty = np.zeros(value.shape, bool)
            masks.setdefault(device.process_index, empty)[index] = True
    none = np.zeros(value.shape, bool)
    missing = sum(int((need[p] & ~have.get(p, none)).sum()) for p in need)
    return missing * value.dtype.itemsize


class Counted:
    """Counts the bytes of all copies from process to process."""

    def __init__(self, monkeypatched=jax):
        self.bytes, self.device_put = 0, monkeypatched.device_put

    def __call__(self, arrays, places, **options):
        for array, place in zip(arrays, places, strict=True):
            processes = crossing.processes_of(array.sharding)
            if processes != crossing.processes_of(place):
                self.bytes += array.nbytes
        return self.device_put(arrays, places, **options)


def check_random_pairs(seed, num_pairs, chunk_bytes):
    """Moves a tree; returns what crossed, the least, and the kinds of routes."""
    values, sources, destinations = random_tree(seed, num_pairs)
    arrays = [make(*pair) for pair in zip(values, sources, strict=True)]
    counted, traffic = Counted(), Traffic()
    crossing.jax.device_put = counted
    try:
        with jax.transfer_guard_host_to_device("disallow_explicit"):
            moved = reallocate(
                arrays, destinations, traffic=traffic, chunk_bytes=chunk_bytes
            )
    finally:
        crossing.jax.device_put = counted.device_put
    for array, value, place in zip(moved, values, destinations, strict=True):
        assert is_right(array, value) and array.sharding == place
        assert len(array.addressable_shards) == len(place.addressable_devices)
    # The sources are as they were, and nothing shares a buffer with them.
    assert all(is_right(*pair) for pair in zip(arrays, values, strict=True))
    assert not buffers(arrays) & buffers(moved)
    least = sum(
        least_crossing(value, source, destination)
        for value, source, destination in zip(
            values, sources, destinations, strict=True
        )
        if Layout.of(source).devices != Layout.of(destination).devices
    )
    assert traffic.crossed_bytes == counted.bytes
    return {"crossed": counted.bytes, "least": least, "kinds": traffic.leaves}


def buffers(arrays):
    return {
        (shard.device.id, shard.data.unsafe_buffer_pointer())
        for array in arrays
        for shard in array.addressable_shards
    }


def random_pairs(seeds, num_pairs, chunk_bytes):
    """Moves several trees, with collectives between them."""
    found = []
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), "d"), PartitionSpec("d"))
    ones = make(np.ones(24, np.float32), everywhere)
    total = jax.jit(
        lambda x: x.sum(), out_shardings=NamedSharding(everywhere.mesh, PartitionSpec())
    )
    for seed in seeds:
        found.append(check_random_pairs(seed, num_pairs, chunk_bytes))
        assert float(total(ones).addressable_data(0)) == 24
    cluster.barrier("pairs")
    return found
