"""A run on devices that are not there: its programs, and shapes of what they take.

    for part in described_programs(config, describe("h200x8"), plan):
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
from realjax.dataflow.plan import ExecutionPlan
from realjax.functions.function import LANGUAGE_OUTPUTS, Generate, Infer, Score, Train
from realjax.functions.generate import GenerateProgram
from realjax.functions.infer import InferProgram
from realjax.functions.packed import ModelProgram
from realjax.functions.train import TrainProgram
from realjax.models import hf
from realjax.models.config import ModelConfig
from realjax.models.parameters import split
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.parallel.sharding import (
    check_fit,
    padded_for,
    replicated,
)
from realjax.realloc.offload import moved_in_program
from realjax.rollout.engine import Engine
from realjax.runtime.described_shapes import (
    Shapes,
    array,
    data_shapes,
    on_mesh,
    parameters,
    placed,
    router_inputs,
    train_state,
)
from realjax.runtime.programs import SEQUENCES_PER_ROW
from realjax.runtime.run import make_graph
from realjax.runtime.run_config import RunConfig

DTYPE = "bfloat16"
"""Of products on described devices, where a role does not say."""


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
        beside: what stays on the devices meanwhile and is not among the arguments.
    """

    call: str
    role: str
    allocation: Allocation
    name: str
    function: Callable
    arguments: tuple[Any, ...]
    mesh: Mesh
    machine: aot.Machine
    beside: PyTree = ()

    def compile(self) -> aot.Report:
        """Compile it for the described devices."""
        return aot.compile_for(
            self.machine, self.function, *self.arguments, mesh=self.mesh
        )


def described_programs(
    config: RunConfig,
    machine: aot.Machine,
    plan: ExecutionPlan,
    calls: tuple[str, ...] = (),
) -> Iterator[DescribedProgram]:
    """Make the programs of a run's calls, on described devices.

    Args:
        config: of the run. Roles without a path need `vocab_size` in their `model`.
        machine: the devices.
        plan: of the run, its allocations within the devices.
        calls: which; empty means every call of a role.

    Raises:
        ValueError: a call that is not in the graph, or a model that is not known.
    """
    run = _Described(config, machine, plan)
    for name in calls:
        node = run.graph.calls.get(name)
        if node is None or node.role is None:
            known = [n for n, c in run.graph.calls.items() if c.role is not None]
            raise ValueError(
                f"{name!r} is no call of a role in this graph. Its calls are"
                f" {', '.join(known)}."
            )
    for name in run.graph.order():
        yield from run.programs(name, is_wanted=not calls or name in calls)


