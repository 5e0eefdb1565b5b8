"""The links between devices that a plan copies over, to be checked at the start."""

import jax

from realjax.core.arrays import PyTree
from realjax.dataflow.schedule import Move
from realjax.models import transformer
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import rows_sharding
from realjax.realloc.links import links_used
from realjax.runtime.executor import Executor


def plan_links(executor: Executor, num_rows: int, width: int) -> set[tuple[int, int]]:
    """Return the pairs of devices, by id, that parameters or batch keys pass between.

    Args:
        executor: whose schedule it is.
        num_rows: B, rows of the batch.
        width: T, tokens of a row.
    """
    store, graph, plan = executor.store, executor.graph, executor.plan
    found: set[tuple[int, int]] = set()
    for step in executor.steps:
        if isinstance(step, Move):
            home = store.homes[step.role]
            model = transformer.abstract_parameters(store.models[step.role])
            tree = jax.tree.map(
                lambda leaf, sharding, dtype=home.dtype: jax.ShapeDtypeStruct(
                    leaf.shape, jax.numpy.dtype(dtype), sharding=sharding
                ),
                model,
                store.shardings(step.role, home),
                is_leaf=lambda node: hasattr(node, "axes"),
            )
            found |= links_used(tree, store.shardings(step.role, step.place))
    for name, place in plan.calls.items():
        for parent in graph.parents(name) & plan.calls.keys():
            rows = [
                rows_sharding(make_mesh(call.allocation), num_rows)
                for call in (plan.calls[parent], place)
            ]
            key: PyTree = jax.ShapeDtypeStruct(
                (num_rows, width), jax.numpy.int32, sharding=rows[0]
            )
            found |= links_used(key, rows[1])
    return {(source, target) for source, target in found if source != target}
