"""Copies are checked: links at the start, arrays after a move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from realjax.realloc import links, reallocate
from realjax.realloc.links import (
    CorruptedCopyError,
    check_links,
    check_moved,
    checksum,
    links_used,
)

VALUES = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)


def on(devices, *spec, shape=None):
    found = np.array(jax.devices())[list(devices)]
    names = ("a", "b")[: len(shape or (1,))]
    return NamedSharding(Mesh(found.reshape(shape or -1), names), PartitionSpec(*spec))


def put(values, *where, **options):
    return jax.device_put(values, on(*where, **options))


@pytest.fixture
def broken_link(monkeypatch):
    """Makes the copies between two devices deliver zeros."""

    def break_link(source, target):
        device_put = jax.device_put

        def put(arrays, places, **options):
            copies = device_put(arrays, places, **options)
            pairs = zip(arrays, copies, strict=True)
            return [
                jnp.zeros_like(copy)
                if {d.id for d in array.sharding.device_set} == {source}
                and {d.id for d in copy.sharding.device_set} == {target}
                else copy
                for array, copy in pairs
            ]

        monkeypatch.setattr(links.jax, "device_put", put)

    return break_link


def test_links_that_deliver_what_was_sent_pass():
    check_links([(0, 1), (1, 0), (2, 7), (3, 3), (0, 1)], num_bytes=4096)


def test_a_link_that_delivers_zeros_is_named(broken_link):
    broken_link(2, 7)
    with pytest.raises(CorruptedCopyError, match=r"1 of 3 links: 2 -> 7\. Take"):
        check_links([(0, 1), (2, 7), (7, 2)], num_bytes=4096)


def test_a_reallocation_uses_the_links_of_its_route():
    # Half of the rows each; device 2 takes both halves, device 1 the other one.
    tree = {"x": put(VALUES, (0, 1), "a"), "y": put(VALUES, (0, 1), "a")}
    assert links_used(tree, on((2, 1))) == {(0, 1), (0, 2), (1, 2)}
    assert links_used(tree, on((0, 1), "a")) == set()


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "float16"]
)
def test_a_sum_is_the_same_in_every_layout(dtype):
    values = (VALUES * 10).astype(dtype)
    layouts = (
        ((0,),),
        ((3, 1), "a"),
        ((5, 4, 6, 7), None, "a"),
        ((2, 0, 1, 3), ("b", "a")),
        (range(8), "b", "a"),
    )
    shapes = ((1,), (2,), (4,), (2, 2), (4, 2))
    sums = [
        checksum(put(values, *where, shape=shape))
        for where, shape in zip(layouts, shapes, strict=True)
    ]
    sums.append(checksum(jnp.asarray(values)))
    assert {tuple(found.tolist()) for found in sums} == {tuple(sums[0].tolist())}
    assert sums[0].any() and sums[0].dtype == np.uint32


def test_a_sum_changes_with_any_bit_and_any_swap():
    def sums(values):
        return tuple(checksum(put(values, (0, 1), "a")).tolist())

    flipped = VALUES.copy()
    flipped.view(np.uint32)[7, 11] ^= 1 << 31
    swapped = VALUES[:, ::-1].copy()
    zeroed = VALUES.copy()
    zeroed[:4] = 0
    found = [sums(values) for values in (VALUES, flipped, swapped, zeroed)]
    assert len(set(found)) == 4


def test_the_sum_of_an_array_to_be_cast_is_that_of_the_cast_one():
    x = put(VALUES, (0, 1), "a")
    np.testing.assert_array_equal(
        checksum(x, dtype=jnp.bfloat16), checksum(x.astype(jnp.bfloat16))
    )
    assert checksum({"n": jnp.arange(3)}, dtype=jnp.bfloat16)["n"].tolist() == (
        checksum(jnp.arange(3)).tolist()
    )


def test_copies_of_one_block_that_differ_are_found():
    x = put(VALUES, (4, 6))
    shards = [shard.data for shard in x.addressable_shards]
    shards[1] = shards[1].at[3, 3].add(1)
    torn = jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)
    with pytest.raises(CorruptedCopyError, match="devices 4 and 6 hold the same block"):
        checksum(torn)


def test_a_reallocation_that_loses_a_piece_is_refused(broken_link):
    x, place = put(VALUES, (0, 1), "a"), on((2, 3, 4), None, "a")
    moved = reallocate({"w": x}, place, dtype=jnp.bfloat16, verify=True)
    np.testing.assert_array_equal(moved["w"], VALUES.astype(jnp.bfloat16))
    broken_link(1, 3)
    with pytest.raises(CorruptedCopyError, match=r"\['w'\] arrived changed.*2, 3, 4"):
        reallocate({"w": x}, place, dtype=jnp.bfloat16, verify=True)


def test_moved_arrays_are_compared_with_their_sources():
    x, y = put(VALUES, (0, 1), "a"), put(VALUES, range(8), None, "b", shape=(2, 4))
    check_moved({"x": x}, {"x": y})
    with pytest.raises(CorruptedCopyError, match=r"\['x'\] arrived changed"):
        check_moved({"x": x}, {"x": y + 1})
