"""Predicted memory of calls beside what XLA's compiler for H200s says they take.

    PYTHONPATH=.venv/aot:. python -m realjax.bench.memory
    PYTHONPATH=.venv/aot:. python -m realjax.bench.memory --pairs=0,11
    PYTHONPATH=.venv/aot:. python -m realjax.bench.memory --held_out

Compiles the programs of twenty pairs of a call and an allocation for eight H200s that
are not there, in about ten minutes and 4 GB. What a call takes on a device is what
stays while it runs, the arguments of its largest program, its new outputs and its
temporaries. Needs the wheels of `make check-gpu-compile`. The last line is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.testing import aot
from realjax.bench import environment
from realjax.bench.memory_pairs import HELD_OUT, PAIRS, Pair
from realjax.planner.cluster import Cluster
from realjax.runtime.confirming import (
    CompiledProgram,
    Confirmation,
    compiled_calls,
    predicted_bytes,
)
from realjax.runtime.planning import described_setting

GIB = 2**30
MACHINE, CLUSTER = "h200x8", "8xh200"


def compiled(pair: Pair, machine: aot.Machine) -> tuple[CompiledProgram, ...]:
    """Compile the programs of a pair.

    Args:
        pair: what to compile.
        machine: eight devices.
    """
    ((_, programs),) = compiled_calls(pair.config, pair.plan, machine, (pair.call,))
    return programs


def compared(pair: Pair, programs: Sequence[CompiledProgram]) -> Confirmation:
    """Put what the planner counts beside what was compiled.

    Args:
        pair: whose.
        programs: from `compiled`.
    """
    setting = described_setting(pair.config, Cluster.load(CLUSTER))
    return Confirmation(
        call=pair.call,
        allocation=pair.allocation,
        predicted=predicted_bytes(pair.plan, setting, pair.call),
        is_home=setting.graph.calls[pair.call].changes_role,
        programs=tuple(programs),
    )


def errors(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return how far the predictions of peak and temporaries are off, as shares.

    Args:
        row: `Confirmation.as_dict`.
    """
    return (
        row["predicted_bytes"] / row["compiled_bytes"] - 1,
        row["predicted_temporary_bytes"] / row["compiled_temporary_bytes"] - 1,
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean and the worst error of some pairs.

    Args:
        rows: `Confirmation.as_dict` of each.
    """
    of_peaks, of_temporaries = zip(*map(errors, rows), strict=True)
    found = {}
    for name, off in (("peak", of_peaks), ("temporary", of_temporaries)):
        found[f"mean_{name}_error"] = sum(map(abs, off)) / len(off)
        found[f"worst_{name}_error"] = max(map(abs, off))
    return found


def line_of(pair: Pair, row: Mapping[str, Any]) -> str:
    """Return a row of a table in Markdown."""
    numbers = []
    for name, off in zip(("", "temporary_"), errors(row), strict=True):
        numbers += [
            f"{row[f'{kind}_{name}bytes'] / GIB:.2f}"
            for kind in ("predicted", "compiled")
        ]
        numbers.append(f"{100 * off:+.0f} %")
    return f"| {' | '.join((*pair.cells, *numbers))} |"


HEADS = (
    *("model", "call", "allocation", "rows", "remat"),
    *("GiB predicted", "compiled", "error"),
    *("temporaries predicted", "compiled", "error"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a line a pair, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", default="", help="Numbers of pairs; '' is all.")
    parser.add_argument(
        "--held_out", action="store_true", help="Those that nothing was changed for."
    )
    parser.add_argument(
        "--compiled", default="", help="JSON of an earlier run; compiles what it lacks."
    )
    options = parser.parse_args(arguments)
    pairs = HELD_OUT if options.held_out else PAIRS
    numbers = [int(n) for n in options.pairs.split(",") if n] or range(len(pairs))
    known: dict[str, Any] = {}
    if options.compiled:
        with open(options.compiled) as file:
            known = {row["pair"]: row for row in json.load(file)["rows"]}
    jax.config.update("jax_platforms", "cpu")
    # A program from the cache would not say what it needs.
    jax.config.update("jax_enable_compilation_cache", False)
    rows, start = [], time.perf_counter()
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    for pair in (pairs[number] for number in numbers):
        if str(pair) in known:
            found = known[str(pair)]["programs"]
            programs = [CompiledProgram(**program) for program in found]
        else:
            programs = compiled(pair, aot.describe(MACHINE))
        row = compared(pair, programs).as_dict() | {"pair": str(pair)}
        rows.append(row)
        print(line_of(pair, row), flush=True)
    found = {"machine": MACHINE, "seconds": round(time.perf_counter() - start)}
    about = {name: environment.describe()[name] for name in ("jax", "commit")}
    print(json.dumps(found | about | summary(rows) | {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
