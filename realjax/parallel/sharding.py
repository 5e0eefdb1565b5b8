"""Shardings: a table from what a dimension means to the mesh axes that split it.

Models name the dimensions of parameters and activations ("vocab", "heads", …) and
know no mesh; `AXES` says which mesh axes split each name.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from realjax.core.arrays import Array, PyTree
from realjax.models.axes import Axes, Constrain
from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation

AXES: Mapping[str, tuple[str, ...]] = {
    # parameters
    "vocab": ("stage", "tensor"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),  # replicated where tensor does not divide it
    "mlp": ("tensor",),
    "mlp_in": ("tensor", "fsdp"),
    "embed": ("fsdp",),
    "norm": (),
    "head_dim": (),
    "layer": ("stage",),
    "expert": ("expert",),
    # activations
    "batch": ("data", "fsdp", "expert"),
    "pages": ("data", "fsdp", "expert"),  # where the rows are that have them
    "wide_batch": ("data", "expert"),  # next to "embed", which is over fsdp
    "length": (),
    "embed_act": (),
    "slots": (),
}
"""Mesh axes that split a dimension, by the dimension's name."""


def parameter_shardings(
    abstract_tree: PyTree,
    mesh: Mesh | AbstractMesh,
    *,
    options: frozenset[str] = frozenset(),
) -> PyTree:
    """Return the sharding of every parameter.

    Args:
        abstract_tree: Leaves with `shape` and `axes` (the abstract twin of a model's
            parameters), or bare tuples of axis names, which are taken to divide.
        mesh: The mesh of the call; an abstract one will do for counting.
        options: The options of its allocation. With `zero1` fsdp cuts no parameter;
            the optimizer's state lies as parameters do without it.

    Returns:
        The same tree with `NamedSharding` leaves.

    Raises:
        ValueError: a dimension that its mesh axes do not divide, other than kv_heads
            (those are replicated: each tensor part needs the heads its queries use).
    """

    def leaf_sharding(path: Any, leaf: Any) -> NamedSharding:
        axes = getattr(leaf, "axes", leaf)
        shape = getattr(leaf, "shape", None)
        without = {"fsdp"} if "zero1" in options else set()
        name = jax.tree_util.keystr(path)
        spec = _parameter_spec(name, shape, axes, mesh, without)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
        leaf_sharding, abstract_tree, is_leaf=_is_abstract_leaf
    )


def constrain_for(mesh: Mesh, *, options: frozenset[str] = frozenset()) -> Constrain:
    """Return `constrain(x, axes)`, which pins the sharding of an activation.

    Mesh axes that do not divide a dimension are dropped, the last first: two rows on
    d2f2 are split over data alone. With the option `sequence`, activations of width
    "embed_act" or "embed" are also split over tensor along "length".

    Args:
        mesh: The mesh of the call.
        options: The options of its allocation.
    """

    def constrain(x: Array, axes: Axes) -> Array:
        if mesh.size == 1:
            return x
        manual = manual_axes()
        spec = _activation_spec(x.shape, axes, mesh, "sequence" in options, manual)
        # Where `shard_map` split some axes by hand, the mesh around says so.
        around = jax.sharding.get_abstract_mesh() if manual else mesh
        return jax.lax.with_sharding_constraint(x, NamedSharding(around, spec))

    return constrain


def is_axes(node: Any) -> bool:
    """Tell a bare tuple of axis names, a leaf, from containers."""
    # A named tuple (an optimizer's state, say) is a container even when empty.
    return type(node) is tuple and all(n is None or isinstance(n, str) for n in node)


def axes_spec(
    axes: Axes, mesh: Mesh, *, without: Collection[str] = ()
) -> PartitionSpec:
    """Return how axes cut an array whose sizes they divide; some mesh axes do not."""
    dimensions = (_mesh_axes(name) for name in axes)
    return _spec([[a for a in found if a not in without] for found in dimensions], mesh)


def indivisible_axes(size: int, name: str | None, mesh: Mesh) -> tuple[str, ...]:
    """Return the mesh axes of a dimension to leave out so that the others divide it."""
    axes = _mesh_axes(name)
    kept = len(axes)
    while size % num_parts(axes[:kept], mesh):
        kept -= 1
    return axes[kept:]


