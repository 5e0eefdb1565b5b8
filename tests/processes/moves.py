"""Moves over two processes of four devices, one fact each; see `crossing_test.py`."""

import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realjax.realloc import Traffic, mix, move_array, move_batch, reallocate
from realjax.realloc.links import (
    CorruptedCopyError,
    check_links,
    check_moved,
    checksum,
)
from realjax.runtime import cluster
from tests.processes.pairs import buffers, is_right, make, random_pairs

VALUES = np.arange(8 * 12, dtype=np.float32).reshape(8, 12) / 7


def on(devices, *spec, shape=None):
    found = np.array(jax.devices())[list(devices)]
    names = ("a", "b")[: len(shape or (1,))]
    return NamedSharding(Mesh(found.reshape(shape or -1), names), PartitionSpec(*spec))


def replicas_are_filled_on_their_side():
    # One of four copies crosses, in two halves; the others are given there.
    traffic = Traffic()
    x = make(VALUES, on((0, 1), "a"))
    moved = reallocate(x, on((4, 5, 6, 7)), traffic=traffic)
    assert is_right(moved, VALUES)
    assert traffic.crossed_bytes == x.nbytes and traffic.sent_bytes == 4 * x.nbytes


def narrowed_arrays_cross_narrow():
    traffic, whole = Traffic(), Traffic()
    x = make(VALUES, on((0, 1), "a"))
    place = on((5, 4, 7, 3), None, "a")
    reallocate(x, place, traffic=whole)
    moved = reallocate(x, place, dtype=jnp.bfloat16, traffic=traffic)
    assert is_right(moved, VALUES.astype(jnp.bfloat16))
    assert whole.crossed_bytes == 2 * traffic.crossed_bytes > 0
    widened = Traffic()
    back = reallocate(moved, on((0, 1), "a"), dtype=jnp.float32, traffic=widened)
    assert is_right(back, VALUES.astype(jnp.bfloat16).astype(np.float32))
    assert widened.crossed_bytes == traffic.crossed_bytes


def equal_layouts_cost_nothing():
    traffic = Traffic()
    x = make(VALUES, on(range(8), "a"))
    assert reallocate(x, x.sharding, alias=True, traffic=traffic) is x
    named = reallocate(x, on(range(8), ("a", "b"), shape=(4, 2)), alias=True)
    assert buffers([named]) == buffers([x]) and is_right(named, VALUES)
    assert not traffic.sent_bytes and traffic.leaves["none"] == 1
    copied = reallocate(x, x.sharding)
    assert is_right(copied, VALUES) and not buffers([copied]) & buffers([x])


def the_same_devices_use_collectives():
    traffic = Traffic()
    x = make(VALUES[:, :8], on(range(8), "a"))
    moved = reallocate(x, on(range(8), None, "a"), traffic=traffic)
    assert is_right(moved, VALUES[:, :8])
    assert traffic.leaves["jit"] == 1 and traffic.collective_bytes


def arrays_of_others_are_handles():
    # From process 1 to process 1: a move of its own, and only a name in process 0.
    x = make(VALUES, on((4, 5), "a"))
    y = reallocate({"x": x}, on((7,)), dtype=jnp.bfloat16)["x"]
    assert (y.shape, y.dtype, y.sharding) == (x.shape, jnp.bfloat16, on((7,)))
    assert len(y.addressable_shards) == jax.process_index()
    z = reallocate(y, on((1, 0), None, "a"))
    assert is_right(z, VALUES.astype(jnp.bfloat16))
    assert len(z.addressable_shards) == 2 * (1 - jax.process_index())


def each_process_uploads_its_own_rows():
    rows = np.full_like(VALUES, np.nan)
    mine = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
    rows[mine] = VALUES[mine]
    moved = move_array(rows, on(range(8), "a"))
    rows[:] = 0
    assert is_right(moved, VALUES)
    batch = move_batch({"here": VALUES, "none": None}, lambda array: on((6, 7), "a"))
    assert batch["none"] is None and is_right(batch["here"], VALUES)


