"""What follows a generating call, on groups that have ended while others are sampled.

    sample ──┬────────┬────────┬──────────▶
             └▶ infer └▶ infer └▶ infer      a portion each

The results are those of one portion, the whole batch.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, Int
from realjax.core.batch import Batch
from realjax.dataflow.buffer import Buffer
from realjax.dataflow.graph import ModelFunctionCall
from realjax.functions.function import Generate, Infer, Score
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import handles, rows_sharding
from realjax.rollout.rows import Rollout
from realjax.rollout.session import Session
from realjax.runtime import cluster
from realjax.runtime.measures import Metrics

if TYPE_CHECKING:
    from realjax.runtime.calls import Calls, Pass


class Groups:
    """The completions of each prompt, and which have all ended.

    Attributes:
        size: completions of a prompt.
        rows: of each group, [G, size], in the rollout's numbers.
    """

    def __init__(self, first_rows: Int[np.ndarray, " G"], size: int):
        """Takes the first row of every group."""
        self.size = size
        self.rows = np.asarray(first_rows, np.int64)[:, None] + np.arange(size)
        self._group_of = {
            int(row): g for g, rows in enumerate(self.rows) for row in rows
        }
        self._left = np.full(len(self.rows), size)

    def note(self, ended: Iterable[int]) -> list[int]:
        """Take note of rows that have ended; return groups that are complete by it."""
        complete = []
        for row in ended:
            group = self._group_of[row]
            self._left[group] -= 1
            if self._left[group] == 0:
                complete.append(group)
        return sorted(complete)

    @property
    def ended(self) -> Int[np.ndarray, " E"]:
        """Groups that have ended, in order."""
        return np.flatnonzero(self._left == 0)


type Scores = tuple[dict[str, np.ndarray], dict[str, float]]
"""Each reward function's scores of all rows, and how often it failed so far."""


class Portions:
    """What follows a generating call, on portions of its groups.

    Attributes:
        names: calls that run so; none where the call has one portion.
    """

    def __init__(self, calls: "Calls", name: str, passing: "Pass"):
        """Finds the calls that can run on a part of the rows.

        Those that infer with parameters that are there and change in no way before, on
        other devices than the generating call's, and those that score text, in a run of
        one process; if all they read is the data set's or made by such calls.
        """
        self.calls, self.name, self.passing = calls, name, passing
        self.node = calls.graph.calls[name]
        self.spec: Generate = self.node.function  # pyright: ignore[reportAttributeAccessIssue]
        self.names = self._followers() if self.spec.delivery.portions > 1 else []
        size, group = passing.buffer.size, self.spec.completions_per_prompt
        self.num_prompts = -(-size // self.spec.delivery.portions)
        self.groups = Groups(np.arange(size) * group, group)
        self._waiting: list[int] = []
        self._made: list[tuple[np.ndarray, Buffer]] = []
        self._scores: list[tuple[str, np.ndarray, concurrent.futures.Future]] = []
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "scores")

    def __enter__(self) -> "Portions":
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _followers(self) -> list[str]:
        calls, graph = self.calls, self.calls.graph
        known = {self.node.key(key) for key in self.spec.writes} | set(graph.inputs)
        own = set(calls.plan.calls[self.name].allocation.devices)
        names = []
        for name in graph.order():
            node = graph.calls[name]
            if not {node.key(key) for key in node.function.reads} <= known:
                continue
            if isinstance(node.function, Score):
                can_follow = jax.process_count() == 1
            elif isinstance(node.function, Infer):
                place, home = calls.place(name), calls.store.homes[node.role or ""]
                is_there = place.key == home.key
                is_there &= "offload" not in place.allocation.options
                is_unchanged = self.passing.versions.get(name, 0) == 0
                devices = set(place.allocation.devices)
                can_follow = is_there and is_unchanged and not own & devices
            else:
                can_follow = False
            if can_follow:
                names.append(name)
                known |= {node.key(key) for key in node.function.writes}
        return names

    def note(self, session: Session, ended: Iterable[int]) -> None:
        """Take note of rows that have ended; a portion that is complete goes on."""
        if not self.names:
            return
        self._waiting += self.groups.note(ended)
        while len(self._waiting) >= self.num_prompts:
            self._hand_on(session, self._waiting[: self.num_prompts])
            del self._waiting[: self.num_prompts]

    def finish(self, session: Session) -> None:
        """Hand on what is left, and tell processes that listen that it was the last."""
        if not self.names:
            return
        if self._waiting:
            self._hand_on(session, self._waiting)
        cluster.gather(self.calls.exchange("portion"), {"index": None})

    def _hand_on(self, session: Session, groups: list[int]) -> None:
        index = np.full((self.num_prompts, self.groups.size), -1, np.int64)
        index[: len(groups)] = self.groups.rows[groups]
        index = index.reshape(-1).astype(np.int32)
        lengths = session.lengths(index)
        told = {"index": index, "lengths": lengths}
        cluster.gather(self.calls.exchange("portion"), told)
        self._run(index, lengths, session.results(index))

    def listen(self, program: Any) -> None:
        """Run the calls on portions that other processes sample."""
        while self.names:
            found = cluster.gather(self.calls.exchange("portion"), None)
            told = next(value for value in found if value is not None)
            if told["index"] is None:
                return
            index, lengths = np.asarray(told["index"]), np.asarray(told["lengths"])
            described = program.described(self.num_prompts)
            self._run(index, lengths, handles(described))

    def _run(self, index: np.ndarray, lengths: np.ndarray, rollout: Rollout) -> None:
        portion = portion_of(self.passing.buffer, index, self.groups.size)
        put_rollout(portion, self.node, rollout)
        portion.lengths[self.node.key("tokens")] = lengths
        passing = dataclasses.replace(self.passing, buffer=portion)
        for name in self.names:
            node = self.calls.graph.calls[name]
            if isinstance(node.function, Score):
                score = self.calls.scores_of
                future = self._thread.submit(score, name, node, passing)
                self._scores.append((name, index, future))
            else:
                self.calls.infer(name, node, 0, passing)
        self._made.append((index, portion))

    def gather(self, buffer: Buffer) -> dict[str, Metrics]:
        """Put what all portions gave into the batch; metrics, by call."""
        metrics: dict[str, Metrics] = {}
        for name in self.names:
            node = self.calls.graph.calls[name]
            if isinstance(node.function, Score):
                parts = [
                    (index, future.result())
                    for scored, index, future in self._scores
                    if scored == name
                ]
                joined = _joined_scores(parts, buffer.size)
                metrics[name] = self.calls.put_scores(node, buffer, *joined)
                continue
            mesh = make_mesh(self.calls.plan.calls[name].allocation)
            for local in node.function.writes:
                key = node.key(local)
                parts = [(i, portion.value(key)) for i, portion in self._made]
                rows = rows_sharding(mesh, buffer.size)
                buffer.put(key, _joined(parts, buffer.size, rows))
            metrics[name] = {}
        return metrics


