"""What a run keeps when a reward function ends it within a step.

    step k ─▶ save?  ─▶ rollout ─▶ reward ✗      nothing has learned yet

The state is then still that after step k, and can be saved as such, however long ago
the last checkpoint was.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax

from realjax.data.loader import Loader
from realjax.functions.score import RewardError
from realjax.runtime.checkpoint import Checkpointer
from realjax.runtime.executor import Executor


@contextlib.contextmanager
def rescuing(
    executor: Executor,
    loader: Loader,
    checkpointer: Checkpointer,
    save: Callable[[], None],
    *,
    step: int,
) -> Iterator[None]:
    """Saves what was learned before a step, if a reward function fails in it.

    Not where something has gone on since it began, a role or a transform, or where
    completions are carried on; and not in a run of several processes, of which the
    others may be anywhere in the step. The last checkpoint then stands.

    Args:
        executor: of the steps.
        loader: of the training data; put back to where it was.
        checkpointer: of the run.
        save: writes a checkpoint.
        step: that is done.
    """
    state, versions = loader.state(), _versions(executor)
    transforms = dict(executor.calls.transform_states)
    try:
        yield
    except RewardError:
        checkpointer.wait()
        calls = executor.calls
        is_same = _versions(executor) == versions and all(
            calls.transform_states[name] is one for name, one in transforms.items()
        )
        has_rest = bool(calls.generating.carries)
        is_new = step > (checkpointer.latest_step() or 0)
        if is_new and is_same and not has_rest and jax.process_count() == 1:
            loader.restore(state)
            save()
            checkpointer.wait()
        raise


def _versions(executor: Executor) -> dict[str, int]:
    """How often each role was changed."""
    roles = executor.graph.changed_roles
    return {role: executor.store.version(role) for role in roles}
