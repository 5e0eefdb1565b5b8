"""The mixing weight: a moving average of parameters that lie elsewhere.

    target = eta source + (1 - eta) target

is one reallocation of the source, which meets the target where it arrives: in the join
of its pieces, or in the jitted identity. Arithmetic is in float32 and the target keeps
its type, so averages belong in float32: in bfloat16, whose neighbours of 1 are 2^-8 and
2^-7 away, a step of eta = 1e-3 is lost to rounding (which is how ReaL's average of its
reference stands still).
"""

from typing import Any

import jax
import jax.numpy as jnp

from realjax.core.arrays import Array, PyTree
from realjax.realloc.plans import make_plan, weight_of
from realjax.realloc.requests import Request
from realjax.realloc.traffic import Traffic
from realjax.realloc.transfer import check_arrays, naming


def mix(
    source: PyTree,
    target: PyTree,
    *,
    eta: float | Array,
    donate: bool = False,
    traffic: Traffic | None = None,
    chunk_bytes: int | None = None,
) -> PyTree:
    """Return the target, moved towards the source by a weight.

    Arrays are matched by their paths. Those that the source lacks stay as they are, so
    a policy may be mixed into the trunk of a critic, whose head has another name; so do
    those that are not of a floating type.

    Args:
        source: Arrays in device memory, on any devices and of any floating type.
        target: The same, where the result shall lie and of the type it shall have.
        eta: The weight of the source, a number or an array of no dimensions. Another
            number compiles nothing.
        donate: The averaged arrays of the target are used up, and their memory is that
            of the result. Nothing else may share their buffers.
        traffic: Counts what moves; added to.
        chunk_bytes: See `reallocate`.

    Raises:
        ValueError: nothing is shared, two arrays of one path differ in shape, or as
            `reallocate`.
    """
    pairs = _shared(source, target)
    sources = {name: array for name, (array, _) in pairs.items()}
    targets = {name: array for name, (_, array) in pairs.items()}
    for tree in (sources, targets):
        check_arrays(list(tree.values()), tree)
    requests = tuple(
        Request(old.sharding, new.sharding, old.shape, old.dtype, new.dtype, True)
        for old, new in zip(sources.values(), targets.values(), strict=True)
    )
    is_own = all(old is not new for old, new in pairs.values())
    with naming(targets):
        plan = make_plan(
            requests,
            is_shared=False,
            is_donated=donate and is_own,
            chunk_bytes=chunk_bytes,
        )
    if traffic is not None:
        traffic.merge(plan.traffic)
    mixed = plan.run(
        list(sources.values()), list(targets.values()), weight=weight_of(eta)
    )
    done = dict(zip(targets, mixed, strict=True))
    return jax.tree.map_with_path(
        lambda path, leaf: done.get(_name(path), leaf), target
    )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shared(source: PyTree, target: PyTree) -> dict[str, tuple[Any, Any]]:
    """Match the arrays that are averaged, in the order that a dict would be sorted."""
    sources, targets = (
        {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (source, target)
    )
    both = sorted(sources.keys() & targets.keys())
    if not both:
        raise ValueError(
            f"Source and target share no array: found {_some(sources)} and"
            f" {_some(targets)}. Give the parameters of two roles of one model."
        )
    for name in both:
        shapes = sources[name].shape, targets[name].shape
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} has shape {shapes[0]} in the source and {shapes[1]} in the"
                " target. Arrays of one path must be alike: leave this one out of one"
                " of them to keep the target's."
            )
    return {
        name: (sources[name], targets[name])
        for name in both
        if jnp.issubdtype(targets[name].dtype, jnp.floating)
    }


def _some(names: dict[str, Any]) -> str:
    return ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")
