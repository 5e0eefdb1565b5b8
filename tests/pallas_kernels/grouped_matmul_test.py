"""The grouped product: what it computes, and how little it takes for it."""

import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels._dispatch import H200, Device
from pallas_kernels.grouped_matmul import blocked, grouped_matmul, reference, tokamax
from pallas_kernels.grouped_matmul.api import explain

D, F = 5, 7

# 40 rows; half of the mean group is 4 rows or more, so blocks are of 16.
SIZES = {
    "uneven": (3, 0, 20, 17),
    "one matrix": (40,),
    "all rows in one group": (0, 0, 40, 0),
    "rows of no group": (0, 16, 0, 9),
    "no rows in groups": (0, 0, 0, 0),
}


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain(x, kernels, sizes, out_bar):
    """The definition in float64, group by group: output and both gradients."""
    x, kernels, out_bar = (np.asarray(a, np.float64) for a in (x, kernels, out_bar))
    out, x_bar = np.zeros(out_bar.shape), np.zeros(x.shape)
    kernels_bar, start = np.zeros(kernels.shape), 0
    for group, size in enumerate(sizes):
        own = slice(start, start + size)
        out[own] = x[own] @ kernels[group]
        x_bar[own] = out_bar[own] @ kernels[group].T
        kernels_bar[group] = x[own].T @ out_bar[own]
        start += size
    return out, x_bar, kernels_bar


@functools.partial(jax.jit, static_argnames=("call",))
def results(x, kernels, sizes, out_bar, *, call=grouped_matmul):
    """The output and both gradients."""
    out, transposed = jax.vjp(lambda x, kernels: call(x, kernels, sizes), x, kernels)
    return out, *transposed(out_bar)


def of_blocks(block_rows):
    return functools.partial(blocked.blocked, block_rows=block_rows)


