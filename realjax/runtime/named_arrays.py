"""Trees as arrays with names, and as Orbax wants to be asked for them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from realjax.core.arrays import PyTree

type Trees = Mapping[str, PyTree]


def flatten(trees: Trees) -> dict[str, Any]:
    """Leaves by path, "policy/layers/mlp/up/kernel"; numbers become numpy arrays.

    Raises:
        TypeError: naming a leaf that is no array.
        ValueError: two leaves have the same path.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(trees))[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, bool | int | float | np.generic):
            leaf = np.asarray(leaf)
        is_array = isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
        if not is_array or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{name} is {type(leaf).__name__}, and a checkpoint holds arrays and "
                "numbers. Keys go in as jax.random.key_data(key), text as metadata."
            )
        if name in leaves:
            raise ValueError(f"Two arrays have the path {name}; rename one.")
        leaves[name] = leaf
    return leaves


def unflatten(trees: Trees, leaves: Mapping[str, Any]) -> dict[str, PyTree]:
    """Trees of the same structure with these leaves."""
    named, structure = jax.tree_util.tree_flatten_with_path(dict(trees))
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named
    ]
    return jax.tree_util.tree_unflatten(structure, [leaves[name] for name in names])


def restoring(wanted: Mapping[str, Any]) -> ocp.args.PyTreeRestore:
    """How Orbax is to read leaves, some of those that are stored.

    Onto the sharding of each, or as numpy without one. Of another size than what is
    stored, it is cut or padded with zeros at its end; the caller has checked that only
    padding is meant.
    """
    return ocp.args.PyTreeRestore(
        {name: _blank(leaf) for name, leaf in wanted.items()},
        restore_args={name: _restore_args(leaf) for name, leaf in wanted.items()},
        partial_restore=True,
    )


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(
        sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False
    )


def _blank(leaf: Any) -> Any:
    """A stand-in for a leaf that tells Orbax its kind, shape and dtype."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        # One element, seen everywhere: it takes no memory.
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def without_elements(leaf: Any) -> Any:
    """An array without elements, which Orbax does not store."""
    array = np.zeros(leaf.shape, leaf.dtype)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return array
    return jax.make_array_from_callback(
        leaf.shape, sharding, array.__getitem__, dtype=leaf.dtype
    )