def portion_of(buffer: Buffer, index: np.ndarray, group: int) -> Buffer:
    """A batch of some completions of a batch of prompts; -1 is an empty row."""
    is_real, prompts = index >= 0, np.maximum(index, 0) // group
    batch = Batch(
        ids=np.where(is_real, buffer.ids[prompts], -1),
        samples=np.where(is_real, index % group, 0).astype(np.int32),
        lengths=np.zeros(len(index), np.int32),
        arrays={},
        columns={
            name: [
                values[prompt] if real else None
                for prompt, real in zip(prompts, is_real, strict=True)
            ]
            for name, values in buffer.columns.items()
        },
    )
    portion = Buffer(batch)
    portion.traffic = buffer.traffic
    return portion


def put_rollout(buffer: Buffer, node: ModelFunctionCall, rollout: Rollout) -> None:
    """Put what a generating call writes into the batch."""
    for local in node.function.writes:
        if (value := getattr(rollout, local)) is not None:
            buffer.put(node.key(local), value)


def _joined(
    parts: Sequence[tuple[np.ndarray, Any]], size: int, rows: jax.sharding.Sharding
) -> Array:
    """Rows of several parts, each at its place; zeros elsewhere."""
    first = parts[0][1]
    described = jax.ShapeDtypeStruct(
        (size, *first.shape[1:]), first.dtype, sharding=rows
    )
    if not rows.addressable_devices:
        return handles(described)
    index = np.concatenate([index for index, _ in parts])
    index = np.where(index < 0, size, index)
    return _scattered([part for _, part in parts], index, size=size, rows=rows)


@functools.partial(jax.jit, static_argnames=("size", "rows"))
def _scattered(parts: list[Array], index: Array, *, size: int, rows: Any) -> Array:
    joined = jnp.concatenate(parts)
    empty = jnp.zeros((size, *joined.shape[1:]), joined.dtype)
    placed = empty.at[index].set(joined, mode="drop")
    return jax.lax.with_sharding_constraint(placed, rows)


def _joined_scores(parts: list[tuple[np.ndarray, Scores]], size: int) -> Scores:
    """Scores of several parts, each at its place, and the failures of all."""
    each: dict[str, np.ndarray] = {}
    failures: dict[str, float] = {}
    for index, (scores, failed) in parts:
        for name, values in scores.items():
            found = each.setdefault(name, np.zeros(size, np.float64))
            found[index[index >= 0]] = values[index >= 0]
        failures = failed  # They count from the beginning of the run.
    return each, failures
