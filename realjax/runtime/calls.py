"""Running one model function call: its inputs on its mesh, its function, its outputs.

A call runs in the processes that have a device of its mesh. The others hold what it
makes as arrays without a part of their own, and go on.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from realjax.core.arrays import Array, PyTree
from realjax.data.tokenizer import Tokenizer
from realjax.dataflow import schedule as schedule_lib
from realjax.dataflow.buffer import Buffer
from realjax.dataflow.graph import ModelFunctionCall
from realjax.functions.function import Follow, Generate, Infer, Score, Train, Transform
from realjax.functions.score import RewardWorkers
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import handles, replicated, rows_sharding
from realjax.realloc.transfer import Traffic
from realjax.rollout.session import OnProgress
from realjax.runtime import cluster
from realjax.runtime.generating import Generating
from realjax.runtime.measures import Metrics, completion_texts
from realjax.runtime.parameters import ParameterStore
from realjax.runtime.portions import Scores
from realjax.runtime.programs import Programs
from realjax.runtime.watch import Outputs, Watch

type Texts = tuple[list[str], list[str], dict[str, list]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass through the graph.

    Attributes:
        buffer: what its calls have made.
        step: number of the step; draws depend on it.
        is_training: False for a pass that changes nothing.
        on_progress: told how far generation is.
        traffic: counts parameters that move.
    """

    buffer: Buffer
    step: int
    traffic: Traffic
    is_training: bool = True
    versions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    on_progress: OnProgress | None = None
    done: dict[str, Metrics] = dataclasses.field(default_factory=dict)


