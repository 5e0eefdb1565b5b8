"""The shapes at which packing and unpacking are compiled, checked and timed.

Trees as a reallocation moves them: the parameters of one device of eight that share
each layer by rows, cut into the pieces for eight devices that share it by heads and
columns; and a small model whole. A buffer holds all pieces, and XLA's programs do the
same work with slices and updates, array by array.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _dispatch, _tuning
from pallas_kernels.interval_copy import mosaic, plans, reference, slices
from pallas_kernels.interval_copy.api import copy, pack, plan_copy
from pallas_kernels.interval_copy.blocks import Block
from pallas_kernels.interval_copy.requests import Pair, Request, packing, request_of
from pallas_kernels.testing.cases import Case, Limits

ETA = 0.2

# Copies are exact, and averages have the bits of the definition.
TOLERANCE = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
    """An array, and how it is cut into pieces.

    Attributes:
        shape: of what one device has.
        axis: the one that pieces divide; None is one piece.
    """

    shape: tuple[int, ...]
    axis: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tree:
    """Arrays, and how many pieces each is cut into.

    Attributes:
        leaves: the arrays.
        parts: pieces of each.
        narrow: instructions of a kernel that move less than 8 bytes, at most: those
            that read the table, and copy arrays with runs of less than 512 elements.
    """

    leaves: tuple[_Leaf, ...]
    parts: int
    narrow: int

    @property
    def num_elements(self) -> int:
        """Of all arrays."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves)

    def blocks(self) -> tuple[Block, ...]:
        """All pieces, in the order of the devices they are for."""
        found = []
        for part in range(self.parts):
            for number, leaf in enumerate(self.leaves):
                size, start = list(leaf.shape), [0] * len(leaf.shape)
                if leaf.axis is not None:
                    size[leaf.axis] //= self.parts
                    start[leaf.axis] = part * size[leaf.axis]
                elif part:
                    continue
                block = Block(input=number, size=tuple(size), start=tuple(start))
                found.append(block)
        return tuple(found)

    def shapes(self, dtype: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arrays, of one type."""
        return tuple(jax.ShapeDtypeStruct(leaf.shape, dtype) for leaf in self.leaves)

    def arrays(self, key: jax.Array, dtype: str) -> tuple[jax.Array, ...]:
        """The arrays with normal numbers."""
        keys = jax.random.split(key, len(self.leaves))
        return tuple(
            jax.random.normal(key, leaf.shape).astype(dtype)
            for key, leaf in zip(keys, self.leaves, strict=True)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decoder:
    """The sizes of a model that decide its parameters; the head is left out.

    Attributes:
        layers: of the stack.
        width: of the residual stream.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of each.
        hidden: of the feed-forward layers.
        vocabulary: rows of the embedding.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int

    def tree(self, parts: int, narrow: int) -> _Tree:
        """Arrays of one of so many devices that share the width, cut for as many."""
        layers, own, head_dim = self.layers, self.width // parts, self.head_dim
        leaves = (
            _Leaf(shape=(self.vocabulary, own), axis=0),
            _Leaf(shape=(layers, own, self.heads, head_dim), axis=2),
            _Leaf(shape=(layers, own, self.kv_heads, head_dim), axis=2),
            _Leaf(shape=(layers, own, self.kv_heads, head_dim), axis=2),
            _Leaf(shape=(layers, self.heads, head_dim, own), axis=1),
            _Leaf(shape=(layers, own, self.hidden), axis=2),
            _Leaf(shape=(layers, own, self.hidden), axis=2),
            _Leaf(shape=(layers, self.hidden, own), axis=1),
            _Leaf(shape=(layers, self.width)),
            _Leaf(shape=(layers, self.width)),
        )
        return _Tree(leaves=leaves, parts=parts, narrow=narrow)


LLAMA_1B = _Decoder(
    layers=16,
    width=2048,
    heads=32,
    kv_heads=8,
    head_dim=64,
    hidden=8192,
    vocabulary=128256,
)
LLAMA_8B = _Decoder(
    layers=32,
    width=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    hidden=14336,
    vocabulary=128256,
)
# A quarter of the 28 layers, so that arrays and buffer fit beside each other. Eight
# devices would share 3584 numbers by 448, which granules of 128 do not divide.
QWEN_7B = _Decoder(
    layers=7,
    width=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    hidden=18944,
    vocabulary=152064,
)


def cases() -> tuple[Case, ...]:
    """The cases, tiny ones first."""
    return (
        *_tiny_cases(),
        *_cases_of("llama-3.1-8b, an eighth for eight", LLAMA_8B.tree(8, 80)),
        *_cases_of("llama-3.2-1b whole", LLAMA_1B.tree(1, 40)),
        *_cases_of("qwen-2.5-7b, 7 layers, a quarter for four", QWEN_7B.tree(4, 115)),
    )


def _tiny_cases() -> tuple[Case, ...]:
    # Pieces of a single granule, an array that is one, and dimensions that do not join.
    columns = _Tree(
        leaves=(
            _Leaf(shape=(3, 4, 256), axis=2),
            _Leaf(shape=(2, 256), axis=1),
            _Leaf(shape=(128,)),
        ),
        parts=2,
        narrow=100,
    )
    middle = _Tree(
        leaves=(_Leaf(shape=(2, 2, 3, 128), axis=2), _Leaf(shape=(6, 384), axis=0)),
        parts=3,
        narrow=100,
    )
    return (
        _pack("columns", columns, "float32", "bfloat16", is_tiny=True),
        _pack("middle", middle, "bfloat16", "bfloat16", is_tiny=True),
        _unpack("columns", columns, "bfloat16", "float32", is_tiny=True),
        _unpack("columns", columns, "bfloat16", "float32", eta=ETA, is_tiny=True),
        _unpack("middle", middle, "float32", "bfloat16", eta=ETA, is_tiny=True),
        _unpack("middle", middle, "bfloat16", "bfloat16", is_data=True, is_tiny=True),
    )


def _cases_of(name: str, tree: _Tree) -> tuple[Case, ...]:
    return (
        _pack(name, tree, "float32", "bfloat16"),
        _pack(name, tree, "bfloat16", "bfloat16"),
        _unpack(name, tree, "bfloat16", "bfloat16"),
        _unpack(name, tree, "bfloat16", "float32", eta=ETA),
        _unpack(name, tree, "bfloat16", "float32", eta=ETA, is_data=True),
    )


def _pack(
    name: str, tree: _Tree, source: str, target: str, *, is_tiny: bool = False
) -> Case:
    """Pieces of arrays into one buffer."""
    blocks = tree.blocks()
    pairs, shape = packing(blocks)
    buffer = jax.ShapeDtypeStruct(shape, target)
    request = request_of(
        tree.shapes(source), [buffer], pairs, is_mixed=False, device=_dispatch.H200
    )

    def with_layout(layout: mosaic.Blocks | None) -> Any:
        def run(*arrays: jax.Array) -> jax.Array:
            request = request_of(arrays, [buffer], pairs, is_mixed=False)
            empty = jax.lax.empty(shape, np.dtype(target))
            return mosaic.run(arrays, [empty], request, layout=layout)[0]

        return run

    return Case(
        operation="interval_copy",
        name=f"pack {source} to {target}, {name}",
        is_tiny=is_tiny,
        inputs=lambda key: tree.arrays(key, source),
        implementations={
            "mosaic": lambda *arrays: pack(
                arrays, blocks, dtype=target, implementation="mosaic"
            ),
            "slices": lambda *arrays: pack(
                arrays, blocks, dtype=target, implementation="slices"
            ),
        },
        reference=lambda *arrays: reference.pack(
            [np.asarray(array) for array in arrays], blocks, target
        ),
        tolerance=TOLERANCE,
        num_bytes=_bytes(tree, source, target),
        goal=0.8,
        limits=_limits(tree),
        gpus=("h200", "a100"),
        candidates=mosaic.candidates(request),
        with_blocks=with_layout,
        tuning_key=_tuning_key(request),
    )


def _unpack(
    name: str,
    tree: _Tree,
    source: str,
    target: str,
    *,
    eta: float | None = None,
    is_data: bool = False,
    is_tiny: bool = False,
) -> Case:
    """Pieces of a buffer to their places, into all arrays at once.

    Args:
        name: of the tree.
        tree: the arrays.
        source: type of the buffer.
        target: type of the arrays.
        eta: the weight of an average; None copies.
        is_data: the plan is an input, and not known when the program is compiled.
        is_tiny: see `Case`.
    """
    pairs = [(there, here) for here, there in packing(tree.blocks())[0]]
    buffer = jax.ShapeDtypeStruct((tree.num_elements,), source)
    plan = plan_copy([buffer], tree.shapes(target), pairs)
    request = request_of(
        *([buffer], tree.shapes(target), pairs),
        is_mixed=eta is not None,
        device=_dispatch.H200,
    )

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        one, other = jax.random.split(key)
        values = jax.random.normal(one, buffer.shape).astype(source)
        tables = [jnp.asarray(table) for table in plan.tables] if is_data else []
        return (values, *tree.arrays(other, target), *tables)

    def with_layout(layout: mosaic.Blocks | None) -> Any:
        def run(buffer: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
            request = request_of([buffer], arrays, pairs, is_mixed=eta is not None)
            return mosaic.run([buffer], arrays, request, eta=eta, layout=layout)

        def run_data(buffer: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
            given = dataclasses.replace(plan, tables=arrays[-1:])
            return copy([buffer], arrays[:-1], given, eta=eta, layout=layout)

        return run_data if is_data else run

    def by_slices(buffer: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        return _each(slices.unpack, buffer, arrays[: len(tree.leaves)], pairs, eta)

    def by_definition(buffer: Any, *arrays: Any) -> list[Any]:
        known = [np.asarray(array) for array in arrays[: len(tree.leaves)]]
        return _each(reference.unpack, np.asarray(buffer), known, pairs, eta)

    what = "average" if eta is not None else "copy"
    how = ", plan as data" if is_data else ""
    return Case(
        operation="interval_copy",
        name=f"unpack {source} to {target}, {what}, {name}{how}",
        is_tiny=is_tiny,
        inputs=inputs,
        implementations={"mosaic": with_layout(None), "slices": by_slices},
        reference=by_definition,
        tolerance=TOLERANCE,
        num_bytes=_bytes(tree, source, target, is_mixed=eta is not None),
        goal=0.8,
        limits=_limits(tree),
        gpus=("h200", "a100"),
        donated=tuple(range(1, 1 + len(tree.leaves))),
        candidates=mosaic.candidates(request),
        with_blocks=with_layout,
        tuning_key=_tuning_key(request),
    )


def _each(
    unpack: Any, buffer: Any, arrays: Any, pairs: list[Pair], eta: float | None
) -> list[Any]:
    """Unpack one array after the other."""
    made = []
    for number, array in enumerate(arrays):
        own = [pair for pair in pairs if pair[1].input == number]
        made.append(
            unpack(
                [buffer],
                [here for here, _ in own],
                [there.start for _, there in own],
                shape=array.shape,
                dtype=array.dtype,
                into=array,
                eta=eta,
            )
        )
    return made


def _tuning_key(request: Request) -> str:
    plan = plans.plan_of(request.rows, mosaic.LARGEST_GRANULE)
    return _tuning.key_of(*mosaic.tuning_of(request, plan))


def _bytes(tree: _Tree, source: str, target: str, *, is_mixed: bool = False) -> int:
    read, written = np.dtype(source).itemsize, np.dtype(target).itemsize
    return tree.num_elements * (read + written * (2 if is_mixed else 1))


def _limits(tree: _Tree) -> Limits:
    # A program that returns several arrays has a table of their places.
    return Limits(temporary_bytes=256, least_access_bytes=8, small_accesses=tree.narrow)
