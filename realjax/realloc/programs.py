"""The compiled programs of the route "slice": cut, begin, join.

Devices that do equal work, on blocks of equal sizes at places of their own, share one
program: their shards are one array over a mesh of those devices, and each looks up its
places in a table. Eight devices are then one compilation and one launch.

    device      0   1   2   3          sizes are those of the program,
    place      (0) (4) (0) (4)         places are rows of its table

A program may move its blocks slab by slab: step k of n takes the k-th slab of every
block along one dimension. It counts the steps itself, so that nothing is uploaded.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.interval_copy import Aligned, Block, pack, unpack
from realjax.core.arrays import Array

AXIS = "device"

Table = tuple[tuple[int, ...], ...]
"""Places by device: the numbers of all starts, one behind the other."""


class Slab(NamedTuple):
    """How a block moves step by step: `steps` slabs along a dimension."""

    axis: int
    steps: int


class Part(NamedTuple):
    """A block of an input of a program.

    Attributes:
        input: Which input.
        size: Of the whole block.
        offset: Where a packed buffer holds it; None where the input is the block, or an
            array that a start from the table says the place in.
        has_start: The table has a start for it.
        slab: How it moves step by step; None moves it at once.
    """

    input: int
    size: tuple[int, ...]
    offset: int | None
    has_start: bool
    slab: Slab | None

    @property
    def slab_size(self) -> tuple[int, ...]:
        """The size of what one step moves."""
        if self.slab is None:
            return self.size
        return tuple(
            size // self.slab.steps if axis == self.slab.axis else size
            for axis, size in enumerate(self.size)
        )


class Output(NamedTuple):
    """An array that a program makes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[Part, ...]


def over(mesh: Mesh, ndim: int) -> NamedSharding:
    """Return the sharding of arrays of the devices of a program, seen as one array."""
    return NamedSharding(mesh, _spec(ndim))


