r"""Compiling every kernel for a GPU that is not there, within its limits.

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot:. \
      python -m pallas_kernels.testing.aot_check h200 [operation …]

Prints one line of JSON a case: what the kernels take, and what is beyond its limits.
One process per architecture.
"""

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from pallas_kernels.testing import aot, resources
from pallas_kernels.testing.cases import Case

OPERATIONS = (
    "paged_attention",
    "linear_logprob",
    "sampling",
    "interval_copy",
    "attention",
    "grouped_matmul",
)
"""Folders with a `bench`."""

KERNELS = ("mosaic", "tokamax")
"""Names of implementations that are kernels."""


def all_cases(operations: Sequence[str] = OPERATIONS) -> Iterator[Case]:
    """Go over the cases of some operations."""
    for operation in operations:
        bench = importlib.import_module(f"pallas_kernels.{operation}.bench")
        yield from bench.cases()


def check(case: Case, gpu: str) -> dict[str, Any]:
    """Compile a case's kernel for a GPU; return what it takes and what is too much."""
    name = next(name for name in KERNELS if name in case.implementations)
    compiled = jax.jit(case.implementations[name], donate_argnums=tuple(case.donated))
    report, kernels = resources.kernels_of(aot.describe(gpu), compiled, *case.shapes())
    return {
        "operation": case.operation,
        "case": case.name,
        "implementation": name,
        "gpu": gpu,
        "temporary_bytes": report.temporary_bytes,
        "alias_bytes": report.alias_bytes,
        "seconds": round(report.seconds, 2),
        "kernels": [kernel.as_dict() for kernel in kernels],
        "problems": problems(case, gpu, name, report, kernels),
    }


def problems(
    case: Case,
    gpu: str,
    name: str,
    report: aot.Report,
    kernels: Sequence[resources.Kernel],
) -> list[str]:
    """Say what of a compiled case is beyond its limits."""
    limits, found = case.limits, []
    if report.temporary_bytes > limits.temporary_bytes:
        found.append(
            f"{report.temporary_bytes} bytes of temporaries, at most"
            f" {limits.temporary_bytes}"
        )
    architecture = "sm_80" if gpu == "a100" else "sm_90a"
    for kernel in kernels:
        if kernel.architecture != architecture:
            found.append(f"{kernel.name} is for {kernel.architecture}")
        # Spills of another project's kernels are theirs.
        if kernel.spill_bytes and name == "mosaic":
            found.append(f"{kernel.name} spills {kernel.spill_bytes} bytes")
        small = sum(
            count
            for num_bytes, count in kernel.accesses.items()
            if num_bytes < limits.least_access_bytes
        )
        if small > limits.small_accesses:
            found.append(
                f"{kernel.name} has {small} accesses of less than"
                f" {limits.least_access_bytes} bytes, at most {limits.small_accesses}"
            )
    num_wgmma = sum(kernel.num_wgmma for kernel in kernels)
    if num_wgmma < limits.num_wgmma:
        found.append(f"{num_wgmma} matrix instructions, at least {limits.num_wgmma}")
    if not kernels:
        found.append("no kernel was compiled")
    return found


def main(gpu: str, operations: Sequence[str]) -> int:
    """Check all cases that are for a GPU; return how many are beyond their limits."""
    num_bad = 0
    for case in all_cases(operations or OPERATIONS):
        if gpu not in case.gpus or case.is_tiny:
            continue
        # A kernel that an earlier case compiled would not be reported again.
        jax.clear_caches()
        found = check(case, gpu)
        num_bad += bool(found["problems"])
        print(json.dumps(found), flush=True)
    return num_bad


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1], sys.argv[2:])))
