"""Compiling for GPUs that are not there, and what the compiled program needs.

    machine = describe("h200x8")               # a description, no device
    mesh = machine.mesh((8,), ("fsdp",))
    report = compile_for(machine, step, *arguments)      # ShapeDtypeStructs
    report.temporary_bytes, report.collectives

XLA's compiler for CUDA runs without a driver when it is told what the GPU is, as in
`specs/`. It comes as a plugin of JAX in four wheels, `requirements/aot.lock`.

Things that are easy to get wrong:

- One process per architecture: Mosaic keeps the first one it compiled for.
- A failure in LLVM ends the process; nothing here can catch it.
- Nothing may be computed while compiling for described devices, only traced: they hold
  no data. Build optimizers, keys and constants outside of `compiling_for`.
- The compiler cannot time candidates here. It takes its default kernels for matrix
  products (Triton, no cuBLAS) and sorts; with them, some temporaries differ from those
  on the real GPU.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.testing.hlo import Array, Collective, collectives, largest_arrays

_SPECS = pathlib.Path(__file__).parent / "specs"

GPUS = tuple(sorted(path.stem for path in _SPECS.glob("*.txtpb")))
"""GPUs that are described here."""

SIZES = (1, 2, 4, 8, 16)
"""Numbers of devices; up to 8 share a host."""

WHEELS = ("jax_plugins.xla_cuda13", "jax_cuda13_plugin", "nvidia.cu13")
"""Modules of the four wheels."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Described devices of one kind.

    Attributes:
        name: as in "h200x8".
        devices: in order; they compile and cannot run.
    """

    name: str
    devices: tuple[Any, ...] = dataclasses.field(repr=False)

    def mesh(self, shape: Sequence[int], axes: Sequence[str]) -> Mesh:
        """The first devices in a grid, with Auto axes."""
        grid = np.array(self.devices[: int(np.prod(shape))], dtype=object)
        types = (AxisType.Auto,) * len(axes)
        return Mesh(grid.reshape(shape), tuple(axes), axis_types=types)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a compiled program needs; bytes are those of one device.

    Attributes:
        argument_bytes: inputs, donated ones included.
        output_bytes: outputs, those in the place of donated inputs included.
        alias_bytes: outputs that are in the place of donated inputs.
        temporary_bytes: everything else while it runs.
        peak_bytes: most at one time, arguments and outputs included.
        seconds: of compilation, after tracing and lowering.
        collectives: every instruction of the program that moves data between devices.
        arrays: the largest arrays in the program, the largest first.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    seconds: float
    collectives: tuple[Collective, ...]
    arrays: tuple[Array, ...]

    def count(self, *, is_looped: bool | None = None) -> dict[str, int]:
        """Instructions by kind of collective: in loops, outside of them, or both."""
        counts: dict[str, int] = {}
        for found in self.collectives:
            if is_looped is None or found.is_looped == is_looped:
                counts[found.kind] = counts.get(found.kind, 0) + 1
        return dict(sorted(counts.items()))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "argument_bytes": self.argument_bytes,
            "output_bytes": self.output_bytes,
            "alias_bytes": self.alias_bytes,
            "temporary_bytes": self.temporary_bytes,
            "peak_bytes": self.peak_bytes,
            "seconds": round(self.seconds, 1),
            "collectives": [dataclasses.asdict(c) for c in self.collectives],
            "arrays": [dataclasses.asdict(a) for a in self.arrays],
        }


def missing_wheels() -> tuple[str, ...]:
    """Modules of the compiler for CUDA that are not installed."""

    def is_missing(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ModuleNotFoundError:  # Of the package it is in.
            return True

    return tuple(name for name in WHEELS if is_missing(name))


@functools.cache
def describe(name: str) -> Machine:
    """Describe devices that need not be there.

    Args:
        name: a GPU and how many, as in "h200x8" or "a100".

    Raises:
        ValueError: the GPU or the number is not described here.
        ModuleNotFoundError: the compiler for CUDA is not installed.
    """
    gpu, num_devices = parse(name)
    if missing := missing_wheels():
        raise ModuleNotFoundError(
            f"Compiling for {name} without a GPU needs {', '.join(missing)}, which is"
            " not installed. `make check-gpu-compile` puts all of it in .venv/aot: run"
            " with PYTHONPATH=.venv/aot. Or `pip install --no-deps --require-hashes -r"
            " requirements/aot.lock`."
        )
    num_hosts = max(1, num_devices // 8)
    found = topologies.get_topology_desc(
        platform="cuda",
        target_config=(_SPECS / f"{gpu}.txtpb").read_text(),
        topology=f"1x{num_hosts}x{num_devices // num_hosts}",
    )
    return Machine(f"{gpu}x{num_devices}", tuple(found.devices))


def parse(name: str) -> tuple[str, int]:
    """Read "h200x8" as ("h200", 8).

    Raises:
        ValueError: the GPU or the number is not described here.
    """
    match = re.fullmatch(r"([a-z]+\d+)(?:x(\d+))?", name)
    gpu, num_devices = (match[1], int(match[2] or 1)) if match else ("", 0)
    if gpu not in GPUS or num_devices not in SIZES:
        raise ValueError(
            f"{name!r} is none of the described devices. Write a GPU"
            f" ({', '.join(GPUS)}) and how many ({', '.join(map(str, SIZES))}), as in"
            " h200x8."
        )
    return gpu, num_devices


@contextlib.contextmanager
def compiling_for(machine: Machine, mesh: Mesh | None = None) -> Iterator[None]:
    """Trace and compile for described devices in this block.

    The choices of implementations follow the described platform. With a mesh, it is the
    context's abstract mesh, which is where Pallas looks up what the GPU is.
    """
    device = machine.devices[0]
    mesh = mesh or machine.mesh((1,), ("device",))
    # Mosaic assumes compute capability 9.0 without the default device.
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        jax.default_device(device),
    ):
        yield


def compile_for(
    machine: Machine,
    function: Callable,
    *arguments: Any,
    mesh: Mesh | None = None,
    num_arrays: int = 12,
) -> Report:
    """Compile a function for described devices.

    Args:
        machine: the devices.
        function: jitted, with donation and shardings of outputs, or plain.
        arguments: trees of `jax.ShapeDtypeStruct`s (arrays serve as their shapes). One
            without a sharding is replicated over the mesh.
        mesh: of the shardings; by default the first device alone.
        num_arrays: how many of the largest arrays to report.

    Returns:
        What the program needs.
    """
    compiled, seconds = _compile(machine, function, arguments, mesh)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # The compiler for CUDA has both.
    return Report(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        seconds=seconds,
        collectives=collectives(text),
        arrays=largest_arrays(text, num_arrays),
    )


def output_shardings(
    machine: Machine, function: Callable, *arguments: Any, mesh: Mesh | None = None
) -> Any:
    """Return the shardings that the compiler gives to a function's outputs.

    Args:
        machine: the devices.
        function: as for `compile_for`.
        arguments: as for `compile_for`.
        mesh: as for `compile_for`.
    """
    compiled, _ = _compile(machine, function, arguments, mesh)
    return compiled.output_shardings


def placed(machine: Machine, arguments: Any, mesh: Mesh | None = None) -> Any:
    """Return the shapes of arguments as they lie on described devices.

    Args:
        machine: the devices.
        arguments: as for `compile_for`.
        mesh: as for `compile_for`.
    """
    mesh = mesh or machine.mesh((1,), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        is_described = isinstance(leaf, jax.ShapeDtypeStruct)
        sharding = leaf.sharding if is_described else None
        return jax.ShapeDtypeStruct(
            np.shape(leaf), leaf.dtype, sharding=sharding or whole
        )

    return jax.tree.map(place, arguments)


def _compile(
    machine: Machine, function: Callable, arguments: Any, mesh: Mesh | None
) -> tuple[jax.stages.Compiled, float]:
    """Return the compiled program, and how many seconds the compiler took."""
    arguments = placed(machine, arguments, mesh)
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    with compiling_for(machine, mesh):
        lowered = jitted.trace(*arguments).lower()
        start = time.monotonic()
        compiled = lowered.compile()
        return compiled, time.monotonic() - start
