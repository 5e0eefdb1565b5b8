"""Kernels of `pallas_kernels`: right, and how fast beside the floor and others.

    python -m realjax.bench.kernels                     # on a GPU: all shapes
    python -m realjax.bench.kernels --tiny              # anywhere: interpreted, untimed
    python -m realjax.bench.kernels --operations sampling --output kernels.json

On inputs that no other run has had, every implementation of every case is compared with
its reference; on a GPU those that are right are timed in turns. The floor is the longer
one of the least traffic over 4.3 TB/s and the products over 790 TFLOP/s, of one H200.
With `--executable FILE`, a program that `--save FILE` compiled ahead of time on a
machine without a GPU is loaded first and run. The last line is one JSON object.
"""

import argparse
import json
import pathlib
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

from pallas_kernels.testing import aot
from pallas_kernels.testing.aot_check import OPERATIONS, all_cases
from pallas_kernels.testing.cases import Case
from pallas_kernels.testing.interpret import interpreted
from pallas_kernels.testing.measure import largest_error, measure
from realjax.bench.environment import describe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the module says; return 1 if a kernel is wrong or cannot run."""
    options = _parser().parse_args(arguments)
    cases = [
        case for case in all_cases(options.operations) if case.is_tiny == options.tiny
    ]
    if options.save:
        _save(cases, options.save)
        return 0
    if not options.tiny and jax.default_backend() != "gpu":
        print(
            "Kernels are timed on a GPU, and JAX finds none here. `--tiny` runs small"
            " shapes in the interpreter.",
            file=sys.stderr,
        )
        return 2
    report: dict[str, Any] = {"environment": describe()}
    if options.executable:
        report["executable"] = _run_saved(cases, options.executable)
    report["cases"] = list(_measured(cases, options))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    return int(any(_is_wrong(case) for case in report["cases"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", nargs="*", default=OPERATIONS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--save", type=pathlib.Path)
    parser.add_argument("--executable", type=pathlib.Path)
    return parser


def _measured(
    cases: Sequence[Case], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    for case in cases:
        if options.tiny:
            with interpreted() as checks:
                found = measure(
                    case, seed=options.seed, is_timed=False, names=["mosaic"]
                )
            found |= {"has_races": checks.has_races}
        else:
            found = measure(case, seed=options.seed)
        print(_line(found), file=sys.stderr, flush=True)
        yield found


def _line(found: dict[str, Any]) -> str:
    """Say in a line what was found of a case."""
    parts = [f"{found['operation']} {found['case']}:"]
    for name, one in found["implementations"].items():
        if "failure" in one:
            parts.append(f"{name} cannot run;")
        elif "seconds" in one:
            share = one["share_of_floor"]
            parts.append(f"{name} {1e6 * one['seconds']:.0f} µs, {share:.2f} of floor;")
        else:
            parts.append(f"{name} off by {one['error']:.1e};")
    return " ".join(parts)


def _is_wrong(found: dict[str, Any]) -> bool:
    kernel = found["implementations"].get("mosaic")
    is_right = kernel is None or kernel.get("is_right", False)
    return not is_right or found.get("has_races", False)


def _save(cases: Sequence[Case], path: pathlib.Path) -> None:
    """Compile the first case's kernel ahead of time, and keep the program."""
    case = cases[0]
    machine = aot.describe("h200")
    with aot.compiling_for(machine):
        shapes = aot.placed(machine, case.shapes())
        compiled = jax.jit(case.implementations["mosaic"]).lower(*shapes).compile()
    saved = {
        "operation": case.operation,
        "case": case.name,
        "program": serialize_executable.serialize(compiled),
    }
    path.write_bytes(pickle.dumps(saved))


def _run_saved(cases: Sequence[Case], path: pathlib.Path) -> dict[str, Any]:
    """Load a kept program and compare it with its reference."""
    saved = pickle.loads(path.read_bytes())
    chosen = (saved["operation"], saved["case"])
    case = next(case for case in cases if (case.operation, case.name) == chosen)
    inputs = case.inputs(jax.random.key(0))
    try:
        run = serialize_executable.deserialize_and_load(*saved["program"])
        error = largest_error(run(*inputs), case.reference(*inputs))
    except Exception as failure:  # What is measured must not hang on it.
        return {"case": case.name, "failure": f"{type(failure).__name__}: {failure}"}
    return {"case": case.name, "error": error, "is_right": error <= case.tolerance}


if __name__ == "__main__":
    sys.exit(main())
