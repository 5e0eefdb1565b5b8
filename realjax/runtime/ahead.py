"""Rollouts that are a step ahead of the training: staleness 1.

    step 1    rollout 1, rollout 2    train on 1
    step 2    rollout 3               train on 2
    …
    step k    rollout k + 1           train on k
    last      -                       train on the last one

A rollout of step k draws with the parameters as they are before step k changes them,
so step k + 1 trains on what the policy of one step ago has sampled. The first step has
no step before it: its own rollout is of the parameters it begins with, and there the
training is on-policy.

Keys of draws are those of the step that trains. A policy that does not change samples
the same with staleness 0 and 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from realjax.core.arrays import PyTree
from realjax.core.batch import Batch
from realjax.dataflow.buffer import Buffer
from realjax.realloc.transfer import Traffic
from realjax.runtime.calls import Calls
from realjax.runtime.measures import Metrics
from realjax.runtime.parameters import VersionError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """What calls that run a step ahead have made for a step.

    Attributes:
        step: that trains on it.
        data_ids: of the batch it was drawn for, [B].
        buffer: holds it.
        metrics: of the calls that made it; numbers.
        versions: how often each role that sampled had been changed by then.
    """

    step: int
    data_ids: np.ndarray
    buffer: Buffer
    metrics: Metrics
    versions: Mapping[str, int]


class Ahead:
    """Keeps what was drawn for the next step.

    Attributes:
        names: of the calls that run a step ahead, in the order of the graph.
        waiting: for the next step; None before the first step and after the last.
    """

    def __init__(self, calls: Calls):
        """Nothing waits yet."""
        self.calls, graph = calls, calls.graph
        self.names = [name for name in graph.order() if graph.calls[name].staleness]
        self.waiting: Drawn | None = None

    def begin(self, batch: Batch, step: int, traffic: Traffic) -> Drawn:
        """What calls are about to draw for a step, with the parameters as they are.

        Args:
            batch: of the data set, for that step.
            step: that will train on it.
            traffic: counts what moves between meshes; added to.
        """
        store, graph = self.calls.store, self.calls.graph
        roles = {graph.calls[name].role or "" for name in self.names}
        return Drawn(
            step=step,
            data_ids=batch.ids,
            buffer=Buffer(batch, traffic),
            metrics={},
            versions={role: store.version(role) for role in roles},
        )

    def take(self, batch: Batch, step: int, traffic: Traffic) -> Drawn | None:
        """What the step before has drawn for this one; None in the first step.

        It stays what waits until `wait_with` says that this step is done: a step that
        fails before it has learned anything can be done again.

        Args:
            batch: of the data set, for this step.
            step: that will train on it.
            traffic: counts what moves between meshes from now on; added to.

        Raises:
            ValueError: it was drawn for another step, or for other data.
            VersionError: it was not drawn by the policy of one step ago.
        """
        found = self.waiting
        if found is None:
            return None
        if found.step != step or not np.array_equal(found.data_ids, batch.ids):
            raise ValueError(
                f"What was drawn ahead is for step {found.step} and data "
                f"{found.data_ids[:4].tolist()}…, and this is step {step} with data "
                f"{batch.ids[:4].tolist()}…. Run steps in order, each with the batch "
                "that the step before was given as `ahead`."
            )
        for role, version in found.versions.items():
            changes = self.calls.store.version(role) - version
            if changes != self._changes_per_step(role):
                raise VersionError(
                    f"The {role} has been changed {changes} times since it drew what "
                    f"step {step} trains on, and with staleness 1 it is "
                    f"{self._changes_per_step(role)}. Parameters set between steps "
                    "make a rollout older than its graph says: begin anew, or go on "
                    "from a checkpoint."
                )
        found.buffer.begin_step(traffic)
        return found

    def wait_with(self, drawn: Drawn | None) -> None:
        """Keeps what a step that is done has drawn; None after the last one."""
        self.waiting = drawn

    def staleness(self, drawn: Drawn) -> float:
        """How often the roles that sampled were changed since, at most."""
        version = self.calls.store.version
        return float(max(version(r) - v for r, v in drawn.versions.items()))

    def _changes_per_step(self, role: str) -> int:
        return sum(call.changes_role for call in self.calls.graph.of(role))

    # -- checkpoints ---------------------------------------------------------------

    @property
    def states(self) -> dict[str, PyTree]:
        """Arrays that a checkpoint must hold, by call; none where nothing waits."""
        if self.waiting is None:
            return {}
        buffer, calls = self.waiting.buffer, self.calls.graph.calls
        return {
            # A set that kept everything is not there.
            name: {k: buffer.value(k) for k in calls[name].writes if k in buffer}
            for name in self.names
        }

    @property
    def notes(self) -> dict[str, Any]:
        """What else a checkpoint must hold: plain values; none if nothing waits."""
        if self.waiting is None:
            return {}
        lengths = self.waiting.buffer.lengths
        return {
            "step": self.waiting.step,
            "lengths": {key: lengths[key].tolist() for key in self._token_keys()},
            "metrics": self.waiting.metrics,
        }

    def described(self, num_prompts: int) -> dict[str, PyTree]:
        """Shapes and shardings of `states`.

        Args:
            num_prompts: of a training batch.
        """
        found = {}
        for name in self.names:
            node = self.calls.graph.calls[name]
            rollout = self.calls.programs.get(name, num_prompts).described(num_prompts)
            found[name] = {
                node.key(key): value
                for key in node.function.writes
                if (value := getattr(rollout, key)) is not None
            }
        return found

    def restore(
        self, batch: Batch, states: Mapping[str, PyTree], notes: Mapping[str, Any]
    ) -> None:
        """Lets what a checkpoint holds wait again.

        Args:
            batch: of the data set, for the step that trains on it.
            states: like `states`.
            notes: what `notes` was.
        """
        drawn = self.begin(batch, int(notes["step"]), Traffic())
        for name in self.names:
            spec = self.calls.graph.calls[name].function
            drawn.buffer.repeat(spec.completions_per_prompt)  # pyright: ignore[reportAttributeAccessIssue]: it generates
            for key, value in states[name].items():
                drawn.buffer.put(key, value)
        for key, lengths in notes["lengths"].items():
            drawn.buffer.lengths[key] = np.asarray(lengths, np.int32)
        versions = {
            role: version - self._changes_per_step(role)
            for role, version in drawn.versions.items()
        }
        self.waiting = dataclasses.replace(
            drawn, metrics=dict(notes["metrics"]), versions=versions
        )

    def _token_keys(self) -> list[str]:
        return [self.calls.graph.calls[name].key("tokens") for name in self.names]
