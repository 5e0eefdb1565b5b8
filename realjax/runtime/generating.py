"""Running a call that generates: whole, in portions, or up to a budget of tokens.

    all at once     sample every group ────────────────▶ infer, score
    portions        sample ──┬────────┬────────┬─────▶
                             └▶ infer └▶ infer └▶ infer
    token budget    sample ──────▶ infer, score          groups that have ended
                             └───▶ the next step         the others

With a budget a step has the groups that ended in it, the oldest first; the tokens of a
group that is carried on keep the log-probabilities of the policies that drew them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from realjax.core.arrays import Int, PyTree
from realjax.dataflow.buffer import Buffer
from realjax.dataflow.graph import ModelFunctionCall
from realjax.functions.function import Generate
from realjax.parallel.sharding import handles
from realjax.rollout.engine import Carried, Engine
from realjax.rollout.rows import Rollout
from realjax.rollout.session import Session
from realjax.runtime import cluster
from realjax.runtime.measures import Metrics, completion_metrics
from realjax.runtime.portions import Groups, Portions, put_rollout

if TYPE_CHECKING:
    from realjax.runtime.calls import Calls, Pass


@dataclasses.dataclass(kw_only=True)
class Carry:
    """Groups of prompts that the next step goes on with.

    Attributes:
        carried: their completions.
        ids: of their data, [C]; -1 for none.
        columns: of their data, each of C.
    """

    carried: Carried
    ids: Int[np.ndarray, " C"]
    columns: dict[str, list]


class Generating:
    """Runs the calls of a graph that generate.

    Attributes:
        carries: what the next step goes on with, by call.
    """

    def __init__(self, calls: "Calls"):
        """Carries nothing yet."""
        self.calls = calls
        self.carries: dict[str, Carry] = {}

    @property
    def states(self) -> dict[str, PyTree]:
        """Arrays that a checkpoint must hold, by call."""
        return {
            name: {
                field: value
                for field, value in carry.carried.rows._asdict().items()
                if value is not None
            }
            for name, carry in self.carries.items()
        }

    @property
    def notes(self) -> dict[str, Any]:
        """What else a checkpoint must hold: plain values, by call."""
        return {
            name: {"ids": carry.ids.tolist(), "columns": carry.columns}
            for name, carry in self.carries.items()
        }

    def prepare(self, num_prompts: int) -> None:
        """Carry nothing, where a call may carry something, so that it can be restored.

        Args:
            num_prompts: of a training batch.
        """
        for name, node in self.calls.graph.calls.items():
            spec = node.function
            if isinstance(spec, Generate) and spec.delivery.token_budget:
                engine = self.calls.programs.get(name, num_prompts).engine
                is_here = self.calls.is_here(name)
                self.carries[name] = _empty_carry(engine, spec, is_here)

    def restore(self, states: Mapping[str, PyTree], notes: Mapping[str, Any]) -> None:
        """Carry what a checkpoint holds.

        Args:
            states: like `states`.
            notes: what `notes` was.
        """
        for name, arrays in states.items():
            carry = self.carries[name]
            rows = carry.carried.rows._replace(**arrays)
            found = cluster.fetch(
                {
                    key: getattr(rows, key)
                    for key in ("lengths", "prompt_lengths", "limits", "has_ended")
                },
                self.calls.exchange("carried"),
            )
            self.carries[name] = Carry(
                carried=Carried(rows=rows, **found),
                ids=np.asarray(notes[name]["ids"], np.int64),
                columns=dict(notes[name]["columns"]),
            )

    def run(
        self, name: str, node: ModelFunctionCall, version: int, passing: "Pass"
    ) -> Metrics:
        """Run a call; what follows it on portions is done by then."""
        calls, buffer = self.calls, passing.buffer
        spec: Generate = node.function  # pyright: ignore[reportAssignmentType]
        program = calls.programs.get(name, buffer.size)
        prompts = calls.prompts(name, node, buffer)
        parameters = calls.store.get(node.role or "", calls.place(name), version)
        with Portions(calls, name, passing) as portions:
            with calls.running(name, passing) as event:
                begin = None
                if event is not None:
                    key = calls.key(name, passing.step, passing.is_training)
                    begin = functools.partial(
                        program.session,
                        parameters,
                        prompts,
                        key,
                        on_progress=passing.on_progress,
                    )
                if spec.delivery.token_budget and passing.is_training:
                    rollout = self._up_to_budget(name, node, buffer, program, begin)
                elif begin is None:
                    portions.listen(program)
                    rollout = handles(program.described(buffer.size))
                else:
                    with begin() as session:
                        while not session.is_done:
                            portions.note(session, session.advance())
                        rollout = session.results()
                        portions.finish(session)
                if event is not None:
                    event.watch(rollout.lengths)
            buffer.repeat(spec.completions_per_prompt)
            put_rollout(buffer, node, rollout)
            passing.done.update(portions.gather(buffer))
        found = cluster.fetch(
            {"lengths": rollout.lengths, "ends": rollout.is_truncated},
            calls.exchange("lengths"),
        )
        prompt_lengths = np.repeat(
            buffer.lengths["prompts"], spec.completions_per_prompt
        )
        buffer.lengths[node.key("tokens")] = found["lengths"]
        metrics = completion_metrics(found["lengths"], prompt_lengths, found["ends"])
        if name in self.carries:
            metrics["completions/carried"] = [
                float((self.carries[name].ids >= 0).sum())
            ]
        return metrics

    # -- up to a budget ------------------------------------------------------------

    def _up_to_budget(self, name, node, buffer: Buffer, program, begin) -> Rollout:
        """Sample until the budget is spent; the batch becomes the groups that ended."""
        spec: Generate = node.function
        engine, num_prompts = program.engine, buffer.size
        if name not in self.carries:
            self.carries[name] = _empty_carry(engine, spec, begin is not None)
        carry, group = self.carries[name], spec.completions_per_prompt
        ids = np.concatenate([carry.ids, buffer.ids])
        first_new = len(carry.carried.lengths)
        old, new = np.arange(len(carry.ids)), np.arange(num_prompts)
        groups = Groups(np.concatenate([old * group, first_new + new * group]), group)
        told, rollout, rows = None, None, None
        if begin is not None:
            with begin(carried=carry.carried) as session:
                is_real = ids >= 0
                chosen, rest = _sample_up_to(spec, session, groups, is_real)
                index = _padded(groups.rows[rest], first_new)
                rows = engine.programs.select(session.rows, index)
                rollout = session.results(
                    _padded(groups.rows[chosen], num_prompts * group)
                )
                told = {
                    "chosen": chosen,
                    "rest": rest,
                    "lengths": session.lengths(index),
                    "has_ended": session.has_ended[index] | (index < 0),
                }
        told, columns = self._agree(told, carry, buffer)
        if rollout is None or rows is None:
            rollout = handles(program.described(num_prompts))
            rows = handles(engine.programs.described_rows(first_new))
        old_lengths = carry.carried.prompt_lengths[: len(carry.ids) * group : group]
        prompt_lengths = np.concatenate([old_lengths, buffer.lengths["prompts"]])
        chosen, rest = (np.asarray(told[key], np.int64) for key in ("chosen", "rest"))
        repeated = _padded(np.repeat(prompt_lengths[rest], group), first_new, 0)
        limits = np.where(repeated > 0, repeated + spec.sampling.max_new_tokens, 0)
        num_carried = spec.delivery.num_carried
        self.carries[name] = Carry(
            carried=Carried(
                rows=rows,
                lengths=np.asarray(told["lengths"]),
                prompt_lengths=repeated,
                limits=limits,
                has_ended=np.asarray(told["has_ended"]),
            ),
            ids=_padded(ids[rest], num_carried),
            columns=_chosen(columns, rest, num_carried),
        )
        buffer.replace(
            ids=_padded(ids[chosen], num_prompts),
            columns=_chosen(columns, chosen, num_prompts),
            prompt_lengths=_padded(prompt_lengths[chosen], num_prompts, 0),
        )
        return rollout

    def _agree(
        self, told: dict | None, carry: Carry, buffer: Buffer
    ) -> tuple[dict, dict[str, list]]:
        """What the processes that sample tell the others, and the columns of all."""
        own = {
            key: carry.columns.get(key, [None] * len(carry.ids)) + list(values)
            for key, values in buffer.columns.items()
        }
        mine = {"told": told, "columns": own}
        found = cluster.gather(self.calls.exchange("carried"), mine)
        columns = {}
        for key in own:
            # A process knows the text of the rows that it reads.
            of_rows = zip(*(part["columns"][key] for part in found), strict=True)
            columns[key] = [
                next((value for value in values if value is not None), None)
                for values in of_rows
            ]
        return next(p["told"] for p in found if p["told"] is not None), columns


def _empty_carry(engine: Engine, spec: Generate, is_here: bool) -> Carry:
    size = engine.filled(spec.delivery.num_carried * spec.completions_per_prompt)
    described = engine.programs.described_rows(size)
    zeros = np.zeros(size, np.int32)
    return Carry(
        carried=Carried(
            rows=engine.programs.empty_rows(num_rows=size)
            if is_here
            else handles(described),
            lengths=zeros,
            prompt_lengths=zeros,
            limits=zeros,
            has_ended=np.ones(size, bool),
        ),
        ids=np.full(spec.delivery.num_carried, -1, np.int64),
        columns={},
    )


def _sample_up_to(
    spec: Generate, session: Session, groups: Groups, is_real: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sample until the budget is spent and no more groups are left than are carried.

    Returns:
        The groups of this step, at most those of a batch, and those that are left.
    """
    delivery = spec.delivery
    size = len(is_real) - delivery.num_carried
    rows = groups.rows.reshape(-1)
    groups.note(rows[session.has_ended[rows]].tolist())
    while not session.is_done:
        groups.note(session.advance())
        num_ended = int(is_real[groups.ended].sum())
        num_left = int(is_real.sum()) - min(num_ended, size)
        is_spent = session.work.num_tokens >= delivery.token_budget
        if is_spent and num_left <= delivery.num_carried:
            groups.note(session.drain())
            break
    ended = groups.ended[is_real[groups.ended]]
    chosen = ended[:size]
    return chosen, np.setdiff1d(np.flatnonzero(is_real), chosen)


def _padded(values: np.ndarray, size: int, empty: int = -1) -> np.ndarray:
    """Values in a row, and as many empty ones as are missing."""
    padded = np.full(size, empty, np.int64)
    padded[: values.size] = values.reshape(-1)
    return padded.astype(np.int32) if empty == 0 or values.ndim > 1 else padded


def _chosen(
    columns: Mapping[str, list], index: np.ndarray, size: int
) -> dict[str, list]:
    """Some rows of columns, and as many empty ones as are missing."""
    missing = [None] * (size - len(index))
    return {
        key: [*(values[i] for i in index), *missing] for key, values in columns.items()
    }
