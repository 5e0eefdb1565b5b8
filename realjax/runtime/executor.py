"""The executor: one pass through the graph, each call on its own mesh.

    schedule ──▶ Move | Run | Release | …      one Python thread, in order
                  │      │
      reallocate ─┘      └─ compiled function of (parameters on the call's mesh, batch)

Dispatch is asynchronous: calls on disjoint meshes overlap. The thread waits in two
places only, for the lengths of completions (they decide the packing) and for text.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from realjax.core.arrays import Array, PyTree
from realjax.core.batch import Batch
from realjax.data.packing import Packing, pack
from realjax.data.tokenizer import Tokenizer
from realjax.dataflow import schedule as schedule_lib
from realjax.dataflow.buffer import Buffer
from realjax.dataflow.graph import DataflowGraph, ModelFunctionCall
from realjax.dataflow.plan import ExecutionPlan
from realjax.functions.function import Generate, Infer, Score, Train, Transform
from realjax.functions.generate import GenerateProgram
from realjax.functions.infer import InferProgram
from realjax.functions.role import Role
from realjax.functions.score import RewardWorkers
from realjax.functions.train import TrainProgram, minibatch_order
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import replicated, rows_sharding
from realjax.realloc.transfer import Traffic
from realjax.runtime.measures import (
    Metrics,
    completion_metrics,
    completion_texts,
)
from realjax.runtime.parameters import ParameterStore
from realjax.runtime.watch import Watch

SEQUENCES_PER_ROW = 8
"""Sequences that a microbatch has room for, per packed row."""


class Executor:
    """Runs steps of one graph; holds compiled programs and the roles' parameters.

    Attributes:
        store: parameters and optimizer states of every role.
        transform_states: state of every `Transform` that has one, by call.
        watch: observes when each call began and ended.
        traffic: bytes of parameters moved by the last step, by route.
        batch_traffic: the same of batch keys.
        sends: how often a key was sent to a mesh in one step, at most.
        after_call: told each call's name when it is done, if set; dispatch then waits.
    """

    def __init__(
        self,
        graph: DataflowGraph,
        plan: ExecutionPlan,
        roles: Mapping[str, Role],
        store: ParameterStore,
        *,
        tokenizer: Tokenizer,
        optimizer_steps: Mapping[str, int],
        seed: int,
        width: int,
        watch: Watch | None = None,
    ):
        """Prepares the schedule; programs are compiled when first used.

        Args:
            graph: of the algorithm.
            plan: allocations.
            roles: by name.
            store: holds the roles' parameters at their homes.
            tokenizer: for work on text.
            optimizer_steps: updates of the whole run, by training call.
            seed: of sampling and of minibatch order.
            width: T, tokens of a sequence.
            watch: observes when calls end.
        """
        self.graph, self.plan, self.roles, self.store = graph, plan, roles, store
        self.tokenizer, self.seed, self.width = tokenizer, seed, width
        self.optimizer_steps = optimizer_steps
        self.watch = watch or Watch()
        self.traffic, self.batch_traffic = Traffic(), Traffic()
        self.sends: dict[tuple, int] = {}
        dtypes = {name: role.dtype for name, role in roles.items()}
        self.steps = schedule_lib.make_schedule(
            graph, plan, dtypes, offloaded=store.offloaded
        )
        self._place = functools.partial(schedule_lib.place_of, graph, plan, dtypes)
        self.transform_states = {
            name: self._initial_state(name, node.function)
            for name, node in graph.calls.items()
            if isinstance(node.function, Transform) and node.function.state is not None
        }
        self._workers = {
            name: RewardWorkers(node.function.rewards, node.function.num_workers)
            for name, node in graph.calls.items()
            if isinstance(node.function, Score)
        }
        self._programs: dict[Any, Any] = {}
        self.after_call: Callable[[str], None] | None = None
        functions = {name: node.function for name, node in graph.calls.items()}
        self._generates = any(isinstance(f, Generate) for f in functions.values())
        self._training_calls = [k for k, f in functions.items() if isinstance(f, Train)]

    def close(self) -> None:
        """Ends worker processes and the watch."""
        for workers in self._workers.values():
            workers.close()
        self.watch.close()

    def run(
        self,
        batch: Batch,
        *,
        step: int,
        training: bool = True,
        on_wave: Callable[[int, int], None] | None = None,
    ) -> tuple[Metrics, Buffer]:
        """One pass through the graph.

        Args:
            batch: of the data set.
            step: number of the step; draws depend on it.
            training: False changes nothing; the losses of training calls are measured
                where the data set holds the completions.
            on_wave: told (waves done, waves in all) during generation.

        Returns:
            Metrics, most still being computed, and everything the calls made.
        """
        buffer, metrics = Buffer(batch), {}
        self.traffic, self.batch_traffic = Traffic(), buffer.traffic
        # Losses of completions drawn just now say nothing: every ratio is 1.
        unmeasured = () if training or not self._generates else self._training_calls
        for task in self.steps:
            match task:
                case schedule_lib.Run(name) if name in unmeasured:
                    continue
                case schedule_lib.Run(name):
                    metrics |= self._run(name, buffer, step, training, on_wave)
                    if self.after_call is not None:
                        self.watch.wait()
                        self.after_call(name)
                case schedule_lib.Move(role, place):
                    devices = place.allocation.devices
                    with self.watch.calling(
                        f"{role} to {place}", devices, step=step, kind="realloc"
                    ) as event:
                        event.watch(self.store.move(role, place, self.traffic))
                case schedule_lib.Release(role, place):
                    self.store.release(role, place)
                case schedule_lib.Reload(role):
                    self.store.reload(role)
                case schedule_lib.Offload(role):
                    self.store.offload(role)
        for key, count in buffer.sends.items():
            self.sends[key] = max(count, self.sends.get(key, 0))
        return metrics, buffer

    def _run(self, name, buffer, step, training, on_wave) -> Metrics:
        node = self.graph.calls[name]
        match node.function:
            case Generate():
                return self._generate(name, node, buffer, step, training, on_wave)
            case Infer():
                return self._infer(name, node, buffer, step)
            case Train():
                return self._train(name, node, buffer, step, training)
            case Transform():
                return self._transform(name, node, buffer, step, training)
            case Score():
                return self._score(name, node, buffer, step)
        raise TypeError(f"Call {name!r} is a {type(node.function).__name__}.")

    # -- the five kinds of calls -------------------------------------------------

    def _generate(self, name, node, buffer, step, training, on_wave) -> Metrics:
        spec: Generate = node.function
        size, group = buffer.size, spec.completions_per_prompt
        program, prompts = self._program(name, size), self._prompts(name, node, buffer)
        key = self._key(name, step, training)
        waves = program.num_waves(size)
        with self._timed(name, step) as event:
            parts = []
            for index in range(waves):
                parameters = self.store.get(node.role, self._place(name))
                parts.append(program.wave(parameters, prompts, key, index))
                if on_wave is not None:
                    on_wave(index + 1, waves)
            rollout = program.join(parts, size)
            event.watch(rollout.lengths)
        buffer.repeat(group)
        for local in spec.writes:
            if (value := getattr(rollout, local)) is not None:
                buffer.put(node.key(local), value)
        lengths = np.asarray(rollout.lengths)
        prompt_lengths = np.repeat(buffer.lengths["prompts"], group)
        buffer.lengths[node.key("tokens")] = lengths
        return completion_metrics(
            lengths, prompt_lengths, np.asarray(rollout.is_truncated)
        )

    def _infer(self, name, node, buffer, step) -> Metrics:
        program = self._program(name)
        parameters = self.store.get(node.role, self._place(name))
        batch = self._inputs(node, buffer, name)
        lengths = buffer.lengths[node.key("tokens")]
        width = batch["tokens"].shape[1]
        packings = self._pack(name, lengths, np.arange(len(lengths)), width=width)
        with self._timed(name, step) as event:
            outputs = program(parameters, batch, packings)
            event.watch(outputs)
        for local, value in outputs.items():
            buffer.put(node.key(local), value)
        return {}

    def _train(self, name, node, buffer, step, training) -> Metrics:
        program = self._program(name)
        spec: Train = node.function
        batch = self._inputs(node, buffer, name)
        lengths = buffer.lengths[node.key("tokens")]
        rows, width = np.arange(len(lengths)), batch["tokens"].shape[1]
        with self._timed(name, step) as event:
            if training:
                minibatches = self._minibatches(name, spec, lengths, step, width)
                state, reports = program(
                    self.store.train_state(node.role),
                    batch,
                    minibatches,
                    self._key(name, step, training),
                )
                self.store.set_train_state(node.role, state)
            else:
                packings = self._pack(name, lengths, rows, width=width, unit=spec.unit)
                parameters = self.store.train_state(node.role).parameters
                reports = [program.evaluate(parameters, batch, packings)]
            event.watch(reports)
        return self._train_metrics(node, reports)

    def _transform(self, name, node, buffer, step, training) -> Metrics:
        spec: Transform = node.function
        batch = self._inputs(node, buffer, name)
        fn = self._program(name, buffer.size)
        with self._timed(name, step) as event:
            if spec.state is None:
                outputs, metrics = fn(batch)
            else:
                state, outputs, metrics = fn(self.transform_states[name], batch)
                if training:
                    self.transform_states[name] = state
            event.watch(outputs)
        for local, value in outputs.items():
            buffer.put(node.key(local), value)
        return {key: [mean] for key, mean in metrics.items()}

    def _score(self, name, node, buffer, step) -> Metrics:
        with self.watch.calling(name, step=step, kind="host"):
            texts = self.texts(buffer, node.key("tokens"), node.key("completion_mask"))
            each = self._workers[name].score_each(*texts)
        real = np.flatnonzero(buffer.ids >= 0)
        scores = np.zeros(buffer.size, np.float32)
        metrics: Metrics = {}
        for reward in node.function.rewards:
            found = each[reward.name]
            scores[real] += np.float32(reward.weight) * found
            metrics[f"rewards/{reward.name}/mean"] = [float(found.mean())]
            metrics[f"rewards/{reward.name}/std"] = [float(found.std())]
            failures = self._workers[name].num_failures[reward.name]
            metrics[f"rewards/{reward.name}/failures"] = [float(failures)]
        buffer.put(node.key("scores"), scores)
        return metrics

    def texts(
        self, buffer: Buffer, tokens: str = "tokens", mask: str = "completion_mask"
    ) -> tuple[list[str], list[str], dict[str, list]]:
        """Prompts, completions and text columns of a batch, as rewards take them."""
        real = np.flatnonzero(buffer.ids >= 0)
        prompts, completions = completion_texts(
            self.tokenizer, buffer.host(tokens)[real], buffer.host(mask)[real]
        )
        columns = {
            key: [values[row] for row in real]
            for key, values in buffer.columns.items()
            if key != "prompt"
        }
        return prompts, completions, columns

    def compile_prompt_widths(self, widths: Sequence[int], num_prompts: int) -> None:
        """Compiles generation for every prompt width, on prompts of no tokens."""
        for name, node in self.graph.calls.items():
            if not isinstance(node.function, Generate) or node.role is None:
                continue
            place = self._place(name)
            is_copied = place.key != self.store.homes[node.role].key
            if is_copied:
                self.store.move(node.role, place, Traffic())
            parameters = self.store.get(node.role, place)
            program = self._program(name, num_prompts)
            for width in widths:
                prompts = np.zeros((num_prompts, width), np.int32)
                buffer = Buffer(
                    Batch.create(
                        {"prompts": prompts}, lengths=np.zeros(num_prompts, np.int32)
                    )
                )
                inputs = self._prompts(name, node, buffer)
                jax.block_until_ready(
                    program(parameters, inputs, self._key(name, 0, training=False))
                )
            if is_copied:
                self.store.release(node.role, place)

    def _prompts(self, name, node, buffer) -> dict[str, Array | np.ndarray]:
        """What a generating call takes."""
        allocation = self.plan.calls[name].allocation
        return {
            "prompts": buffer.get(node.key("prompts"), allocation),
            "lengths": buffer.lengths["prompts"],
            "ids": buffer.ids.astype(np.uint32),
        }

    def _timed(self, name: str, step: int):
        """Observes a call."""
        devices = self.plan.calls[name].allocation.devices
        return self.watch.calling(name, devices, step=step)

    # -- programs and their inputs -----------------------------------------------

    def _program(self, name: str, size: int = 0) -> Any:
        """The compiled function of a call, made once for each size of the batch."""
        key = (name, size)
        if key not in self._programs:
            self._programs[key] = self._make_program(name, size)
        return self._programs[key]

    def _make_program(self, name: str, size: int) -> Any:
        node, allocation = self.graph.calls[name], self.plan.calls[name].allocation
        mesh, spec = make_mesh(allocation), node.function
        if isinstance(spec, Transform):
            rows, whole = rows_sharding(mesh, size), replicated(mesh)
            stateless = (rows, whole)
            shardings = stateless if spec.state is None else (whole, *stateless)
            return jax.jit(spec.fn, out_shardings=shardings)
        assert node.role is not None
        role = self.roles[node.role]
        model = role.program(allocation)
        if isinstance(spec, Generate):
            rows = size * spec.completions_per_prompt
            place = self.plan.calls[name]
            shards = allocation.num_row_shards
            wanted = min(place.rows or rows, rows)
            return GenerateProgram(
                spec,
                model,
                mesh,
                eos_ids=role.eos_ids,
                num_rows=-(-wanted // shards) * shards,
                width=self.width,
            )
        if isinstance(spec, Infer):
            return InferProgram(spec, model, mesh)
        assert isinstance(spec, Train)
        config = role.config.optimizer
        return TrainProgram(spec, model, mesh, config, self.optimizer_steps[name])

    def train_program(self, role: str) -> TrainProgram:
        """The program that trains a role."""
        names = [n for n, c in self.graph.calls.items() if c.role == role]
        return self._program(next(n for n in names if self.graph.calls[n].is_training))

    def _inputs(
        self, node: ModelFunctionCall, buffer: Buffer, name: str
    ) -> dict[str, Array]:
        allocation = self.plan.calls[name].allocation
        return {
            local: buffer.get(node.key(local), allocation)
            for local in node.function.reads
            if node.key(local) in buffer  # A set that kept everything is not there.
        }

    def _pack(
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

    def _minibatches(
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
                microbatches = self._pack(
                    name, lengths, part["row"], width=width, unit=spec.unit
                )
                if microbatches:
                    minibatches.append(microbatches)
        return minibatches

    def _initial_state(self, name: str, spec: Transform) -> PyTree:
        assert spec.state is not None
        whole = replicated(make_mesh(self.plan.calls[name].allocation))
        return jax.jit(spec.state, out_shardings=whole)()

    def _key(self, name: str, step: int, training: bool) -> Array:
        """Of a call in a step; evaluation draws the same at every step."""
        key = jax.random.fold_in(jax.random.key(self.seed), step if training else 0)
        offset = zlib.crc32(name.encode()) ^ (0 if training else 1)
        return jax.random.fold_in(key, offset)

    def _train_metrics(self, node: ModelFunctionCall, reports) -> Metrics:
        """Names of a training call's metrics: by role where several roles learn."""
        spec: Train = node.function  # pyright: ignore[reportAssignmentType]: a Train
        suffix = f"/{node.role}" if len(self.graph.trained_roles) > 1 else ""
        common = ("grad_norm", "learning_rate", "skipped", "nonfinite")
        names: dict[str, str] = {name: name + suffix for name in common}
        names["loss"] = spec.loss_name
        metrics: Metrics = {}
        for report in reports:
            for name, mean in report.items():
                key = names[name] if name in names else name
                if name.startswith("router/"):
                    key = name + suffix
                metrics.setdefault(key, []).append(mean)
        return metrics
