"""Pack and unpack: blocks of arrays to a buffer, and to their places in an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.interval_copy import Block, pack, reference, unpack


def arrays(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def test_one_block_keeps_its_shape_and_several_lie_one_behind_the_other():
    x = jnp.arange(12).reshape(3, 4)
    first = Block(input=0, size=(2, 1), start=(0, 3))
    second = Block(input=0, size=(1, 2), start=(2, 0))
    # 0 1 2 3 / 4 5 6 7 / 8 9 10 11: the last column's upper two, the last row's first.
    np.testing.assert_array_equal(pack([x], [first]), [[3], [7]])
    np.testing.assert_array_equal(pack([x], [first, second]), [3, 7, 8, 9])


def test_the_weight_averages_with_what_was_there():
    block = Block(input=0, size=(2,))
    new = unpack(
        [jnp.array([10.0, 20.0])],
        [block],
        [(1,)],
        shape=(3,),
        dtype=jnp.float32,
        into=jnp.array([1.0, 2.0, 4.0]),
        eta=0.25,
    )
    # 0.25 * 10 + 0.75 * 2 = 4, and 0.25 * 20 + 0.75 * 4 = 8.
    np.testing.assert_array_equal(new, [1.0, 4.0, 8.0])


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packing_is_what_the_reference_does(dtype, is_traced):
    inputs = arrays((4, 6, 2), (5, 3), (2,))
    starts = ((1, 2, 0), (2, 1), (0,), (0, 0))

    def run(pack, arrays, starts):
        sizes = ((3, 2, 1), (3, 2), (2,), (1, 3))
        blocks = [
            Block(input=number, size=size, start=tuple(start))
            for number, size, start in zip((0, 1, 2, 1), sizes, starts, strict=True)
        ]
        return pack(arrays, blocks, dtype=dtype)

    expected = run(reference.pack, inputs, starts)
    # Traced starts are for devices that cut at different places in one program.
    call = (
        jax.jit(lambda *args: run(pack, *args))
        if is_traced
        else (lambda *args: run(pack, *args))
    )
    packed = call([jnp.asarray(x) for x in inputs], starts)
    assert packed.shape == (3 * 2 + 3 * 2 + 2 + 3,) and packed.dtype == dtype
    np.testing.assert_array_equal(packed, expected)


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("is_grid", [False, True])
@pytest.mark.parametrize("eta", [None, 0.3])
def test_unpacking_is_what_the_reference_does(eta, is_grid, is_traced):
    whole, packed = arrays((6, 4), (20,))
    old = arrays((4, 6), dtype=jnp.bfloat16)[0]
    if is_grid:  # four corners of 2 x 3
        places = ((0, 0), (2, 3), (0, 3), (2, 0))
        sizes = [(2, 3)] * 4
    else:  # columns, out of order
        places = ((0, 4), (0, 0), (0, 1), (0, 3))
        sizes = [(4, 2), (4, 1), (4, 2), (4, 1)]
    offsets = (None, 3, 9, None)

    def run(unpack, inputs, old, places):
        blocks = [
            Block(input=0, size=size, start=(1, 0))
            if offset is None
            else Block(input=1, size=size, offset=offset)
            for size, offset in zip(sizes, offsets, strict=True)
        ]
        return unpack(
            inputs,
            blocks,
            [tuple(place) for place in places],
            shape=(4, 6),
            dtype=old.dtype,
            into=old if eta is not None else None,
            eta=eta,
        )

    expected = run(reference.unpack, [whole, packed], old, places)
    call = (
        jax.jit(lambda *args: run(unpack, *args))
        if is_traced
        else (lambda *args: run(unpack, *args))
    )
    new = call([jnp.asarray(whole), jnp.asarray(packed)], jnp.asarray(old), places)
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(new, expected)


def test_a_donated_target_is_written_in_place():
    block = Block(input=0, size=(1, 64))

    def write(into, row, at, eta):
        place = [(at, jnp.int32(0))]
        return unpack(
            [row], [block], place, shape=(64, 64), dtype="float32", into=into, eta=eta
        )

    memory = (
        jax.jit(write, donate_argnums=0)
        .lower(jnp.ones((64, 64)), jnp.ones((1, 64)), 3, 0.5)
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes == 64 * 64 * 4
    assert memory.temp_size_in_bytes < 64 * 64 * 4


def test_what_cannot_be_copied_is_said():
    x, step = jnp.ones(2), jnp.arange(2)
    blocks = [Block(input=0, size=(2,)), Block(input=1, size=(2,))]
    with pytest.raises(ValueError, match="float32 and int32 do not fit in one buffer"):
        pack([x, step], blocks)
    with pytest.raises(ValueError, match="a weight and no array to average with"):
        unpack([x], blocks[:1], [(0,)], shape=(2,), dtype=x.dtype, eta=0.5)
    with pytest.raises(ValueError, match="no implementation 'kernel'"):
        pack([x], blocks[:1], implementation="kernel")