def averages_are_computed_where_they_arrive():
    target = VALUES[::-1].copy()
    for source, destination in (
        (on((0, 1), "a"), on((6, 5, 0), None, "a")),
        (on(range(8), "a"), on(range(8), "a")),
        (on((4, 5), "a"), on((6,))),
    ):
        x, y = make(VALUES.astype(jnp.bfloat16), source), make(target, destination)
        for donate, chunk_bytes in ((False, None), (False, 200), (True, 200)):
            mixed = mix(x, y, eta=0.25, donate=donate, chunk_bytes=chunk_bytes)
            assert mixed.dtype == y.dtype and mixed.sharding == destination
            wanted = 0.25 * VALUES.astype(jnp.bfloat16).astype(np.float32)
            wanted += 0.75 * target
            for shard in mixed.addressable_shards:
                np.testing.assert_allclose(
                    np.asarray(shard.data), wanted[shard.index], rtol=1e-6
                )
            assert donate or is_right(y, target)


def empty_and_scalar_arrays_cross():
    values = {"none": np.zeros((0, 4), np.float32), "one": np.asarray(np.int32(7))}
    tree = {key: make(value, on((0, 1))) for key, value in values.items()}
    moved = reallocate(tree, on((4, 5, 1)))
    assert all(is_right(moved[key], value) for key, value in values.items())


def links_between_processes_are_checked():
    device = [device.id for device in jax.devices()]
    links = [(0, 1), (0, 5), (5, 0), (6, 3), (6, 7), (2, 5)]
    pairs = [(device[source], device[target]) for source, target in links]
    check_links(pairs, num_bytes=4096)
    device_put, error = jax.device_put, ""

    def broken(arrays, places, **options):
        """Delivers zeros from device 2 to device 5."""
        copies = device_put(arrays, places, **options)
        ends = [
            {d.id for x in (array, copy) for d in x.sharding.device_set}
            for array, copy in zip(arrays, copies, strict=True)
        ]
        is_here = jax.process_index() == 1
        return [
            jnp.zeros_like(copy) if is_here and end == {device[2], device[5]} else copy
            for copy, end in zip(copies, ends, strict=True)
        ]

    jax.device_put = broken
    try:
        check_links(pairs, num_bytes=4096)
    except CorruptedCopyError as found:
        error = str(found)
    finally:
        jax.device_put = device_put
    # Who receives it sees it.
    name = f"1 of 6 links: {device[2]} -> {device[5]}."
    assert (name in error) if jax.process_index() == 1 else not error


def moved_arrays_are_compared_across_processes():
    tree = {"w": make(VALUES, on((0, 5), "a")), "n": make(VALUES, on((4, 6)))}
    moved = reallocate(tree, on((7, 3, 2), None, "a"), dtype=jnp.bfloat16, verify=True)
    assert is_right(moved["w"], VALUES.astype(jnp.bfloat16))
    sums = checksum({"before": tree["w"], "after": moved["w"]}, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(sums["before"], sums["after"])
    wrong = make(VALUES[::-1].copy(), on((7, 3, 2), None, "a"))
    try:
        check_moved(tree["w"], wrong)
    except CorruptedCopyError:
        return
    raise AssertionError("Another array passed for a copy.")


FACTS = (
    links_between_processes_are_checked,
    moved_arrays_are_compared_across_processes,
    replicas_are_filled_on_their_side,
    narrowed_arrays_cross_narrow,
    equal_layouts_cost_nothing,
    the_same_devices_use_collectives,
    arrays_of_others_are_handles,
    each_process_uploads_its_own_rows,
    averages_are_computed_where_they_arrive,
    empty_and_scalar_arrays_cross,
)


def check_all(seeds, num_pairs):
    """Says what is wrong with each fact, None if nothing, and what random pairs did."""
    found = {}
    for fact in FACTS:
        try:
            found[fact.__name__] = fact()
        except AssertionError:
            found[fact.__name__] = traceback.format_exc()
        cluster.barrier(fact.__name__)
    return found, random_pairs(seeds, num_pairs, None)