def seen_as_one(mesh: Mesh, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of that one array."""
    return (mesh.size * shape[0], *shape[1:]) if shape else ()


@functools.lru_cache(maxsize=4096)
def cut_program(
    mesh: Mesh,
    ndims: tuple[int, ...],
    outputs: tuple[Output, ...],
    table: Table,
) -> Callable[..., tuple[list[Array], Array | None, Array]]:
    """Return what packs blocks of shards into buffers, and casts them.

    It takes the shards, the step (None for an only one) and a gate, which it waits for
    and does not read, and returns the buffers, the next step and a number that means
    nothing.

    Args:
        mesh: Of the devices, along `AXIS`.
        ndims: Of the shards.
        outputs: The buffers.
        table: Where the blocks begin, by device.
    """

    def cut(
        shards: list[Array], step: Array | None, gate: Array | None
    ) -> tuple[list[Array], Array | None, Array]:
        places = _places(table)
        made = []
        for output in outputs:
            blocks = [
                Block(
                    input=part.input,
                    size=part.slab_size,
                    start=_start(places, part, step),
                )
                for part in output.parts
            ]
            made.append(pack(shards, blocks, dtype=output.dtype))
        return made, None if step is None else step + 1, _arithmetic(mesh, shards)

    specs = [_spec(ndim) for ndim in ndims]
    results = [
        _spec(1 if len(output.parts) > 1 else len(output.shape)) for output in outputs
    ]
    return jax.jit(
        jax.shard_map(
            cut,
            mesh=mesh,
            in_specs=(specs, _spec(1), _spec(1)),
            out_specs=(results, _spec(1), _spec(1)),
            check_vma=False,
        ),
        keep_unused=True,
    )


@functools.lru_cache(maxsize=4096)
def join_program(
    mesh: Mesh,
    ndims: tuple[int, ...],
    outputs: tuple[Output, ...],
    table: Table,
    *,
    is_written: bool,
    is_donated: bool,
) -> Callable[..., tuple[list[Array], Array | None, Array]]:
    """Return what puts blocks of shards and of received buffers in their places.

    It takes the arrays to write into, the shards and buffers, the step (None for an
    only one) and the weight (None copies), and returns the arrays, the next step and a
    number of no meaning.

    Args:
        mesh: Of the devices, along `AXIS`.
        ndims: Of the shards and buffers.
        outputs: The arrays.
        table: Where blocks of shards begin, and where all are put, by device.
        is_written: There are arrays to write into; else it is given none.
        is_donated: They are written in place.
    """

    def join(
        into: list[Array],
        inputs: list[Array],
        step: Array | None,
        eta: Array | None,
    ) -> tuple[list[Array], Array | None, Array]:
        places = _places(table)
        made = []
        for number, output in enumerate(outputs):
            blocks, targets = [], []
            for part in output.parts:
                start = _start(places, part, step) if part.has_start else None
                blocks.append(
                    Block(
                        input=part.input,
                        size=part.slab_size,
                        start=start,
                        offset=part.offset,
                    )
                )
                targets.append(_start(places, part, step))
            made.append(
                unpack(
                    inputs,
                    blocks,
                    targets,
                    shape=output.shape,
                    dtype=output.dtype,
                    into=into[number] if is_written else None,
                    eta=eta,
                )
            )
        next_step = None if step is None else step + 1
        return made, next_step, _arithmetic(mesh, inputs or into)

    whole = [_spec(len(output.shape)) for output in outputs]
    specs = [_spec(ndim) for ndim in ndims]
    return jax.jit(
        jax.shard_map(
            join,
            mesh=mesh,
            in_specs=(
                whole if is_written else [],
                specs,
                _spec(1),
                PartitionSpec(),
            ),
            out_specs=(whole, _spec(1), _spec(1)),
            check_vma=False,
        ),
        donate_argnums=0 if is_donated else (),
    )


@functools.lru_cache(maxsize=4096)
def begin_program(
    mesh: Mesh, shapes: tuple[tuple[tuple[int, ...], np.dtype], ...], *, is_copy: bool
) -> Callable[..., tuple[list[Array], Array]]:
    """Return what makes the arrays that a stepped join writes into.

    It takes the arrays to copy, or none, and step 0, and returns the new arrays and a
    number that means nothing.

    Args:
        mesh: Of the devices, along `AXIS`.
        shapes: Of the new arrays, one device's part, and their types.
        is_copy: There are arrays to copy.
    """

    def begin(copied: list[Array], step: Array) -> tuple[list[Array], Array]:
        made = [jnp.copy(array) for array in copied]
        if not is_copy:
            made = [jax.lax.empty(shape, dtype) for shape, dtype in shapes]
        return made, _arithmetic(mesh, [step])

    specs = [_spec(len(shape)) for shape, _ in shapes]
    return jax.jit(
        jax.shard_map(
            begin,
            mesh=mesh,
            in_specs=(specs if is_copy else [], _spec(1)),
            out_specs=(specs, _spec(1)),
            check_vma=False,
        )
    )


def _spec(ndim: int) -> PartitionSpec:
    return PartitionSpec(AXIS) if ndim else PartitionSpec()


def _arithmetic(mesh: Mesh, arrays: Sequence[Array]) -> Array:
    """Return a number that on a CPU takes some thousand multiplications.

    A CPU runs a program with less arithmetic on the thread that calls it, and Python
    would wait for copies of any size.
    """
    seed = jnp.zeros(1)
    if mesh.devices.flat[0].platform != "cpu":
        return seed
    if arrays and arrays[0].size:
        array = arrays[0]
        corner = jax.lax.slice(array, (0,) * array.ndim, (1,) * array.ndim)
        seed = corner.reshape(1).astype(jnp.float32)
    square = jnp.arange(1024, dtype=jnp.float32).reshape(32, 32) + seed[:, None]
    return (square @ square).max().reshape(1)


def _places(table: Table) -> Any:
    """Give out the numbers of this device's row; those that all share are constants.

    Of the others it is known what divides them on all devices.
    """
    columns = np.asarray(table, np.int32).reshape(len(table), -1)
    if len(columns) > 1:
        row = jnp.asarray(columns)[jax.lax.axis_index(AXIS)]
    else:
        row = columns[0]
    is_shared = (columns == columns[0]).all(axis=0)
    divisors = np.gcd.reduce(columns, axis=0)
    return iter(
        int(columns[0, number])
        if is_shared[number]
        else Aligned(row[number], int(divisors[number]))
        for number in range(columns.shape[1])
    )


def _start(places: Any, part: Part, step: Any) -> tuple[Any, ...]:
    """Take the next start from the table, and go on to the slab of this step."""
    start = [next(places) for _ in part.size]
    if part.slab is not None:
        axis = part.slab.axis
        length = part.slab_size[axis]
        start[axis] = Aligned(step[0] * length, length) + start[axis]
    return tuple(start)


def start_numbers(starts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the row of a table for these starts."""
    return tuple(number for start in starts for number in start)
