"""Tests of `realjax/parallel/local.py`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.testing.hlo import collectives
from realjax.models.axes import OF_ROWS, PAGES, SCALAR
from realjax.models.partition import WHOLE
from realjax.parallel.allocation import Allocation
from realjax.parallel.local import locally_for
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for

IN_AXES = ({"pages": PAGES, "scales": None}, OF_ROWS, SCALAR)


def read(tree, rows, layer):
    """Return one number of the page that each row names."""
    assert tree["scales"] is None
    return tree["pages"][layer, rows, 0, 0, 0]


def arguments(num_pages=8):
    shape = (2, num_pages, 4, 3, 5)
    pages = jnp.broadcast_to(jnp.arange(num_pages)[None, :, None, None, None], shape)
    rows = jnp.asarray([1, 0, 1, 1, 0, 0, 0, 1], jnp.int32)
    return {"pages": pages, "scales": None}, rows, jnp.int32(1)


@pytest.mark.parametrize("text", ["d4t2", "d2f2", "f2e2t2", "s2t4", "d8"])
def test_every_device_sees_its_own_part_and_says_nothing(text):
    mesh = make_mesh(Allocation.parse(text))
    num_parts = Allocation.parse(text).num_row_shards
    tree, rows, layer = arguments(num_pages=2 * num_parts)
    shapes = []

    def noted(tree, rows, layer):
        shapes.append((tree["pages"].shape, rows.shape))
        return read(tree, rows, layer)

    local = jax.jit(locally_for(mesh)(noted, IN_AXES, OF_ROWS))
    row_axes = tuple(a for a in ("data", "fsdp", "expert") if mesh.shape[a] > 1) or None
    pages_spec = P(None, row_axes, "tensor" if mesh.shape["tensor"] > 1 else None)
    tree["pages"] = jax.device_put(tree["pages"], NamedSharding(mesh, pages_spec))
    rows = jax.device_put(rows, NamedSharding(mesh, P(row_axes)))
    found = local(tree, rows, layer)
    part = np.arange(8) // (8 // num_parts)
    np.testing.assert_array_equal(found, 2 * part + np.asarray(rows))
    heads = 4 // mesh.shape["tensor"]
    assert shapes == [((2, 2, heads, 3, 5), (8 // num_parts,))]
    compiled: Any = local.lower(tree, rows, layer).compile()
    assert collectives(compiled.as_text()) == ()


def test_it_works_in_a_scan_that_carries_what_is_cut():
    mesh = make_mesh(Allocation.parse("d2t2"))
    local = locally_for(mesh)(
        lambda pages, rows, layer: pages.at[layer, rows].add(1.0),
        (PAGES, OF_ROWS, SCALAR),
        PAGES,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def add(pages, rows):
        step = lambda pages, layer: (local(pages, rows, layer), None)
        return jax.lax.scan(step, pages, jnp.arange(2))[0]

    spec = P(None, "data", "tensor")
    pages = jax.device_put(jnp.zeros((2, 6, 4, 3, 5)), NamedSharding(mesh, spec))
    found = add(pages, jnp.asarray([0, 1, 2, 2], jnp.int32))
    # Part 0 has the pages 0 to 2 and the rows 0, 1; part 1 the others.
    np.testing.assert_array_equal(found[:, :, 0, 0, 0], [[1, 1, 0, 0, 0, 2]] * 2)
    assert found.sharding.is_equivalent_to(pages.sharding, 5)


def test_on_one_device_the_function_is_itself():
    assert WHOLE.locally(read, IN_AXES, OF_ROWS) is read
    one = partition_for(make_mesh(Allocation.parse("d1")))
    assert one.locally(read, IN_AXES, OF_ROWS) is read


def test_unknown_names_are_refused():
    local = locally_for(make_mesh(Allocation.parse("d2")))
    with pytest.raises(ValueError, match="Unknown dimension name 'page'"):
        local(jnp.sum, (("page",),), SCALAR)(jnp.ones(2))


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_axes_that_do_not_divide_cut_nothing(num_rows):
    # Of d2f2, two rows are cut over data alone, and one or three not at all; nor are
    # the pages, which the rows speak of.
    mesh = make_mesh(Allocation.parse("d2f2"))
    seen = []

    def sums(pages, rows):
        seen.append((pages.shape[1], rows.shape[0]))
        return rows * 2

    pages, rows = jnp.ones((1, 4, 1, 1, 1)), jnp.arange(float(num_rows))
    out = jax.jit(locally_for(mesh)(sums, (PAGES, OF_ROWS), OF_ROWS))(pages, rows)
    np.testing.assert_array_equal(out, 2 * np.arange(num_rows))
    assert seen == [(2, 1) if num_rows == 2 else (4, num_rows)]


def test_inside_a_stage_it_cuts_along_the_other_axes():
    mesh = make_mesh(Allocation.parse("d2t2s2"))
    local = locally_for(mesh)(lambda rows: rows * rows.shape[0], (OF_ROWS,), OF_ROWS)
    staged = jax.shard_map(
        local,
        mesh=mesh,
        axis_names={"stage"},
        in_specs=P("stage"),
        out_specs=P("stage"),
    )
    # Eight rows: four a stage, and of those two in each part of data.
    np.testing.assert_array_equal(jax.jit(staged)(jnp.ones(8)), np.full(8, 2.0))
