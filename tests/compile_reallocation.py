r"""Compile what a reallocation of Llama 3.1 8B runs on eight H200s.

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot:. \
        python tests/compile_reallocation.py f8:t8 cast

Arguments: two allocations, and "cast", from float32 masters to bfloat16 copies; "mix",
into averages in float32; or "identity", what the compiler makes of the cast when it is
one jitted identity. "kernel" after those: blocks are copied by the kernel wherever it
can. Prints one line of JSON: bytes of one device. Used by
`gpu_compile_test.py`.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from configs.compile_llama_8b import LLAMA_8B
from pallas_kernels.interval_copy import mosaic
from pallas_kernels.testing import aot
from pallas_kernels.testing.hlo import collectives
from realjax.bench.layout_pairs import Pair
from realjax.core.config import to_dataclass
from realjax.models.config import ModelConfig
from realjax.models.parameters import abstract_parameters
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import padded_for, parameter_shardings
from realjax.realloc import programs
from realjax.realloc.pieces import Cut, Join, Move
from realjax.realloc.plans import Plan, make_plan
from realjax.realloc.requests import Request

# Memory space 5 is that of the host.
HOST = re.compile(r"S\(5\)| (?:infeed|outfeed|send|recv)\(")
CALL = re.compile(r'custom_call_target="([^"]*)"')


def make_requests(
    pair: Pair, machine: aot.Machine, is_mixed: bool
) -> tuple[Request, ...]:
    """What is asked for every parameter."""
    config = to_dataclass(ModelConfig, dict(LLAMA_8B), path="LLAMA_8B")
    abstract = abstract_parameters(padded_for(config, [pair.source, pair.destination]))
    sides = []
    for allocation in (pair.source, pair.destination):
        mesh = make_mesh(allocation, machine.devices)
        shardings = parameter_shardings(abstract, mesh, options=allocation.options)
        sides.append(jax.tree.leaves(shardings))
    leaves = jax.tree.leaves(abstract, is_leaf=lambda node: hasattr(node, "axes"))
    float32 = np.dtype(jnp.float32)
    new_dtype = float32 if is_mixed else np.dtype(jnp.bfloat16)
    return tuple(
        Request(source, destination, leaf.shape, float32, new_dtype, is_mixed)
        for leaf, source, destination in zip(leaves, *sides, strict=True)
    )


class Compiler:
    """Compiles the programs of a plan, and adds up what they need."""

    def __init__(
        self, machine: aot.Machine, requests: tuple[Request, ...], is_mixed: bool
    ):
        """Plans as a reallocation would whose result nobody else reads."""
        self.machine, self.requests, self.is_mixed = machine, requests, is_mixed
        self.plan: Plan = make_plan(
            requests, is_shared=False, is_donated=is_mixed, chunk_bytes=None
        )
        self.sliced = [requests[number] for number in self.plan.sliced]
        self.programs: list[dict[str, Any]] = []

    def compile_all(self) -> int:
        """Compile everything; return the most bytes beside sources and results."""
        most = 0
        for number, (leaves, identity) in enumerate(self.plan.identities):
            asked = [self.requests[leaf] for leaf in leaves]
            sources = [_shape(r.shape, r.dtype, r.source) for r in asked]
            targets = [_shape(r.shape, r.new_dtype, r.destination) for r in asked]
            found = self._compile(
                f"identity {number}",
                identity.mesh,
                identity.function,
                sources,
                targets if self.is_mixed else None,
                self._eta(identity.mesh),
            )
            most = max(most, found)
        is_alone = sum(move.steps for move in self.plan.moves) == 1
        for number, move in enumerate(self.plan.moves):
            most = max(most, self._compile_move(number, move, is_alone))
        return most

    def _compile_move(self, number: int, move: Move, is_alone: bool) -> int:
        """Compile one step; return the most that parcels and programs take at once."""
        parcels = dict.fromkeys((d.id for d in self.machine.devices), 0)
        temporary = 0
        for place, cut in enumerate(move.cuts):
            step = None if is_alone else _step(cut.mesh)
            shards = list(self._shards(cut))
            name = f"cut {number}.{place}"
            needs = self._compile(name, cut.mesh, cut.function, shards, step, step)
            temporary = max(temporary, needs)
            with aot.compiling_for(self.machine, cut.mesh):
                buffers = jax.eval_shape(cut.function, shards, step, step)[0]
            _add(parcels, cut.mesh, buffers)
        for place, join in enumerate(move.joins):
            step = None if is_alone else _step(join.mesh)
            came = [
                _shape(view.shape, self.sliced[join.makes[0]].wire_dtype, view.sharding)
                for view in join.received
            ]
            _add(parcels, join.mesh, came)
            into = [
                _shape(view.shape, self.sliced[view.leaf].new_dtype, view.sharding)
                for view in join.targets
            ]
            name = f"{number}.{place}"
            if join.begin is not None:
                needs = self._compile(
                    f"begin {name}", join.mesh, join.begin, into, step
                )
                temporary = max(temporary, needs)
                with aot.compiling_for(self.machine, join.mesh):
                    begun = jax.eval_shape(join.begin, into, step)[0]
                into = [
                    _shape(x.shape, x.dtype, programs.over(join.mesh, x.ndim))
                    for x in begun
                ]
            needs = self._compile(
                f"join {name}",
                join.mesh,
                join.function,
                into,
                [*self._shards(join), *came],
                step,
                self._eta(join.mesh),
            )
            temporary = max(temporary, needs)
        return max(parcels.values()) + temporary

    def _shards(self, program: Cut | Join) -> Iterator[jax.ShapeDtypeStruct]:
        for view in program.shards:
            yield _shape(view.shape, self.sliced[view.leaf].dtype, view.sharding)

    def _eta(self, mesh: Mesh) -> jax.ShapeDtypeStruct | None:
        whole = NamedSharding(mesh, PartitionSpec())
        return _shape((), jnp.float32, whole) if self.is_mixed else None

    def _compile(self, name: str, mesh: Mesh, function: Any, *arguments: Any) -> int:
        """Compile and note one program; return the bytes of its temporaries."""
        with aot.compiling_for(self.machine, mesh):
            compiled = function.trace(*arguments).lower().compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None and text is not None
        self.programs.append(
            {
                "program": name,
                "argument_bytes": memory.argument_size_in_bytes,
                "output_bytes": memory.output_size_in_bytes,
                "alias_bytes": memory.alias_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
                "host_bytes": memory.host_argument_size_in_bytes
                + memory.host_output_size_in_bytes
                + memory.host_temp_size_in_bytes,
                "on_host": [
                    line[:200] for line in text.splitlines() if HOST.search(line)
                ],
                "custom_calls": sorted(set(CALL.findall(text))),
                "collectives": [dataclasses.asdict(c) for c in collectives(text)],
            }
        )
        return memory.temp_size_in_bytes


def _shape(shape: Any, dtype: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _step(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return _shape((mesh.size,), jnp.int32, programs.over(mesh, 1))


def _add(parcels: dict[int, int], mesh: Mesh, arrays: Any) -> None:
    """Count the bytes of one device's part of arrays on each device of a program."""
    size = sum(x.size * x.dtype.itemsize for x in arrays) // mesh.size
    for device in mesh.devices.flat:
        parcels[device.id] += size