# 3 rows do not divide 40; 64 are more than there are.
CALLS = {
    "default": grouped_matmul,
    "blocks of 3": of_blocks(3),
    "blocks of 64": of_blocks(64),
    "reference": reference.grouped_matmul,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_output_and_gradients_are_those_of_the_definition(call):
    for sizes in SIZES.values():
        x, kernels, out_bar = draw(0, 40, D), draw(1, len(sizes), D, F), draw(2, 40, F)
        found = results(x, kernels, jnp.asarray(sizes), out_bar, call=call)
        expected = plain(x, kernels, sizes, out_bar)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_rows_of_no_group_may_hold_anything():
    sizes = (5, 12)
    x, out_bar = draw(0, 40, D).at[17:].set(jnp.nan), draw(2, 40, F)
    out_bar = out_bar.at[17:].set(jnp.inf)
    kernels = draw(1, 2, D, F)
    found = results(x, kernels, jnp.asarray(sizes), out_bar)
    expected = plain(x[:17], kernels, sizes, out_bar[:17])
    for a, b, length in zip(found, expected, (17, 17, 2), strict=True):
        np.testing.assert_allclose(a[:length], b, atol=1e-5)
        np.testing.assert_array_equal(a[length:], 0)


def test_bfloat16_rows_are_summed_in_float32_and_so_is_the_kernels_gradient():
    # 301 needs 9 bits, and sums of bfloat16 ones would stop at 256.
    ones = functools.partial(jnp.ones, dtype=jnp.bfloat16)
    x, kernels = ones((301, 400)), jnp.ones((1, 400, 2))
    sizes, out_bar = jnp.asarray([301]), ones((301, 2))
    out, x_bar, kernels_bar = results(x, kernels, sizes, out_bar)
    assert (out.dtype, x_bar.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert kernels_bar.dtype == jnp.float32
    np.testing.assert_array_equal(out, 400)
    np.testing.assert_array_equal(x_bar, 2)
    np.testing.assert_array_equal(kernels_bar, 301)
    # Kernels are rounded to x's dtype before the product: 1 + 2⁻⁹ is 1.
    out, *_ = results(x, kernels + 2**-9, sizes, out_bar)
    np.testing.assert_array_equal(out, 400)


def test_sums_over_the_inputs_are_float32():
    # In bfloat16 256 + 1 is 256: a sum in it would lose all the ones.
    x = jnp.ones((1, 257), jnp.bfloat16).at[0, 0].set(256)
    out = grouped_matmul(x, jnp.ones((1, 257, 1)), jnp.asarray([1]))
    assert out[0, 0] == 512


@pytest.mark.parametrize("block_rows", [1, 3, 8])
def test_every_row_of_a_group_is_in_one_block_of_that_group(block_rows):
    rng, num_groups, num_rows = np.random.default_rng(0), 6, 70
    lay = jax.jit(functools.partial(blocked._lay, block_rows=block_rows, num_rows=70))
    for _ in range(20):
        sizes = rng.integers(0, 20, num_groups)
        while sizes.sum() > num_rows:
            sizes = sizes // 2
        blocks = lay(jnp.asarray(sizes))
        found = [
            (group, start + row)
            for group, start, count in zip(*map(np.asarray, blocks[:3]), strict=True)
            for row in range(count)
        ]
        group_of_row = np.repeat(np.arange(num_groups), sizes)
        assert found == [(group, row) for row, group in enumerate(group_of_row)]
        in_rounds = blocks.num_rows[: blocks.num_rounds * blocked.BLOCKS_PER_ROUND]
        assert in_rounds.sum() == sizes.sum()


def test_the_loop_ends_with_the_last_block():
    # ceil(n / 16) = 1, 0, 4 and 2 blocks: 7, in one round of 8; 3 more take another.
    lay = functools.partial(blocked._lay, num_rows=4096, block_rows=16)
    assert lay(jnp.asarray([3, 0, 64, 17])).num_rounds == 1
    assert lay(jnp.asarray([3, 40, 64, 17])).num_rounds == 2
    assert lay(jnp.asarray([0, 0, 0, 0])).num_rounds == 0


def test_no_array_of_rows_by_matrices_exists():
    num_rows, num_groups, num_inputs, num_outputs = 2048, 64, 32, 48
    shape = jax.ShapeDtypeStruct
    program = results.lower(
        shape((num_rows, num_inputs), jnp.float32),
        shape((num_groups, num_inputs, num_outputs), jnp.float32),
        shape((num_groups,), jnp.int32),
        shape((num_rows, num_outputs), jnp.float32),
    ).compile()
    found = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", program.as_text())
    largest = max(math.prod(map(int, dims.split(","))) for dims in found)
    assert largest == num_rows * num_outputs
    # Blocks are of 16 rows; a mask of rows by matrices alone would take 131 kB.
    assert program.memory_analysis().temp_size_in_bytes < 60e3


def test_blocks_are_as_large_as_half_a_mean_group():
    assert blocked.default_block_rows(num_rows=2**16, num_groups=64) == 512
    assert blocked.default_block_rows(num_rows=100, num_groups=1) == 64
    assert blocked.default_block_rows(num_rows=40, num_groups=4) == 16
    assert blocked.default_block_rows(num_rows=2**20, num_groups=8) == 1024


def test_it_runs_in_shard_map_and_under_checkpoint():
    # Each of 8 devices has 40 rows, 2 matrices and sizes of its own.
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    sizes = np.random.default_rng(0).integers(0, 20, 16)
    x, kernels, out_bar = draw(0, 320, D), draw(1, 16, D, F), draw(2, 320, F)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("expert"),) * 4,
        out_specs=(P("expert"),) * 3,
        check_vma=False,
    )
    def per_device(x, kernels, sizes, out_bar):
        return results(x, kernels, sizes, out_bar, call=jax.checkpoint(grouped_matmul))

    found = jax.jit(per_device)(x, kernels, jnp.asarray(sizes), out_bar)
    for device in range(8):
        rows, own = (
            slice(40 * device, 40 * device + 40),
            slice(2 * device, 2 * device + 2),
        )
        expected = plain(x[rows], kernels[own], sizes[own], out_bar[rows])
        for a, b, part in zip(found, expected, (rows, rows, own), strict=True):
            np.testing.assert_allclose(a[part], b, atol=1e-5)


def test_no_rows_give_no_rows():
    out = grouped_matmul(draw(0, 0, D), draw(1, 2, D, F), jnp.zeros(2, jnp.int32))
    assert out.shape == (0, F)


def test_unknown_implementation_is_refused_by_name():
    with pytest.raises(ValueError, match="'ragged'; known are 'tokamax' and 'blocked'"):
        grouped_matmul(
            draw(0, 4, D), draw(1, 1, D, F), jnp.asarray([4]), implementation="ragged"
        )


def test_tokamax_is_taken_on_hopper_where_it_is_installed(monkeypatch):
    of_mixtral = (16384, (8, 4096, 14336), jnp.bfloat16)
    if importlib.util.find_spec("tokamax") is None:
        answer = explain(*of_mixtral, device=H200)
        assert answer.startswith("grouped_matmul runs as 'blocked'.")
        assert "tokamax is not installed; `pip install realjax[tokamax]`" in answer
    monkeypatch.setattr(tokamax.importlib.util, "find_spec", lambda name: name)
    assert explain(*of_mixtral, device=H200) == "grouped_matmul runs as 'tokamax'."
    answer = explain(16384, (8, 4096, 14336), jnp.float32, device=H200)
    assert "its kernel takes bfloat16 and float16, not float32" in answer
    answer = explain(*of_mixtral, device=Device(platform="cpu"))
    assert "needs an NVIDIA GPU, and this is for cpu" in answer
