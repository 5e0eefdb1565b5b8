"""Memory of a move: results, and a quarter of the tree at most beside them."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from realjax.bench.layout_pairs import GIGABYTE, Pair, fitted
from realjax.bench.reallocation_rates import memory_of
from realjax.parallel import Allocation, make_mesh
from realjax.realloc import live_bytes, mix, reallocate

SHAPES = {
    "embedding": (256, 128),
    "layers": {"up": (8, 128, 256), "norm": (8, 128), "down": (8, 256, 128)},
}


def sharding(text, spec):
    return NamedSharding(make_mesh(Allocation.parse(text)), PartitionSpec(*spec))


def places(text):
    """The last two dimensions are cut over fsdp and tensor."""
    return jax.tree.map(
        lambda shape: sharding(
            text, (None,) * (len(shape) - 2) + ("fsdp", "tensor")[: len(shape)]
        ),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def tree_on(text):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape, place: jax.device_put(
            rng.standard_normal(shape, np.float32), place
        ),
        SHAPES,
        places(text),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def bytes_on_devices(tree):
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
    )


def peak_while_issuing(monkeypatch, move):
    """The most bytes of live arrays at any copy between devices, beyond the sources."""
    gc.collect()
    before, device_put, seen = live_bytes(), jax.device_put, []

    def watch(*args, **options):
        copies = device_put(*args, **options)
        seen.append(live_bytes() - before)
        return copies

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", watch)
        moved = jax.block_until_ready(move())
    return max(seen), moved


@pytest.mark.parametrize(
    "source, destination",
    [
        ("f4@0-3", "t2@4-5"),  # cut, and joined elsewhere
        ("t4@0-3", "t2@4-5"),  # whole shards, joined
        # Both dimensions of a matrix are cut; in place, with copies.
        pytest.param("f2t2@0-3", "f4t2", marks=pytest.mark.slow),
        pytest.param("f2t4", "d2f2t2", marks=pytest.mark.slow),
    ],
)
def test_pieces_take_a_quarter_of_the_tree_at_most(monkeypatch, source, destination):
    tree = tree_on(source)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    peak, moved = peak_while_issuing(
        monkeypatch,
        lambda: reallocate(tree, places(destination), chunk_bytes=size // 8),
    )
    assert peak <= bytes_on_devices(moved) + size // 4
    jax.tree.map(np.testing.assert_array_equal, moved, tree)


def test_a_large_array_moves_in_slabs_of_an_eighth_of_the_tree(monkeypatch):
    tree = {"only": tree_on("f4@0-3")["layers"]["up"]}
    place = sharding("t2@4-5", (None, None, "tensor"))
    size = tree["only"].nbytes
    peak, moved = peak_while_issuing(
        monkeypatch, lambda: reallocate(tree, {"only": place}, chunk_bytes=size // 8)
    )
    assert peak <= size + size // 4
    np.testing.assert_array_equal(moved["only"], tree["only"])
    # All at once takes more, or the slabs would show nothing.
    at_once, _ = peak_while_issuing(
        monkeypatch, lambda: reallocate(tree, {"only": place})
    )
    assert at_once > size + size // 4


def test_a_target_that_is_given_away_is_the_memory_of_the_average(monkeypatch):
    source, target = tree_on("f4@0-3"), tree_on("t2@4-5")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(source))
    peak, _ = peak_while_issuing(
        monkeypatch,
        lambda: mix(source, target, eta=0.5, donate=True, chunk_bytes=size // 8),
    )
    assert peak <= size // 4


@pytest.mark.parametrize("source, destination", [("f8", "t8"), ("t8", "f8")])
def test_a_jitted_identity_takes_two_arrays_beside_its_result(source, destination):
    array = tree_on(source)["layers"]["up"]
    place = places(destination)["layers"]["up"]
    assert array.sharding != place
    program = jax.jit(jnp.copy, out_shardings=place).lower(array).compile()
    memory = program.memory_analysis()
    temporary, result = memory.temp_size_in_bytes, memory.output_size_in_bytes
    # Why a plan leaves no array to it that is larger than a chunk.
    assert result < temporary <= 2 * result


@pytest.mark.slow
@pytest.mark.parametrize("text", ["f4@0-3:t2@4-5", "d2f2t2:t8", "t4@0-3:t2@4-5"])
def test_resident_memory_peaks_a_quarter_of_the_tree_above_the_result(text):
    pair = Pair.parse(text)
    small = dataclasses.replace(GIGABYTE, num_layers=2, vocab_size=8192)
    found = memory_of(pair, fitted(small, [pair]), "float32")
    assert found["share_beside_result"] <= 0.25