def manual_axes() -> frozenset[str]:
    """Return the mesh axes that a `shard_map` around this code has split by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset() if mesh.empty else frozenset(mesh.manual_axes)


def rows_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """Split `size` rows over the axes of rows; replicate where they do not divide."""
    axes = AXES["batch"]
    if size % num_parts(axes, mesh):
        return replicated(mesh)
    return NamedSharding(mesh, _spec([axes], mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Put a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def handles(described: PyTree) -> PyTree:
    """Make arrays of which this process holds nothing: they stand for others' arrays.

    Args:
        described: `ShapeDtypeStruct`s with shardings over other processes' devices.
    """
    return jax.tree.map(
        lambda leaf: jax.make_array_from_single_device_arrays(
            leaf.shape, leaf.sharding, [], dtype=leaf.dtype
        ),
        described,
    )


def bytes_per_device(
    abstract_tree: PyTree,
    mesh: Mesh | AbstractMesh,
    *,
    dtype: Any = np.float32,
    options: frozenset[str] = frozenset(),
) -> int:
    """Count the bytes of parameters that each device of the mesh will hold.

    Args:
        abstract_tree: Leaves with `shape` and `axes`.
        mesh: The mesh of the call.
        dtype: Type of the stored parameters; masters are float32. A leaf may have its
            own (`dtype`).
        options: As in `parameter_shardings`.
    """
    leaves = jax.tree.leaves(abstract_tree, is_leaf=_is_abstract_leaf)
    shardings = parameter_shardings(abstract_tree, mesh, options=options)
    return sum(
        math.prod(sharding.shard_shape(tuple(leaf.shape)))
        * np.dtype(getattr(leaf, "dtype", "") or dtype).itemsize
        for leaf, sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    )


def padded_for(
    model_config: ModelConfig, allocations: Iterable[Allocation]
) -> ModelConfig:
    """Pad the vocabulary and the stack of layers so that every strategy divides them.

    The vocabulary also over fsdp, which cuts it while tokens are scored.

    Args:
        model_config: The model of one role.
        allocations: Of all calls of the role, so that they share one parameter tree.
    """
    allocations = tuple(allocations)
    return dataclasses.replace(
        model_config,
        vocab_multiple=math.lcm(*(a.stage * a.tensor * a.fsdp for a in allocations)),
        layer_multiple=math.lcm(*(a.stage for a in allocations)),
    )


def check_fit(
    allocation: Allocation,
    model_config: ModelConfig,
    *,
    batch_rows: int | None = None,
) -> None:
    """Check that a model, and the rows of a microbatch, divide over an allocation.

    Key and value heads need not divide: those are replicated over tensor. Nor need the
    vocabulary and the layers, which `padded_for` pads.

    Args:
        allocation: What the call is given.
        model_config: The model of the call.
        batch_rows: Packed rows, or sequences, of one microbatch.

    Raises:
        ValueError: everything that does not divide, with the sizes that would.
    """
    rows_parts = allocation.num_row_shards
    mlp_parts = allocation.tensor
    if model_config.moe is None:
        mlp_parts *= allocation.fsdp
    needs = [
        ("tensor", allocation.tensor, "num_heads", model_config.num_heads),
        ("tensor × fsdp", mlp_parts, "mlp_width", model_config.mlp_width),
        ("fsdp", allocation.fsdp, "width", model_config.width),
        ("data × fsdp × expert", rows_parts, "rows of a microbatch", batch_rows or 0),
    ]
    if model_config.moe is None and allocation.expert > 1:
        raise ValueError(
            f"Allocation {allocation} splits experts over {allocation.expert} parts,"
            " and the model has none. Write d or f in the place of e."
        )
    if model_config.moe is not None:
        experts = ("num_experts", model_config.moe.num_experts)
        needs.append(("expert", allocation.expert, *experts))
    problems = [
        f"{axes}={parts} does not divide {name}={size}"
        f" (sizes up to {allocation.size} that do: {_divisors(size, allocation.size)})"
        for axes, parts, name, size in needs
        if size % parts
    ]
    if problems:
        raise ValueError(
            f"Allocation {allocation} does not fit: {'; '.join(problems)}. Choose a"
            " strategy whose parts are equal, or change the model or the batch."
        )


def _divisors(size: int, largest: int) -> str:
    return ", ".join(str(n) for n in range(1, largest + 1) if size % n == 0)


def _is_abstract_leaf(node: Any) -> bool:
    """Tell leaves with `axes`, and bare tuples of axis names, from containers."""
    return hasattr(node, "axes") or is_axes(node)


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in AXES:
        raise ValueError(
            f"Unknown dimension name {name!r}. Names are: {', '.join(AXES)}. Add it to"
            " the table in realjax/parallel/sharding.py, or name the dimension None."
        )
    return AXES[name]


def num_parts(axes: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    """Count the parts that some axes of a mesh make."""
    return math.prod(mesh.shape[axis] for axis in axes)


def _spec(
    dimensions: Sequence[Sequence[str]], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Write one canonical spec for one layout, so that equal layouts compile once."""
    entries: list[str | tuple[str, ...] | None] = []
    for axes in dimensions:
        split = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        entries.append(split[0] if len(split) == 1 else split or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _check_rank(what: str, shape: Sequence[int], axes: Axes) -> None:
    if len(shape) != len(axes):
        raise ValueError(
            f"{what} has shape {tuple(shape)} and {len(axes)} axis names"
            f" {tuple(axes)}. Name every dimension once (None where it has no name)."
        )


def _parameter_spec(
    path: str,
    shape: Sequence[int] | None,
    axes: Axes,
    mesh: Mesh | AbstractMesh,
    without: Collection[str] = (),
) -> PartitionSpec:
    dimensions = [
        tuple(axis for axis in _mesh_axes(name) if axis not in without) for name in axes
    ]
    if shape is None:
        return _spec(dimensions, mesh)
    _check_rank(f"Parameter {path}", shape, axes)
    for index, (size, name) in enumerate(zip(shape, axes, strict=True)):
        parts = num_parts(dimensions[index], mesh)
        if size % parts == 0:
            continue
        if name != "kv_heads":
            raise ValueError(
                f"Parameter {path} of shape {tuple(shape)}: its {name!r} dimension of"
                f" {size} does not divide over {'×'.join(dimensions[index])}={parts}."
                " Choose a size that divides it, or pad the model."
            )
        dimensions[index] = ()
    return _spec(dimensions, mesh)


def _activation_spec(
    shape: Sequence[int],
    axes: Axes,
    mesh: Mesh,
    is_sequence_split: bool,
    manual: frozenset[str],
) -> PartitionSpec:
    _check_rank("An activation", shape, axes)
    dimensions: list[tuple[str, ...]] = []
    has_width = "embed_act" in axes or "embed" in axes
    for size, name in zip(shape, axes, strict=True):
        split = tuple(axis for axis in _mesh_axes(name) if axis not in manual)
        if is_sequence_split and name == "length" and has_width:
            split = () if "tensor" in manual else ("tensor",)
        while size % num_parts(split, mesh):
            split = split[:-1]
        dimensions.append(split)
    return _spec(dimensions, mesh)