def compile_identity(
    machine: aot.Machine, requests: tuple[Request, ...]
) -> dict[str, Any]:
    """Leave the whole tree to the compiler."""
    function = jax.jit(
        lambda arrays: [array.astype(jnp.bfloat16) for array in arrays],
        out_shardings=[request.destination for request in requests],
    )
    arrays = [_shape(r.shape, r.dtype, r.source) for r in requests]
    mesh = requests[0].destination.mesh  # type: ignore[attr-defined]
    return aot.compile_for(machine, function, arrays, mesh=mesh).as_dict()


def main(pair: str, kind: str, copying: str = "") -> None:
    """Compile everything, then one line of JSON."""
    if copying == "kernel":
        mosaic.FEWEST_LAUNCHES = 0
    machine = aot.describe("h200x8")
    requests = make_requests(Pair.parse(pair), machine, is_mixed=kind == "mix")
    if kind == "identity":
        print(json.dumps(compile_identity(machine, requests)))
        return
    compiler = Compiler(machine, requests, is_mixed=kind == "mix")
    beside_bytes = compiler.compile_all()
    shard_bytes = sum(
        int(np.prod(r.destination.shard_shape(r.shape))) * r.new_dtype.itemsize
        for r in requests
    )
    result = {
        "arrays": compiler.plan.traffic.leaves,
        "steps": [move.steps for move in compiler.plan.moves],
        "shard_bytes": shard_bytes,
        "beside_bytes": beside_bytes,
        "programs": compiler.programs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