class _Described:
    """The batch of one step as shapes, and the programs that fill it."""

    def __init__(self, config: RunConfig, machine: aot.Machine, plan: ExecutionPlan):
        self.config, self.machine, self.plan = config, machine, plan
        self.graph = make_graph(config)
        self.models = {
            role: _model(config, self.graph, self.plan, role)
            for role in self.graph.roles
        }
        self.prompt_width, self.width = described_widths(self.graph, config.data)
        self.size = described_size(config.data)
        self.batch = data_shapes(self.graph, self.size, self.prompt_width, self.width)

    def programs(self, name: str, *, is_wanted: bool = True) -> list[DescribedProgram]:
        """Make the programs of a call, if wanted; its outputs join the batch."""
        node = self.graph.calls[name]
        spec = node.function
        if isinstance(spec, Score):
            self._put(node, {"scores": array((self.size,), jnp.float32)})
            return []
        if node.role is None:
            return self._transform(node)
        allocation = self.plan.calls[name].allocation
        mesh = make_mesh(allocation, self.machine.devices)
        role = self.config.roles[node.role]
        dtype = role.dtype or DTYPE
        program = ModelProgram(
            config=self.models[node.role],
            dtype=dtype,
            remat=role.remat or self.plan.calls[name].remat or "none",
            partition=partition_for(mesh, options=allocation.options),
            options=allocation.options,
        )
        beside = {}
        if isinstance(spec, Generate):
            parts = self._generate(name, node, program, mesh, is_wanted)
        elif isinstance(spec, Infer):
            parts = self._infer(name, node, program, mesh)
        elif isinstance(spec, Train) and is_wanted:
            parts, beside = self._train(name, node, program, mesh)
        else:  # Following is arithmetic on parameters, one array after the other.
            return []
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
                beside=beside.get(part, ()),
            )
            for part, (function, arguments) in parts.items()
            if is_wanted
        ]

    def _generate(self, name, node, program: ModelProgram, mesh: Mesh, is_wanted: bool):
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
        prompts = on_mesh(mesh, {"": self.batch[node.key("prompts")]})[""]
        for key, value in self.batch.items():
            if key != "prompts" and value.shape[0] == num_prompts:
                self.batch[key] = array((self.size, *value.shape[1:]), value.dtype)
        made = {
            local: array((self.size, *value.shape[1:]), value.dtype)
            for local in spec.writes
            if (value := getattr(rollout, local)) is not None
        }
        self._put(node, made)
        if not is_wanted:
            return {}
        copy = self._copy(name, node, program, mesh)
        return self._launches(generate.engine, mesh, copy, prompts)

    def _launches(self, engine: Engine, mesh: Mesh, copy: PyTree, prompts):
        """Give a whole chunk of prefill, and a launch of decoding."""
        num_rows = -(-self.size // engine.num_shards) * engine.num_shards
        start = functools.partial(engine.programs.start, num_rows=num_rows)
        of_prompts, of_rows = (prompts.shape[0],), (num_rows,)
        given = (
            prompts,
            array(of_prompts, jnp.int32),
            array(of_prompts, jnp.uint32),
            jax.eval_shape(lambda: jax.random.key(0)),
            *(array(size, jnp.int32) for size in (of_rows, of_rows, (num_rows, 2))),
        )

        def described(function: Callable, *arguments: Any) -> Any:
            return jax.tree.map(
                placed,
                jax.eval_shape(function, *arguments),
                aot.output_shardings(self.machine, function, *arguments, mesh=mesh),
            )

        rows, _ = described(start, *given)
        make_pool = functools.partial(engine.programs.make_pool, **engine.pool_shape)
        pool = described(make_pool)
        width, count = engine.chunk_shapes(prompts.shape[1])[-1]
        prefill = jax.jit(
            functools.partial(engine.programs.prefill, width=width), donate_argnums=1
        )
        scalar = array((), jnp.int32)

        def table(num_rows: int, columns: int) -> jax.ShapeDtypeStruct:
            size = (num_rows * engine.num_shards, columns + engine.num_columns)
            return array(size, jnp.int32)

        chunk = (rows.tokens, rows.prompt_lengths, table(count, 3), scalar)
        slots = table(engine.room.num_slots, 2)
        return {
            "prefill": (prefill, (copy, pool, *chunk)),
            "decode": (
                engine.programs.decode,
                (copy, pool, rows, slots, scalar),
            ),
        }

    def _infer(self, name, node, program: ModelProgram, mesh: Mesh):
        infer = InferProgram(node.function, program, mesh)
        outputs = {
            local: array(value.shape, value.dtype)
            for local, value in infer.described(self.size, self.width).items()
        }
        arguments = (
            self._copy(name, node, program, mesh),
            on_mesh(mesh, outputs),
            self._inputs(node, mesh),
            self._packing(name, program),
        )
        self._put(node, outputs)
        return {"fill": (infer._fill, arguments)}

    def _copy(self, name, node, program: ModelProgram, mesh: Mesh) -> PyTree:
        """Give the parameters that a call reads."""
        dtype = "float32" if node.needs_masters else program.dtype
        return parameters(
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
        state = train_state(train, program)
        batch = self._inputs(node, mesh)
        packing = self._packing(name, program, unit=node.function.unit)
        sums = jax.eval_shape(train._zeros, state.parameters, batch, packing)
        sums = jax.tree.map(
            placed,
            sums,
            (train._cut, jax.tree.map(lambda _: replicated(mesh), sums[1])),
        )
        router = router_inputs(program.config)
        accumulate = (state.parameters, sums, batch, packing, router)
        programs = {
            "accumulate": (train._accumulate, accumulate),
            "apply": (train._apply, (train.trained(state), sums)),
        }
        _, base = split(state.parameters, program.config)
        return programs, {"accumulate": state.optimizer, "apply": base}

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
            self.batch[node.key(local)] = array(value.shape, value.dtype)

    def _inputs(self, node: ModelFunctionCall, mesh: Mesh) -> Shapes:
        keys = {local: node.key(local) for local in node.function.reads}
        return on_mesh(
            mesh, {n: self.batch[key] for n, key in keys.items() if key in self.batch}
        )

    def _packing(self, name: str, program: ModelProgram, unit: int = 1) -> Shapes:
        """Give the shapes of `data.packing.Packing`, as the executor asks for it."""
        num_rows = self.plan.num_rows(name, max_rows=self.size, row_length=self.width)
        check_fit(self.plan.calls[name].allocation, program.config, batch_rows=num_rows)
        num_slots = max(unit, min(self.size, SEQUENCES_PER_ROW * num_rows))
        num_slots -= num_slots % unit
        of_rows = array((num_rows, self.width), jnp.int32)
        return {
            "sequences": array((num_slots,), jnp.int32),
            "source_sequence": of_rows,
            "source_token": of_rows,
            "segment_ids": of_rows,
            "places": array((num_slots, self.width), jnp.int32),
        }


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


def described_model(
    config: RunConfig, graph: DataflowGraph, role: str, *, dtype: str = DTYPE
) -> ModelConfig:
    """Give the model of a role, of which nothing is loaded.

    Args:
        config: of the run.
        graph: of its algorithm.
        role: whose model.
        dtype: of its products, where the config does not say.

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
    head = "language" if outputs & {*LANGUAGE_OUTPUTS} else "scalar"
    if given.path:
        own = hf.read_config(given.path, family=given.family or None, label=given.label)
        model = dataclasses.replace(own, head=head)
    elif "vocab_size" not in given.model:
        raise ValueError(
            f"config.roles.{role} has no path, and its model no vocab_size, which a run"
            " takes from the tokenizer. Give one of them to compile it."
        )
    else:
        path = f"config.roles.{role}.model"
        model = to_dataclass(ModelConfig, dict(given.model) | {"head": head}, path=path)
    return given.lora.applied(given.router.applied(model), given.dtype or dtype)


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
