"""Predicted memory of calls beside what XLA's compiler for H200s says they take.

    PYTHONPATH=.venv/aot:. python -m realjax.bench.memory
    PYTHONPATH=.venv/aot:. python -m realjax.bench.memory --pairs=0,11

Compiles the programs of twenty pairs of a call and an allocation for eight H200s that
are not there, in about ten minutes and 4 GB. What a call takes on a device is what
stays while it runs, the arguments of its largest program, its new outputs and its
temporaries. Needs the wheels of `make check-gpu-compile`. The last line is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.testing import aot
from realjax.bench.memory_pairs import PAIRS, Pair
from realjax.functions.role import Role
from realjax.planner.memory import Work, call_bytes
from realjax.runtime.described import (
    described_model,
    described_programs,
    described_size,
    described_widths,
)
from realjax.runtime.run import make_graph

GIB = 2**30


def compiled(pair: Pair, machine: aot.Machine) -> dict[str, Any]:
    """Return the bytes of each program of a pair, compiled.

    Args:
        pair: what to compile.
        machine: eight devices.
    """
    plan, found = pair.plan(make_graph(pair.config)), {}
    for part in described_programs(pair.config, machine, (pair.call,), plan):
        report = part.compile()
        beside = sum(
            leaf.dtype.itemsize * _size(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(part.beside)
        )
        found[part.name] = {
            "beside_bytes": beside,
            "argument_bytes": report.argument_bytes,
            "new_bytes": report.output_bytes - report.alias_bytes,
            "temporary_bytes": report.temporary_bytes,
            "arrays": [
                f"{array.shape} {array.num_bytes / GIB:.3f}" for array in report.arrays
            ],
        }
    return found


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def predicted(pair: Pair) -> dict[str, int]:
    """Return the bytes of a pair as the planner counts them.

    Args:
        pair: whose.
    """
    config = pair.config
    graph = make_graph(config)
    role = graph.calls[pair.call].role
    assert role is not None  # Others are not among the pairs.
    model = described_model(config, graph, role)
    roles = {
        name: Role(
            name=name,
            config=config.roles[name],
            model=model if name == role else described_model(config, graph, name),
            eos_ids=model.eos_ids,
            dtype="bfloat16",
            is_trained=name in graph.trained_roles,
        )
        for name in graph.roles
    }
    prompt_width, width = described_widths(graph, config.data)
    num_rows = described_size(config.data)
    work = Work(num_rows=num_rows, width=width, prompt_width=prompt_width)
    found = call_bytes(graph, pair.plan(graph), pair.call, roles, num_rows, work)
    is_home = graph.calls[pair.call].changes_role
    return {
        "parameter_bytes": found.masters if is_home else found.copy,
        "pool_bytes": found.pool,
        "batch_bytes": found.batch,
        "result_bytes": found.working - found.temporary,
        "temporary_bytes": found.temporary,
    }


def compared(pair: Pair, programs: dict[str, Any]) -> dict[str, Any]:
    """Return peaks and temporaries of a pair, predicted and compiled.

    Args:
        pair: whose.
        programs: from `compiled`.
    """
    expected = predicted(pair)
    of_program = lambda p: sum(p[name] for name in p if name != "arrays")
    return {
        "pair": str(pair),
        "predicted_peak": sum(expected.values()),
        "compiled_peak": max(of_program(p) for p in programs.values()),
        "predicted_temporary": expected["temporary_bytes"],
        "compiled_temporary": max(p["temporary_bytes"] for p in programs.values()),
        "predicted": expected,
        "programs": programs,
    }


def error_of(row: dict[str, Any], name: str) -> float:
    """Return how far a prediction is from what was compiled, as a share of that.

    Args:
        row: from `compared`.
        name: "peak" or "temporary".
    """
    return row[f"predicted_{name}"] / row[f"compiled_{name}"] - 1


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return mean and worst errors of some pairs.

    Args:
        rows: from `compared`.
    """
    found = {}
    for name in ("peak", "temporary"):
        errors = [abs(error_of(row, name)) for row in rows]
        found |= {f"mean_{name}_error": sum(errors) / len(errors)}
        found |= {f"worst_{name}_error": max(errors)}
    return found


def line_of(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [row["pair"]]
    for name in ("peak", "temporary"):
        cells += [f"{row[f'{kind}_{name}'] / GIB:.2f}" for kind in KINDS]
        cells.append(f"{100 * error_of(row, name):+.0f} %")
    return " | ".join(cells)


KINDS = ("predicted", "compiled")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a line a pair, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", default="", help="Numbers of pairs; '' is all.")
    parser.add_argument("--gpus", default="h200x8", help="What to compile for.")
    parser.add_argument("--compiled", default="", help="JSON of compiled programs.")
    options = parser.parse_args(arguments)
    numbers = [int(n) for n in options.pairs.split(",") if n] or range(len(PAIRS))
    stored = {}
    if options.compiled:
        with open(options.compiled) as file:
            stored = {row["pair"]: row["programs"] for row in json.load(file)["rows"]}
    jax.config.update("jax_platforms", "cpu")
    # A program from the cache would not say what it needs.
    jax.config.update("jax_enable_compilation_cache", False)
    rows, start = [], time.perf_counter()
    print("pair | GiB predicted | compiled | error | temporaries | compiled | error")
    for pair in (PAIRS[number] for number in numbers):
        programs = stored.get(str(pair))
        if programs is None:
            programs = compiled(pair, aot.describe(options.gpus))
        rows.append(compared(pair, programs))
        print(line_of(rows[-1]), flush=True)
    seconds = time.perf_counter() - start
    found = {"gpus": options.gpus, "jax": jax.__version__, "seconds": round(seconds)}
    print(json.dumps(found | summary(rows) | {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
