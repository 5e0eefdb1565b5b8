"""Pieces of arrays, as two processes would write them into one folder."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from realjax.runtime import named_arrays, shards


def array(spec, num_devices=4):
    devices = np.array(jax.devices()[:num_devices])
    mesh = Mesh(devices.reshape(2, -1), ("a", "b"))
    kernel = jnp.arange(64.0).reshape(8, 8)
    return jax.device_put(kernel, NamedSharding(mesh, spec))


def seen_by(process, view):
    """What another process would see: its own copies lie on its own devices."""
    return {
        name: {**seen, "holders": [process] if seen["holders"] else []}
        for name, seen in view.items()
    }


def test_every_distinct_shard_is_one_piece():
    leaves = {"cut": array(P("a", "b")), "rows": array(P("a")), "whole": array(P())}
    found = shards.pieces(leaves, [shards.view(leaves)])
    boxes = {name: [p.box for p in found if p.name == name] for name in leaves}
    assert boxes["cut"] == [
        ((0, 4), (0, 4)),
        ((0, 4), (4, 8)),
        ((4, 8), (0, 4)),
        ((4, 8), (4, 8)),
    ]
    assert boxes["rows"] == [((0, 4), (0, 8)), ((4, 8), (0, 8))]
    assert boxes["whole"] == [((0, 8), (0, 8))]


def test_of_copies_the_first_process_writes_its_own():
    leaves = {"mean": jnp.ones(3), "ids": np.arange(2)}
    view = shards.view(leaves)
    views = [view, seen_by(1, view)]
    shards.check_alike(views)
    found = shards.pieces(leaves, views)
    assert [(p.name, p.box, p.process) for p in found] == [
        ("mean", ((0, 3),), 0),
        ("ids", ((0, 2),), 0),
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shape": [3]}, r"w is float32\[2\] in process 0 and float32\[3\] in process"),
        ({"dtype": "int32"}, r"w is float32\[2\] in process 0 and int32\[2\]"),
        (
            {"holders": [0, 1]},
            r"processes \[0\] for process 0, and of \[2\] in \[0, 1\]",
        ),
    ],
)
def test_what_processes_see_differently_is_named(change, message):
    view = shards.view({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=message):
        shards.check_alike([view, {"w": view["w"] | change}])


def test_what_only_one_process_has_is_named():
    view = shards.view({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="w is not there in process 0 and float32"):
        shards.check_alike([{}, view])


def test_orbax_reads_what_two_processes_wrote(tmp_path):
    leaves = {
        "policy/kernel": array(P("a", "b")),
        "policy/scale": jnp.bfloat16(3),
        "ids": np.arange(5),
        "flags": np.array([True, False]),
    }
    views = [shards.view(leaves)] * 2
    planned = shards.pieces(leaves, views[:1])
    # Every second piece is the other process's.
    planned = [
        shards.Piece(name=piece.name, box=piece.box, process=number % 2)
        for number, piece in enumerate(planned)
    ]
    for process in (0, 1):
        data = shards.copy_pieces(leaves, planned, process)
        assert data
        shards.write(tmp_path, data, views, process)
    shards.merge(tmp_path, views)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaves
    ) | {"policy/kernel": array(P("b"), num_devices=8)}
    found = ocp.PyTreeCheckpointHandler().restore(
        tmp_path, args=named_arrays.restoring(abstract)
    )
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert found[name].dtype == leaf.dtype
        np.testing.assert_array_equal(found[name], leaf)
    assert found["policy/kernel"].sharding == abstract["policy/kernel"].sharding


def test_copies_do_not_change_with_the_arrays():
    leaves = {"kernel": array(P("a")), "ids": np.arange(5)}
    planned = shards.pieces(leaves, [shards.view(leaves)])
    data = shards.copy_pieces(leaves, planned, 0)
    before = {piece: copy.copy() for piece, copy in data.items()}
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(leaves["kernel"]))
    leaves["ids"][:] = 0
    for piece, copy in data.items():
        np.testing.assert_array_equal(copy, before[piece])
