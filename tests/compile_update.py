"""Compile the optimizer's update of Llama 3.1 8B alone, for H200s.

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot:. python tests/compile_update.py f8 streamed

Arguments: a strategy, and "streamed" or "resident". Prints one line of JSON: bytes of
one device and of its part of host memory. Used by `gpu_compile_test.py`.
"""

import json
import sys

import jax
import jax.numpy as jnp

from configs.compile_llama_8b import LLAMA_8B
from pallas_kernels.testing import aot
from realjax.algorithms import sft
from realjax.core.config import to_dataclass
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.packed import ModelProgram
from realjax.functions.train import TrainProgram
from realjax.models import transformer
from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.parallel.sharding import padded_for
from realjax.realloc.offload import moved_in_program
from realjax.rl.masking import Mean


def make_program(strategy: str, machine: aot.Machine, offload: bool) -> TrainProgram:
    allocation = Allocation.parse(strategy)
    mesh = make_mesh(allocation, machine.devices)
    config = to_dataclass(ModelConfig, dict(LLAMA_8B), path="LLAMA_8B")
    program = ModelProgram(
        config=padded_for(config, [allocation]),
        dtype="bfloat16",
        partition=partition_for(mesh, options=allocation.options),
        options=allocation.options,
    )
    spec = sft.graph(sft.SFT()).calls["train_policy"].function
    optimizer = OptimizerConfig(offload=offload)
    return TrainProgram(spec, program, mesh, optimizer, 1000, moved_in_program)


def arguments_of(program: TrainProgram) -> tuple:
    """Shapes of the state, and of the sums of gradients."""
    masters = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
        transformer.abstract_parameters(program.program.config),
        is_leaf=lambda node: hasattr(node, "axes"),
    )
    state = type(program.shardings)(
        masters, jax.eval_shape(program.optimizer.init, masters)
    )
    placed = lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
    )
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=program._whole)
    gradients = jax.tree.map(placed, masters, program._cut)
    state = jax.tree.map(placed, state, program.shardings)
    return state, (gradients, {"loss": Mean(scalar, scalar)})


def main(strategy: str, kind: str) -> None:
    machine = aot.describe(f"h200x{Allocation.parse(strategy).size}")
    program = make_program(strategy, machine, offload=kind == "streamed")
    arguments = arguments_of(program)
    with aot.compiling_for(machine, program.mesh):
        compiled = program._apply.trace(*arguments).lower().compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    found = {
        f"{place}{name}_bytes": getattr(memory, f"{place}{size}_size_in_bytes")
        for place in ("", "host_")
        for name, size in (
            ("argument", "argument"),
            ("alias", "alias"),
            ("temporary", "temp"),
        )
    }
    found["peak_bytes"] = memory.peak_memory_in_bytes
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
