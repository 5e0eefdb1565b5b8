"""The compiled functions of a run's calls, and how its batches are packed for them."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from realjax.core.batch import Batch
from realjax.data.packing import Packing, pack
from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan
from realjax.functions.function import Generate, Infer, Train, Transform
from realjax.functions.generate import GenerateProgram
from realjax.functions.infer import InferProgram
from realjax.functions.role import Role
from realjax.functions.train import TrainProgram, minibatch_order
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import replicated, rows_sharding
from realjax.realloc.offload import moved_in_program

SEQUENCES_PER_ROW = 8
"""Sequences that a microbatch has room for, per packed row."""


class Programs:
    """Makes the compiled function of each call once, and keeps it.

    Attributes:
        made: programs by call and size of the batch; those that generate serve batches
            of any size, so that they have one pool.
    """

    def __init__(
        self,
        graph: DataflowGraph,
        plan: ExecutionPlan,
        roles: Mapping[str, Role],
        *,
        optimizer_steps: Mapping[str, int],
        seed: int,
        width: int,
    ):
        """Compiles nothing; see `Executor` for the arguments."""
        self.graph, self.plan, self.roles = graph, plan, roles
        self.optimizer_steps, self.seed, self.width = optimizer_steps, seed, width
        self.made: dict[Any, Any] = {}

    def get(self, name: str, size: int = 0) -> Any:
        """The compiled function of a call, made once for each size of the batch."""
        if isinstance(self.graph.calls[name].function, Generate):
            return self._generating(name, size)
        key = (name, size)
        if key not in self.made:
            self.made[key] = self._make(name, size)
        return self.made[key]

    def _generating(self, name: str, num_prompts: int) -> GenerateProgram:
        """The program of a call that generates; made anew for a larger batch."""
        node, place = self.graph.calls[name], self.plan.calls[name]
        assert isinstance(node.function, Generate)
        assert node.role is not None
        num_rows = num_prompts * node.function.completions_per_prompt
        settings = self.plan.rollout_settings(name, num_rows=num_rows)
        found = self.made.get(name)
        if found is not None and found.engine.settings.slots >= settings.slots:
            return found
        role = self.roles[node.role]
        self.made[name] = GenerateProgram(
            node.function,
            role.program(place.allocation),
            make_mesh(place.allocation),
            eos_ids=role.eos_ids,
            width=self.width,
            settings=settings,
        )
        return self.made[name]

    def _make(self, name: str, size: int) -> Any:
        node, place = self.graph.calls[name], self.plan.calls[name]
        mesh, spec = make_mesh(place.allocation), node.function
        if isinstance(spec, Transform):
            rows, whole = rows_sharding(mesh, size), replicated(mesh)
            stateless = (rows, whole)
            shardings = stateless if spec.state is None else (whole, *stateless)
            return jax.jit(spec.fn, out_shardings=shardings)
        assert node.role is not None
        role = self.roles[node.role]
        model = role.program(place.allocation, place.remat)
        if isinstance(spec, Infer):
            return InferProgram(spec, model, mesh)
        assert isinstance(spec, Train)
        config = role.config.optimizer
        return TrainProgram(
            spec,
            model,
            mesh,
            config,
            self.optimizer_steps[name],
            move=moved_in_program,
        )

    def drop_pools(self) -> None:
        """Frees pools of keys and values; the next rollouts make others."""
        for program in self.made.values():
            if isinstance(program, GenerateProgram):
                program.engine.drop_pool()

    def train_program(self, role: str) -> TrainProgram:
        """The program that trains a role."""
        names = [n for n, c in self.graph.calls.items() if c.role == role]
        return self.get(next(n for n in names if self.graph.calls[n].is_training))

    def pack(
        self,
        name: str,
        lengths: np.ndarray,
        rows: np.ndarray,
        *,
        width: int,
        unit: int = 1,
    ) -> list[Packing]:
        """Microbatches that hold the given rows of the batch, all of one shape."""
        size, allocation = len(lengths), self.plan.calls[name].allocation
        num_rows = self.plan.num_rows(name, max_rows=size, row_length=width)
        max_sequences = max(unit, min(size, SEQUENCES_PER_ROW * num_rows))
        chosen = np.zeros_like(lengths)
        chosen[rows] = lengths[rows]
        return pack(
            chosen,
            row_length=width,
            num_rows=num_rows,
            max_sequences=max_sequences - max_sequences % unit,
            width=width,
            num_shards=allocation.num_row_shards,
            unit=unit,
        )

    def minibatches(
        self, name: str, spec: Train, lengths: np.ndarray, step: int, width: int
    ) -> Sequence[Sequence[Packing]]:
        """Rows of each minibatch, balanced by tokens, each packed into microbatches."""
        generator = np.random.default_rng((self.seed, step, zlib.crc32(name.encode())))
        minibatches = []
        for order in minibatch_order(
            len(lengths),
            unit=spec.unit,
            epochs=spec.epochs,
            generator=generator if spec.shuffle else None,
        ):
            index = Batch.create({"row": order}, lengths=lengths[order])
            for part in index.split(spec.minibatches, unit=spec.unit):
                microbatches = self.pack(
                    name, lengths, part["row"], width=width, unit=spec.unit
                )
                if microbatches:
                    minibatches.append(microbatches)
        return minibatches
