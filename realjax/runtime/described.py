"""A run on devices that are not there: its programs, and shapes of what they take.

    for part in described_programs(config, describe("h200x8")):
        report = part.compile()

Nothing is loaded and nothing runs: models are their configs, batches are shapes. What
each call writes is worked out from what it reads, through the graph.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels.testing import aot
from realjax.core.arrays import PyTree
from realjax.core.config import to_dataclass
from realjax.data.datasets import DataConfig
from realjax.dataflow.graph import DataflowGraph, ModelFunctionCall
from realjax.dataflow.plan import ExecutionPlan, make_plan
from realjax.functions.function import INFERRED, Generate, Infer, Score
from realjax.functions.generate import GenerateProgram
from realjax.functions.infer import InferProgram
from realjax.functions.packed import ModelProgram
from realjax.functions.routers import RouterInputs
from realjax.functions.train import TrainProgram
from realjax.models import hf, quantized, transformer
from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.parallel.sharding import (
    check_fit,
    padded_for,
    parameter_shardings,
    replicated,
    rows_sharding,
)
from realjax.realloc.offload import moved_in_program
from realjax.rollout.engine import Engine
from realjax.runtime.programs import SEQUENCES_PER_ROW
from realjax.runtime.run import make_graph
from realjax.runtime.run_config import RunConfig

MICROBATCH_TOKENS = 16384
"""Of a device, where the config does not say: what a run on GPUs takes."""

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribedProgram:
    """One compiled program of a call.

    Attributes:
        call: its name.
        role: whose parameters it uses.
        allocation: of the call.
        name: of the program within the call, as in "accumulate".
        function: jitted.
        arguments: their shapes, types and shardings.
        mesh: of the call.
        machine: the devices.
    """

    call: str
    role: str
    allocation: Allocation
    name: str
    function: Callable
    arguments: tuple[Any, ...]
    mesh: Mesh
    machine: aot.Machine

    def compile(self) -> aot.Report:
        """Compile it for the described devices."""
        return aot.compile_for(
            self.machine, self.function, *self.arguments, mesh=self.mesh
        )


def described_programs(
    config: RunConfig, machine: aot.Machine, calls: tuple[str, ...] = ()
) -> Iterator[DescribedProgram]:
    """Make the programs of a run's calls, on described devices.

    Args:
        config: of the run. Roles without a path need `vocab_size` in their `model`.
        machine: the devices; the plan is the run's on as many.
        calls: which; empty means every call of a role.

    Raises:
        ValueError: a call that is not in the graph, or a model that is not known.
    """
    run = _Described(config, machine)
    for name in calls:
        node = run.graph.calls.get(name)
        if node is None or node.role is None:
            known = [n for n, c in run.graph.calls.items() if c.role is not None]
            raise ValueError(
                f"{name!r} is no call of a role in this graph. Its calls are"
                f" {', '.join(known)}."
            )
    for name in run.graph.order():
        parts = run.programs(name)
        if not calls or name in calls:
            yield from parts


class _Described:
    """The batch of one step as shapes, and the programs that fill it."""

    def __init__(self, config: RunConfig, machine: aot.Machine):
        self.config, self.machine = config, machine
        self.graph = make_graph(config)
        num_devices = len(machine.devices)
        fits = num_devices >= config.allocations_devices
        self.plan = make_plan(
            self.graph,
            num_devices=num_devices,
            allocation=config.allocation,
            allocations=config.allocations if fits else {},
            rows=config.rows,
            pages=config.pages,
            kv_dtype=config.kv_dtype,
            weights=config.weights,
            role_weights={name: r.weights for name, r in config.roles.items()},
            microbatch_tokens=config.microbatch_tokens
            or MICROBATCH_TOKENS * num_devices,
            offloaded=[name for name, role in config.roles.items() if role.offload],
        )
        self.models = {
            role: _model(config, self.graph, self.plan, role)
            for role in self.graph.roles
        }
        self.prompt_width, self.width = described_widths(self.graph, config.data)
        self.size = described_size(config.data)
        self.batch = _data_shapes(self.graph, self.size, self.prompt_width, self.width)

    def programs(self, name: str) -> list[DescribedProgram]:
        """Make the programs of a call; its outputs join the batch."""
        node = self.graph.calls[name]
        spec = node.function
        if isinstance(spec, Score):
            self._put(node, {"scores": _shape((self.size,), jnp.float32)})
            return []
        if node.role is None:
            return self._transform(node)
        allocation = self.plan.calls[name].allocation
        mesh = make_mesh(allocation, self.machine.devices)
        role = self.config.roles[node.role]
        dtype = role.dtype or "bfloat16"
        program = ModelProgram(
            config=self.models[node.role],
            dtype=dtype,
            remat=role.remat or self.plan.calls[name].remat or "none",
            partition=partition_for(mesh, options=allocation.options),
            options=allocation.options,
        )
        if isinstance(spec, Generate):
            parts = self._generate(name, node, program, mesh)
        elif isinstance(spec, Infer):
            parts = self._infer(name, node, program, mesh)
        else:
            parts = self._train(name, node, program, mesh)
        return [
            DescribedProgram(
                call=name,
                role=node.role,
                allocation=allocation,
                name=part,
                function=function,
                arguments=arguments,
                mesh=mesh,
                machine=self.machine,
            )
            for part, (function, arguments) in parts.items()
        ]

    def _generate(self, name, node, program: ModelProgram, mesh: Mesh):
        spec, num_prompts = node.function, self.size
        self.size *= spec.completions_per_prompt
        settings = self.plan.rollout_settings(name, num_rows=self.size)
        generate = GenerateProgram(
            spec,
            program,
            mesh,
            eos_ids=program.config.eos_ids or (0,),
            width=self.width,
            settings=settings,
        )
        rollout = generate.described(num_prompts)
        prompts = _on(mesh, {"": self.batch[node.key("prompts")]})[""]
        for key, value in self.batch.items():
            if key != "prompts" and value.shape[0] == num_prompts:
                self.batch[key] = _shape((self.size, *value.shape[1:]), value.dtype)
        made = {
            local: _shape((self.size, *value.shape[1:]), value.dtype)
            for local in spec.writes
            if (value := getattr(rollout, local)) is not None
        }
        self._put(node, made)
        parameters = self._copy(name, node, program, mesh)
        return self._launches(generate.engine, mesh, parameters, prompts)

    def _launches(self, engine: Engine, mesh: Mesh, parameters: PyTree, prompts):
        """Give a whole chunk of prefill, and a launch of decoding."""
        num_rows = -(-self.size // engine.num_shards) * engine.num_shards
        start = functools.partial(engine.programs.start, num_rows=num_rows)
        of_prompts, of_rows = (prompts.shape[0],), (num_rows,)
        given = (
            prompts,
            _shape(of_prompts, jnp.int32),
            _shape(of_prompts, jnp.uint32),
            jax.eval_shape(lambda: jax.random.key(0)),
            *(_shape(size, jnp.int32) for size in (of_rows, of_rows, (num_rows, 2))),
        )

        def placed(function: Callable, *arguments: Any) -> Any:
            return jax.tree.map(
                _placed,
                jax.eval_shape(function, *arguments),
                aot.output_shardings(self.machine, function, *arguments, mesh=mesh),
            )

        rows, _ = placed(start, *given)
        pool = placed(functools.partial(engine.programs.make_pool, **engine.pool_shape))
        width, count = engine.chunk_shapes(prompts.shape[1])[-1]
        prefill = jax.jit(
            functools.partial(engine.programs.prefill, width=width), donate_argnums=1
        )
        scalar = _shape((), jnp.int32)

        def table(num_rows: int, columns: int) -> jax.ShapeDtypeStruct:
            size = (num_rows * engine.num_shards, columns + engine.num_columns)
            return _shape(size, jnp.int32)

        chunk = (rows.tokens, rows.prompt_lengths, table(count, 3), scalar)
        slots = table(engine.room.num_slots, 2)
        return {
            "prefill": (prefill, (parameters, pool, *chunk)),
            "decode": (
                engine.programs.decode,
                (parameters, pool, rows, slots, scalar),
            ),
        }

    def _infer(self, name, node, program: ModelProgram, mesh: Mesh):
        infer = InferProgram(node.function, program, mesh)
        outputs = {
            local: _shape(
                (self.size, self.width)
                if local in ("logprobs", "values")
                else (self.size,),
                jnp.float32,
            )
            for local in INFERRED[node.function.output]
        }
        arguments = (
            self._copy(name, node, program, mesh),
            _on(mesh, outputs),
            self._inputs(node, mesh),
            self._packing(name, program),
        )
        self._put(node, outputs)
        return {"fill": (infer._fill, arguments)}

    def _copy(self, name, node, program: ModelProgram, mesh: Mesh) -> PyTree:
        """Give the parameters that a call reads."""
        dtype = "float32" if node.needs_masters else program.dtype
        return _parameters(
            program, mesh, jnp.dtype(dtype), self.plan.calls[name].weights
        )

    def _train(self, name, node, program: ModelProgram, mesh: Mesh):
        config = self.config.roles[node.role].optimizer
        train = TrainProgram(
            node.function,
            program,
            mesh,
            config,
            num_updates=1000,
            move=moved_in_program,
        )
        state = _train_state(train, program)
        batch = self._inputs(node, mesh)
        packing = self._packing(name, program, unit=node.function.unit)
        sums = jax.eval_shape(train._zeros, state.parameters, batch, packing)
        sums = jax.tree.map(
            _placed,
            sums,
            (train._cut, jax.tree.map(lambda _: replicated(mesh), sums[1])),
        )
        router = _router_inputs(program.config)
        accumulate = (state.parameters, sums, batch, packing, router)
        return {
            "accumulate": (train._accumulate, accumulate),
            "apply": (train._apply, (state, sums)),
        }

    def _transform(self, node: ModelFunctionCall) -> list[DescribedProgram]:
        spec: Any = node.function
        batch = {n: self.batch[node.key(n)] for n in spec.reads}
        if spec.state is None:
            made, _ = jax.eval_shape(spec.fn, batch)
        else:
            _, made, _ = jax.eval_shape(spec.fn, jax.eval_shape(spec.state), batch)
        self._put(node, made)
        return []

    def _put(self, node: ModelFunctionCall, made: Mapping[str, Any]) -> None:
        for local, value in made.items():
            self.batch[node.key(local)] = _shape(value.shape, value.dtype)

    def _inputs(self, node: ModelFunctionCall, mesh: Mesh) -> Shapes:
        keys = {local: node.key(local) for local in node.function.reads}
        return _on(
            mesh, {n: self.batch[key] for n, key in keys.items() if key in self.batch}
        )

    def _packing(self, name: str, program: ModelProgram, unit: int = 1) -> Shapes:
        """Give the shapes of `data.packing.Packing`, as the executor asks for it."""
        num_rows = self.plan.num_rows(name, max_rows=self.size, row_length=self.width)
        check_fit(self.plan.calls[name].allocation, program.config, batch_rows=num_rows)
        num_slots = max(unit, min(self.size, SEQUENCES_PER_ROW * num_rows))
        num_slots -= num_slots % unit
        of_rows = _shape((num_rows, self.width), jnp.int32)
        return {
            "sequences": _shape((num_slots,), jnp.int32),
            "source_sequence": of_rows,
            "source_token": of_rows,
            "segment_ids": of_rows,
            "places": _shape((num_slots, self.width), jnp.int32),
        }


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _on(mesh: Mesh, arrays: Shapes) -> Shapes:
    """Lay the rows of batch keys over a mesh."""
    return {
        key: _placed(value, rows_sharding(mesh, value.shape[0]))
        for key, value in arrays.items()
    }


def _abstract(program: ModelProgram, dtype: Any, weights: str = "") -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype or dtype),
        quantized.abstract(transformer.abstract_parameters(program.config), weights),
        is_leaf=lambda node: hasattr(node, "axes"),
    )


def _parameters(
    program: ModelProgram, mesh: Mesh, dtype: Any, weights: str = ""
) -> PyTree:
    abstract = transformer.abstract_parameters(program.config)
    shardings = parameter_shardings(
        quantized.abstract(abstract, weights), mesh, options=program.options
    )
    return jax.tree.map(_placed, _abstract(program, dtype, weights), shardings)


def _train_state(train: TrainProgram, program: ModelProgram) -> Any:
    masters = _abstract(program, jnp.float32)
    moments = jax.eval_shape(train.optimizer.init, masters)
    return jax.tree.map(
        _placed, type(train.shardings)(masters, moments), train.shardings
    )


def _router_inputs(config: ModelConfig) -> RouterInputs | None:
    moe = config.moe
    if moe is None:
        return None
    has_losses = moe.aux_loss_coef or moe.z_loss_coef
    key = jax.eval_shape(lambda: jax.random.key(0))
    return RouterInputs(
        scale=_shape((), jnp.float32) if has_losses else None,
        noise_key=key if moe.jitter else None,
    )


def _model(
    config: RunConfig, graph: DataflowGraph, plan: ExecutionPlan, role: str
) -> ModelConfig:
    """Give the model of a role, padded for the strategies of its calls."""
    model = described_model(config, graph, role)
    places = [name for name in plan.calls if graph.calls[name].role == role]
    allocations = [plan.calls[name].allocation for name in places]
    for allocation in allocations:
        check_fit(allocation, model)
    return padded_for(model, allocations)


def described_model(config: RunConfig, graph: DataflowGraph, role: str) -> ModelConfig:
    """Give the model of a role, of which nothing is loaded.

    Args:
        config: of the run.
        graph: of its algorithm.
        role: whose model.

    Raises:
        ValueError: the config has no such role, or no size of its vocabulary.
    """
    if role not in config.roles:
        raise ValueError(
            f"The graph uses the role {role!r}, and config.roles has"
            f" {', '.join(config.roles) or 'none'}. Add config.roles.{role}."
        )
    given, outputs = config.roles[role], set()
    for node in graph.of(role):
        outputs.add(getattr(node.function, "output", "logprobs"))
    head = "language" if "logprobs" in outputs else "scalar"
    if given.path:
        own = hf.read_config(given.path, family=given.family or None)
        model = dataclasses.replace(own, head=head)
    elif "vocab_size" not in given.model:
        raise ValueError(
            f"config.roles.{role} has no path, and its model no vocab_size, which a run"
            " takes from the tokenizer. Give one of them to compile it."
        )
    else:
        path = f"config.roles.{role}.model"
        model = to_dataclass(ModelConfig, dict(given.model) | {"head": head}, path=path)
    return given.router.applied(model)


def described_widths(graph: DataflowGraph, data: DataConfig) -> tuple[int, int]:
    """Give P and T, the widest that the data set's limits allow.

    Args:
        graph: of the algorithm.
        data: of the config.
    """
    longest = [
        node.function.sampling.max_new_tokens
        for node in graph.calls.values()
        if isinstance(node.function, Generate)
    ]
    round_up = lambda width: -(-width // 8) * 8
    if longest:
        prompt_width = round_up(data.max_prompt_length)
        return prompt_width, round_up(prompt_width + max(longest))
    return 0, round_up(data.max_length)


def described_size(data: DataConfig) -> int:
    """Give the most sequences of a batch of the data set.

    Args:
        data: of the config.
    """
    return data.batch_size * (2 * data.max_pairs if data.kind == "pairs" else 1)


def _data_shapes(
    graph: DataflowGraph, size: int, prompt_width: int, width: int
) -> Shapes:
    """Give the shapes of what the data set holds."""
    known = {
        "prompts": _shape((size, prompt_width), jnp.int32),
        "tokens": _shape((size, width), jnp.int32),
        "completion_mask": _shape((size, width), jnp.bool_),
        "pair_weights": _shape((size,), jnp.float32),
    }
    for key in graph.inputs:
        if key not in known:
            raise ValueError(
                f"The graph reads {key!r} from the data set. Compiled without data can"
                f" be what reads {', '.join(known)}."
            )
    return {key: known[key] for key in graph.inputs}
