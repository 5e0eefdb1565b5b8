"""What Mosaic kernels take of a GPU that is not there: registers, spills, copies.

    report, kernels = kernels_of(describe("h200"), f, *arguments)
    kernels[0].num_registers, kernels[0].spill_bytes

Mosaic writes what it has made of a kernel to a folder as it compiles: the PTX, what
ptxas says of it, and the shared memory it asks for. All is read off there.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from jax.sharding import Mesh

from pallas_kernels.testing.aot import Machine, Report, compile_for

_OTHER_MEMORY = ("shared", "param", "local", "const")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        name: of its function.
        architecture: "sm_90a".
        num_registers: of a thread.
        spill_bytes: registers stored to memory and loaded again, by a thread.
        shared_bytes: shared memory of a block of threads.
        num_wgmma: matrix instructions of a warpgroup in the program.
        num_mma: matrix instructions of a warp.
        num_bulk_copies: instructions of the copy engine (TMA).
        accesses: instructions that read or write global memory, by bytes of a thread.
    """

    name: str
    architecture: str
    num_registers: int
    spill_bytes: int
    shared_bytes: int
    num_wgmma: int
    num_mma: int
    num_bulk_copies: int
    accesses: dict[int, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def kernels_of(
    machine: Machine, function: Callable, *arguments: Any, mesh: Mesh | None = None
) -> tuple[Report, tuple[Kernel, ...]]:
    """Compile a function for described devices, and look at its Mosaic kernels.

    A kernel that this process has compiled before is not made again, and then is
    missing here.

    Args:
        machine: as for `compile_for`.
        function: as for `compile_for`.
        arguments: as for `compile_for`.
        mesh: as for `compile_for`.

    Returns:
        What the program needs, and each kernel in the order of compilation.
    """
    with tempfile.TemporaryDirectory() as folder, _dumping_to(folder):
        report = compile_for(machine, function, *arguments, mesh=mesh)
        found = sorted(pathlib.Path(folder).glob("*.ptx"), key=_order)
        return report, tuple(_read(path) for path in found)


@contextlib.contextmanager
def _dumping_to(folder: str) -> Iterator[None]:
    wanted = {
        "MOSAIC_GPU_DUMP_TO": folder,
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _order(path: pathlib.Path) -> int:
    number = re.search(r"(\d+)$", path.stem)
    return int(number[1]) if number else 0


def _read(path: pathlib.Path) -> Kernel:
    ptx = path.read_text()
    said = path.with_suffix(".ptxas").read_text()
    asked = path.with_suffix(".resources.txt")
    if not asked.exists():
        asked = path.with_name(path.stem + ".resources.txt")
    shared = re.search(r"smem_scratch_bytes=(\d+)", asked.read_text())
    target = re.search(r"\.target (\w+)", ptx)
    registers = re.findall(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert target and shared and registers  # Every compiled kernel has them.
    return Kernel(
        name=re.findall(r"\.entry (\w+)\(", ptx)[0],
        architecture=target[1],
        num_registers=max(map(int, registers)),
        spill_bytes=sum(map(int, spills)),
        shared_bytes=int(shared[1]),
        num_wgmma=ptx.count("wgmma.mma_async"),
        num_mma=ptx.count("mma.sync"),
        num_bulk_copies=len(re.findall(r"cp\.async\.bulk(?:\.tensor)?\.", ptx)),
        accesses=_accesses(ptx),
    )


def _accesses(ptx: str) -> dict[int, int]:
    """Count loads and stores of global memory by the bytes a thread moves at once."""
    counts: dict[int, int] = {}
    # Where the compiler has lost sight of which memory it is, it names none.
    for modifiers in re.findall(r"\b(?:ld|st)((?:\.[\w:]+)+)", ptx):
        parts = modifiers.split(".")
        if any(part.startswith(_OTHER_MEMORY) for part in parts):
            continue
        lanes = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
        bits = [int(p[1:]) for p in parts if re.fullmatch(r"[bfus]\d+", p)]
        num_bytes = lanes * bits[-1] // 8 if bits else 0
        counts[num_bytes] = counts.get(num_bytes, 0) + 1
    return dict(sorted(counts.items()))
