"""Filling the tables of block sizes, on a GPU.

    python -m pallas_kernels.testing.sweep prune h200 pruned.json   # without a GPU
    python -m pallas_kernels.testing.sweep time pruned.json         # on one

Candidates that spill registers or do not compile are taken out ahead of time, which
costs no time of the device. The others are run, compared with the reference, and timed
in turns; the fastest one that is right goes to `tuned/<device>.json`.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels import _dispatch, _tuning
from pallas_kernels.testing import aot, resources
from pallas_kernels.testing.aot_check import all_cases
from pallas_kernels.testing.cases import Case
from pallas_kernels.testing.measure import device_seconds, largest_error, undonated

ROUNDS = 5


def prune(gpu: str) -> list[dict[str, Any]]:
    """Compile every candidate of every case; return those without spills."""
    kept = []
    for case in all_cases():
        if case.is_tiny or case.with_blocks is None or gpu not in case.gpus:
            continue
        for blocks in case.candidates:
            jax.clear_caches()
            try:
                _, kernels = resources.kernels_of(
                    aot.describe(gpu), case.with_blocks(blocks), *case.shapes()
                )
            except Exception as failure:  # Too much shared memory, most often.
                _say(case, blocks, f"left out: {str(failure).splitlines()[0][:100]}")
                continue
            spills = sum(kernel.spill_bytes for kernel in kernels)
            _say(case, blocks, f"spills {spills} bytes" if spills else "kept")
            if not spills:
                chosen = {"operation": case.operation, "case": case.name}
                kept.append(chosen | {"blocks": dataclasses.asdict(blocks)})
    return kept


def time_all(kept: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Time candidates on this GPU; return the fastest by operation and key."""
    found: dict[str, dict[str, Any]] = {}
    for case in all_cases():
        names = [
            one["blocks"]
            for one in kept
            if (one["operation"], one["case"]) == (case.operation, case.name)
        ]
        candidates = [
            blocks for blocks in case.candidates if dataclasses.asdict(blocks) in names
        ]
        if candidates and case.tuning_key is not None:
            best = _fastest(case, candidates)
            found.setdefault(case.operation, {})[case.tuning_key] = best
    return found


def _fastest(case: Case, candidates: Sequence[Any]) -> dict[str, Any]:
    """Return the fields of the fastest candidate that is right."""
    assert case.with_blocks is not None
    inputs = jax.jit(case.inputs)(jax.random.key(0))
    expected = case.reference(*inputs)
    runs = {}
    for blocks in candidates:
        run = jax.jit(case.with_blocks(blocks), donate_argnums=tuple(case.donated))
        error = largest_error(run(*undonated(case, inputs)), expected)
        if error <= case.tolerance:
            runs[blocks] = run
        else:
            _say(case, blocks, f"wrong by {error:.1e}")
    seconds: dict[Any, list[float]] = {blocks: [] for blocks in runs}
    for _ in range(ROUNDS):
        for blocks, run in runs.items():
            seconds[blocks].append(device_seconds(run, *undonated(case, inputs)))
    medians = {blocks: statistics.median(took) for blocks, took in seconds.items()}
    best = min(medians, key=lambda blocks: medians[blocks])
    _say(case, best, f"fastest, {1e6 * medians[best]:.1f} µs")
    return dataclasses.asdict(best)


def _say(case: Case, blocks: Any, what: str) -> None:
    print(f"{case.operation} {case.name} {blocks}: {what}", file=sys.stderr, flush=True)


def main(command: str, *arguments: str) -> None:
    """Run as the module says."""
    if command == "prune":
        gpu, path = arguments
        pathlib.Path(path).write_text(json.dumps(prune(gpu), indent=1))
        return
    kept = json.loads(pathlib.Path(arguments[0]).read_text())
    table = _tuning.file_of(_dispatch.device())
    known = json.loads(table.read_text()) if table.exists() else {}
    for operation, by_key in time_all(kept).items():
        known.setdefault(operation, {}).update(by_key)
    table.parent.mkdir(exist_ok=True)
    table.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
