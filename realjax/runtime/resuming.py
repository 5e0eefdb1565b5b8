"""What a checkpoint holds of a run's executor, and going on from it.

    policy/…, critic/…      masters and moments of roles that calls change
    state_<call>/…          of transforms, and completions that are carried on
    ahead_<call>/…          what was drawn for the next step, with staleness 1

and beside the arrays, as plain values, what belongs to the last two.
"""

from collections.abc import Mapping
from typing import Any

import jax

from realjax.core.arrays import PyTree
from realjax.data.loader import Loader
from realjax.runtime import named_arrays
from realjax.runtime.checkpoint import Checkpointer, Restored
from realjax.runtime.executor import Executor


def saved_arrays(executor: Executor) -> dict[str, PyTree]:
    """Trees of arrays that a checkpoint must hold."""
    store = executor.store
    return {
        **{role: store.saved_state(role) for role in executor.graph.changed_roles},
        **_named("state", executor.calls.states),
        **_named("ahead", executor.ahead.states),
    }


def saved_notes(executor: Executor) -> dict[str, Any]:
    """Plain values that a checkpoint must hold beside them."""
    return {
        "carried": executor.calls.generating.notes,
        "ahead": executor.ahead.notes,
    }


def restore(
    executor: Executor, checkpointer: Checkpointer, loader: Loader, *, num_prompts: int
) -> Restored:
    """Goes on from the last complete checkpoint, on whatever allocation there is now.

    Args:
        executor: whose parameters and states these will be.
        checkpointer: of the run.
        loader: of the training data, which goes on as well.
        num_prompts: of a training batch.
    """
    store, roles = executor.store, executor.graph.changed_roles
    calls, ahead = executor.calls, executor.ahead
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    abstract = jax.tree.map(shape, saved_arrays(executor))
    real = store.real_shapes(named_arrays.flatten(abstract))
    described = _named("ahead", ahead.described(num_prompts))

    def wanted(metadata: Mapping[str, Any]) -> dict[str, PyTree]:
        """Nothing waits after a run's last step."""
        return abstract | (described if metadata.get("ahead") else {})

    store.forget(roles)  # Beside what is restored, it might not fit.
    found = checkpointer.restore_latest(wanted, real=real)
    for role in roles:
        store.restore(role, found.arrays[role])
    states = {name: found.arrays[f"state_{name}"] for name in calls.states}
    calls.restore(states, found.metadata.get("carried", {}))
    loader.restore(found.metadata["loader"])
    if notes := found.metadata.get("ahead"):
        states = {name: found.arrays[f"ahead_{name}"] for name in ahead.names}
        ahead.restore(loader.peek_batch(), states, notes)
    return found


def _named(prefix: str, trees: Mapping[str, PyTree]) -> dict[str, PyTree]:
    return {f"{prefix}_{name}": tree for name, tree in trees.items()}