class Calls:
    """Runs calls of a graph.

    Attributes:
        transform_states: state of every `Transform` that has one, by call.
        num_runs: how often each call ran in this process.
    """

    def __init__(
        self,
        programs: Programs,
        store: ParameterStore,
        watch: Watch,
        tokenizer: Tokenizer,
        name: str = "",
    ):
        """Starts the workers of reward functions.

        Args:
            programs: compiled functions.
            store: holds parameters.
            watch: observes when calls end.
            tokenizer: for work on text.
            name: tells this object's exchanges between processes from others'.
        """
        self._name = name
        self.programs, self.store = programs, store
        self.watch, self.tokenizer = watch, tokenizer
        self.graph, self.plan, self.roles = (
            programs.graph,
            programs.plan,
            programs.roles,
        )
        self._dtypes = {name: role.dtype for name, role in self.roles.items()}
        nodes = self.graph.calls.items()
        self.generating = Generating(self)
        self._num_exchanges = 0
        self.num_runs = dict.fromkeys(self.graph.calls, 0)
        self.transform_states = {
            name: self._initial_state(name, node.function)
            for name, node in nodes
            if isinstance(node.function, Transform) and node.function.state is not None
        }
        self._workers = {
            name: RewardWorkers(node.function.rewards, node.function.num_workers)
            for name, node in nodes
            if isinstance(node.function, Score)
        }

    @property
    def states(self) -> dict[str, PyTree]:
        """What calls keep from step to step, by call; a checkpoint holds it."""
        return self.transform_states | self.generating.states

    def restore(self, states: Mapping[str, PyTree], carried: Mapping[str, Any]) -> None:
        """Keeps what a checkpoint holds; `carried` are the notes of `generating`."""
        generating = {name: states[name] for name in self.generating.states}
        self.generating.restore(generating, carried)
        self.transform_states |= {
            name: state for name, state in states.items() if name not in generating
        }

    def close(self) -> None:
        """Ends worker processes."""
        for workers in self._workers.values():
            workers.close()

    def run(self, name: str, version: int, passing: Pass) -> Metrics:
        """Runs a call.

        Args:
            name: of the call.
            version: how often its role was changed since the step began.
            passing: the pass it is part of.

        Returns:
            Its metrics, most still being computed; none in a process that has no part
            in it.
        """
        if name in passing.done:  # It followed a call that generates.
            return passing.done.pop(name)
        node = self.graph.calls[name]
        match node.function:
            case Generate():
                return self.generating.run(name, node, version, passing)
            case Infer():
                return self.infer(name, node, version, passing)
            case Train():
                return self._train(name, node, version, passing)
            case Follow():
                return self._follow(name, node, version, passing)
            case Transform():
                return self._transform(name, node, passing)
            case Score():
                return self._score(name, node, passing)
        raise TypeError(f"Call {name!r} is a {type(node.function).__name__}.")

    def place(self, name: str) -> schedule_lib.Place:
        """Where a call needs its role's parameters."""
        return schedule_lib.place_of(self.graph, self.plan, self._dtypes, name)

    # -- the kinds of calls ------------------------------------------------------------

    def infer(self, name, node, version: int, passing: Pass) -> Metrics:
        """Run a call that infers; what it gives joins the batch of the pass."""
        buffer, program = passing.buffer, self.programs.get(name)
        parameters = self.store.get(node.role, self.place(name), version)
        batch = self._inputs(node, buffer, name)
        lengths = buffer.lengths[node.key("tokens")]
        width = batch["tokens"].shape[1]
        with self.running(name, passing) as event:
            if event is None:
                outputs = handles(program.described(len(lengths), width))
            else:
                rows = np.arange(len(lengths))
                packings = self.programs.pack(name, lengths, rows, width=width)
                outputs = program(parameters, batch, packings)
                event.watch(outputs)
        for local, value in outputs.items():
            buffer.put(node.key(local), value)
        return {}

    def _train(self, name, node, version: int, passing: Pass) -> Metrics:
        program, buffer = self.programs.get(name), passing.buffer
        spec: Train = node.function
        batch = self._inputs(node, buffer, name)
        lengths = buffer.lengths[node.key("tokens")]
        if spec.only:
            mask = self.fetch(buffer, key := node.key(spec.only))[key]
            lengths = np.where(mask.any(axis=1), lengths, 0)
        rows, width = np.arange(len(lengths)), batch["tokens"].shape[1]
        parameters = self.store.get(node.role, self.place(name), version)
        with self.running(name, passing) as event:
            if event is None:
                if passing.is_training:
                    self.store.set_train_state(
                        node.role, self.store.train_state(node.role)
                    )
                return {}
            if passing.is_training:
                del parameters  # Given away with the state.
                minibatches = self.programs.minibatches(
                    name, spec, lengths, passing.step, width
                )
                state, reports = program(
                    self.store.train_state(node.role),
                    batch,
                    minibatches,
                    self.key(name, passing.step, passing.is_training),
                )
                self.store.set_train_state(node.role, state)
            else:
                packings = self.programs.pack(
                    name, lengths, rows, width=width, unit=spec.unit
                )
                reports = []
                if packings:  # None where there is nothing to learn from.
                    reports = [program.evaluate(parameters, batch, packings)]
            event.watch(reports)
        return self._train_metrics(node, reports)

    def _follow(self, name, node, version: int, passing: Pass) -> Metrics:
        spec: Follow = node.function
        home = self.place(name)
        self.store.get(node.role, home, version)
        arguments = (node.role, spec.source, spec.weight, passing.traffic)
        with self.running(name, passing) as event:
            mixed = self.store.follow(*arguments)
            if event is not None:
                event.watch(mixed)
        return {}

    def _transform(self, name, node, passing: Pass) -> Metrics:
        spec: Transform = node.function
        buffer = passing.buffer
        batch = self._inputs(node, buffer, name)
        fn = self.programs.get(name, buffer.size)
        metrics = {}
        with self.running(name, passing) as event:
            state = self.transform_states.get(name)
            arguments = (batch,) if spec.state is None else (state, batch)
            if event is None:
                outputs = self._described_outputs(name, spec, arguments, buffer.size)
            elif spec.state is None:
                outputs, metrics = fn(batch)
                event.watch(outputs)
            else:
                state, outputs, metrics = fn(*arguments)
                event.watch(outputs)
                if passing.is_training:
                    self.transform_states[name] = state
        for local, value in outputs.items():
            buffer.put(node.key(local), value)
        return {key: [mean] for key, mean in metrics.items()}

    def _score(self, name, node, passing: Pass) -> Metrics:
        scores = self.scores_of(name, node, passing)
        return self.put_scores(node, passing.buffer, *scores)

    def scores_of(self, name, node, passing: Pass) -> Scores:
        """Every process scores the completions it has; all know all scores."""
        buffer = passing.buffer
        tokens, mask = node.key("tokens"), node.key("completion_mask")
        with self.watch.calling(name, step=passing.step, kind="host"):
            rows = self._own_rows(buffer, tokens)
            found, failures = {}, {}
            if len(rows):
                self.num_runs[name] += 1
                texts = self._texts(buffer, tokens, mask, rows)
                found = self._workers[name].score_each(*texts)
                failures = self._workers[name].num_failures
        rewards = node.function.rewards
        mine = {
            "rows": rows,
            **{f"score {reward.name}": found.get(reward.name) for reward in rewards},
            **{f"failed {r.name}": failures.get(r.name, 0) for r in rewards},
        }
        gathered = cluster.gather(self.exchange("scores"), mine)
        parts = [part for part in gathered if len(part["rows"])]
        each, failed = {}, {}
        for reward in rewards:
            each[reward.name] = np.zeros(buffer.size, np.float64)
            for part in parts:
                each[reward.name][part["rows"]] = part[f"score {reward.name}"]
            count = sum(part[f"failed {reward.name}"] for part in parts)
            failed[reward.name] = float(count)
        return each, failed

    def put_scores(self, node, buffer: Buffer, each, failed) -> Metrics:
        """Add up what reward functions say of every completion; also metrics."""
        real = np.flatnonzero(buffer.ids >= 0)
        scores = np.zeros(buffer.size, np.float32)
        metrics: Metrics = {}
        for reward in node.function.rewards:
            found, name = each[reward.name][real], reward.name
            scores[real] += np.float32(reward.weight) * found.astype(np.float32)
            metrics[f"rewards/{name}/mean"] = [float(found.mean())]
            metrics[f"rewards/{name}/std"] = [float(found.std())]
            metrics[f"rewards/{name}/failures"] = [failed[name]]
        buffer.put(node.key("scores"), scores)
        return metrics

    # -- what calls read and write ---------------------------------------------------

    def texts(self, buffer: Buffer) -> Texts:
        """Prompts, completions and text columns of a batch, as rewards take them."""
        tokens, mask = "tokens", "completion_mask"
        rows = self._own_rows(buffer, tokens)
        prompts, completions, columns = self._texts(buffer, tokens, mask, rows)
        mine = {"rows": rows, "texts": [prompts, completions], "columns": columns}
        parts = [
            p for p in cluster.gather(self.exchange("texts"), mine) if p["texts"][0]
        ]
        order = np.argsort(np.concatenate([part["rows"] for part in parts]))

        def joined(pick: Callable[[dict], list]) -> list:
            values = [value for part in parts for value in pick(part)]
            return [values[index] for index in order]

        return (
            joined(lambda part: part["texts"][0]),
            joined(lambda part: part["texts"][1]),
            {key: joined(lambda part, k=key: part["columns"][k]) for key in columns},
        )

    def fetch(self, buffer: Buffer, *keys: str) -> dict[str, np.ndarray]:
        """Whole keys of the batch, in every process; waits until they are there."""
        return cluster.fetch(
            {key: buffer.value(key) for key in keys}, self.exchange(keys[0])
        )

    def merged(self, numbers: dict[str, float]) -> dict[str, float]:
        """Numbers that each process found, put together in all of them."""
        return cluster.merge(self.exchange("numbers"), numbers)

    def exchange(self, name: str) -> str:
        """A key for one exchange between processes: all count alike."""
        self._num_exchanges += 1
        return f"{self._name}{self._num_exchanges}/{name}"

    def prompts(self, name, node, buffer) -> dict[str, Array | np.ndarray]:
        """What a generating call takes."""
        allocation = self.plan.calls[name].allocation
        return {
            "prompts": buffer.get(node.key("prompts"), allocation),
            "lengths": buffer.lengths["prompts"],
            "ids": buffer.ids.astype(np.uint32),
        }

    def key(self, name: str, step: int, is_training: bool) -> Array:
        """Of a call in a step; evaluation draws the same at every step."""
        seed = jax.random.key(self.programs.seed)
        key = jax.random.fold_in(seed, step if is_training else 0)
        offset = zlib.crc32(name.encode()) ^ (0 if is_training else 1)
        return jax.random.fold_in(key, offset)

    def rows_here(self, size: int) -> np.ndarray | None:
        """Whether a call in this process reads each row of a batch of the data set.

        Args:
            size: rows of the batch.

        Returns:
            [size] booleans; None for all, where there is one process.
        """
        if jax.process_count() == 1:
            return None
        is_needed, group = np.zeros(size, bool), 1
        for name in self.graph.order():
            node = self.graph.calls[name]
            if any(key in self.graph.inputs for key in node.reads):
                if isinstance(node.function, Score):
                    is_needed[:] = True  # Text has no mesh: process 0 scores it all.
                    continue
                mesh = make_mesh(self.plan.calls[name].allocation)
                rows = rows_sharding(mesh, size * group)
                places = rows.addressable_devices_indices_map((size * group,))
                for index in places.values():
                    start, stop, _ = (index or (slice(None),))[0].indices(size * group)
                    is_needed[start // group : -(-stop // group)] = True
            if isinstance(node.function, Generate):
                group *= node.function.completions_per_prompt
        return is_needed

    def is_here(self, name: str) -> bool:
        """Whether this process has a device of a call's mesh."""
        devices = jax.devices()
        return any(
            devices[index].process_index == jax.process_index()
            for index in self.plan.calls[name].allocation.devices
        )

    @contextlib.contextmanager
    def running(self, name: str, passing: Pass) -> Iterator[Outputs | None]:
        """Observes a call, and counts it; None where it does not run."""
        if not self.is_here(name):
            yield None
            return
        self.num_runs[name] += 1
        devices = self.plan.calls[name].allocation.devices
        with self.watch.calling(name, devices, step=passing.step) as event:
            yield event

    def _inputs(
        self, node: ModelFunctionCall, buffer: Buffer, name: str
    ) -> dict[str, Array]:
        allocation = self.plan.calls[name].allocation
        return {
            local: buffer.get(node.key(local), allocation)
            for local in node.function.reads
            if node.key(local) in buffer  # A set that kept everything is not there.
        }

    def _own_rows(self, buffer: Buffer, key: str) -> np.ndarray:
        """Real rows that this process is the first to hold."""
        value = buffer.value(key)
        is_own = np.zeros(buffer.size, bool)
        if not isinstance(value, jax.Array):
            is_own[:] = jax.process_index() == 0
        else:
            holders: dict[Any, Any] = {}
            places = value.sharding.devices_indices_map(value.shape)
            for device, (rows, *_) in places.items():
                bounds, process = rows.indices(buffer.size)[:2], device.process_index
                holders[bounds] = min(holders.get(bounds, process), process)
            for (start, stop), process in holders.items():
                is_own[start:stop] = process == jax.process_index()
        return np.flatnonzero(is_own & (buffer.ids >= 0))

    def _texts(self, buffer: Buffer, tokens: str, mask: str, rows: np.ndarray) -> Texts:
        """Of rows that this process holds."""
        columns = {
            key: [values[row] for row in rows]
            for key, values in buffer.columns.items()
            if key != "prompt"
        }
        held = [_held_rows(buffer.value(key), rows) for key in (tokens, mask)]
        return *completion_texts(self.tokenizer, *held), columns

    def _described_outputs(self, name, spec, arguments, size: int) -> dict[str, Array]:
        """What a Transform that runs elsewhere makes of the batch."""
        mesh = make_mesh(self.plan.calls[name].allocation)
        outputs = jax.eval_shape(spec.fn, *arguments)[-2]
        return handles(
            jax.tree.map(lambda x: _placed(x, rows_sharding(mesh, size)), outputs)
        )

    def _initial_state(self, name: str, spec: Transform) -> PyTree:
        assert spec.state is not None
        whole = replicated(make_mesh(self.plan.calls[name].allocation))
        if not self.is_here(name):
            described = jax.eval_shape(spec.state)
            return handles(jax.tree.map(lambda x: _placed(x, whole), described))
        return jax.jit(spec.state, out_shardings=whole)()

    def _train_metrics(self, node: ModelFunctionCall, reports) -> Metrics:
        """Names of a training call's metrics: by role where several roles learn."""
        spec: Train = node.function  # pyright: ignore[reportAssignmentType]: a Train
        suffix = f"/{node.role}" if len(self.graph.trained_roles) > 1 else ""
        common = ("grad_norm", "learning_rate", "skipped", "nonfinite")
        names: dict[str, str] = {name: name + suffix for name in common}
        names["loss"] = spec.loss_name
        metrics: Metrics = {}
        for index, report in enumerate(reports):
            for name, mean in report.items():
                if index and name.startswith("rollout_gap/"):
                    continue  # By now it is also what was learned in between.
                key = names[name] if name in names else name
                if name.startswith("router/"):
                    key = name + suffix
                metrics.setdefault(key, []).append(mean)
        return metrics


def _placed(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _held_rows(value: Array | np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Read rows of an array off this process's part of it."""
    if not isinstance(value, jax.Array):
        return value[rows]
    held = np.zeros(value.shape, value.dtype)
    for shard in value.addressable_shards:
        held[shard.index] = np.asarray(shard.data)
    return held[rows]
