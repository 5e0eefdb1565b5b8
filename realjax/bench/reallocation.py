"""Reallocation: how long it takes to plan, and how fast it is.

    python -m realjax.bench.reallocation
    python -m realjax.bench.reallocation --dry --devices=4096 --devices_per_host=8 \
        --model=llama-8b --pairs=f512t8:t8d512,t8d512:s8f64t8 --layers=32,128

Without `--dry` the parameters of a model move between pairs of layouts on the devices
of this machine (virtual ones on a CPU), beside `jax.device_put` and a jitted identity
(`--against`). With it nothing moves and no device is needed: the routes of every leaf
class are worked out and timed, and printed as a table (and drawn, with `--draw`). What
a model lacks to be divided is added to its vocabulary, layers and feed-forward width.

The last line is one JSON object: medians, and the spread over the repetitions.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

from realjax.bench.environment import describe
from realjax.bench.layout_pairs import (
    LARGE_PAIRS,
    PAIRS,
    RIVALS,
    Options,
    Pair,
    fitted,
    parse_model,
    parse_pairs,
)
from realjax.models.config import ModelConfig
from realjax.models.parameters import abstract_parameters
from realjax.realloc.flows import Flow, flows_svg, flows_text
from realjax.realloc.hops import PHASES
from realjax.realloc.hosts import Hosts
from realjax.realloc.layouts import LeafClass, leaf_classes
from realjax.realloc.routes import Route, route


def plan(options: Options) -> dict[str, Any]:
    """Time the routes of every leaf class, print them, and say what they move."""
    jobs = [
        (pair, layers, found)
        for pair in options.pairs
        for layers, model in _models(options).items()
        for found in leaf_classes(
            abstract_parameters(model), pair.source, pair.destination
        )
    ]
    hosts = options.devices_per_host and Hosts.uniform(options.devices_per_host)
    seconds: list[list[float]] = [[] for _ in jobs]
    routes: list[Route] = []
    for _ in range(options.repetitions):
        route.cache_clear()
        routes = []
        for (_, _, found), times in zip(jobs, seconds, strict=True):
            begin = time.perf_counter()
            routes.append(_priced(found, options.dtype, hosts or None))
            times.append(time.perf_counter() - begin)
    results = []
    for pair in options.pairs:
        for layers in _models(options):
            chosen = [i for i, job in enumerate(jobs) if job[:2] == (pair, layers)]
            flows = [Flow(names=jobs[i][2].names, route=routes[i]) for i in chosen]
            if not results or results[-1]["pair"] != str(pair):
                print(f"{pair}\n{flows_text(flows)}\n", flush=True)
                _draw(flows, pair, options)
            results.append(
                {"pair": str(pair), "layers": layers}
                | _summary(flows, [seconds[i] for i in chosen])
            )
    return {"pairs": results}


def _models(options: Options) -> dict[int, ModelConfig]:
    """The model with every number of layers, padded for all pairs."""
    return {
        layers: fitted(
            dataclasses.replace(options.model, num_layers=layers), options.pairs
        )
        for layers in options.layers or (options.model.num_layers,)
    }


def _priced(found: LeafClass, dtype: str, hosts: Hosts | None) -> Route:
    """All that the planner asks of a route; hops are listed when it is taken."""
    priced = route(found.source, found.destination, found.shape, dtype, hosts)
    _ = priced.kind, priced.phase_bytes, priced.loads
    return priced


def _summary(flows: Sequence[Flow], seconds: Sequence[list[float]]) -> dict[str, Any]:
    classes = []
    totals: dict[str, int] = dict.fromkeys((*PHASES, "least_across"), 0)
    for flow, times in zip(flows, seconds, strict=True):
        found, number = flow.route, len(flow.names)
        sizes = {**found.phase_bytes, "least_across": found.least_across_bytes}
        for name, size in sizes.items():
            totals[name] += number * size
        classes.append(
            {
                "leaves": list(flow.names),
                "shape": list(found.shape),
                "kind": found.kind,
                "pieces": len(found.boxes),
                "plan_seconds": _spread(times),
                "max_sent_bytes": found.max_sent_bytes,
                "max_received_bytes": found.max_received_bytes,
            }
        )
    medians = [found["plan_seconds"]["median"] for found in classes]
    return {
        "slowest_class_seconds": max(medians),
        "tree_seconds": round(sum(medians), 6),
        "bytes": totals,
        "classes": classes,
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(seconds), 6),
        "min": round(min(seconds), 6),
        "max": round(max(seconds), 6),
    }


def _draw(flows: Sequence[Flow], pair: Pair, options: Options) -> None:
    if options.draw is not None:
        options.draw.mkdir(parents=True, exist_ok=True)
        name = str(pair).replace(":", "_to_").replace("@", "_on_")
        text = flows_svg(flows, f"{pair.source} → {pair.destination}")
        (options.draw / f"{name}.svg").write_text(text)


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the flags.

    Raises:
        ValueError: a model, a pair or a number that makes no sense, or a pair that
            needs more devices than there are.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="plan only")
    parser.add_argument("--devices", type=int, help="how many, virtual ones on a CPU")
    parser.add_argument(
        "--devices_per_host", type=int, help="for --dry; all by default"
    )
    parser.add_argument("--model", default="1gib", help="1gib, llama-8b, or width=64,…")
    parser.add_argument("--layers", help="numbers of layers, as in 32,128")
    parser.add_argument("--pairs", help="as in f8:t8,t4@0-3:d2t4")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--against", default=",".join(RIVALS), help="or nothing")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draw", type=pathlib.Path, help="folder for SVGs, with --dry")
    flags = parser.parse_args(arguments)
    default_pairs = LARGE_PAIRS if flags.dry else PAIRS
    pairs = parse_pairs(flags.pairs or ",".join(default_pairs))
    needed = max(pair.num_devices for pair in pairs)
    if flags.devices is not None and flags.devices < needed:
        raise ValueError(
            f"--devices={flags.devices}, and the pairs need {needed}. Give so many, or"
            " other pairs."
        )
    against = tuple(name for name in flags.against.split(",") if name)
    if unknown := set(against) - set(RIVALS):
        raise ValueError(
            f"--against={flags.against}: {', '.join(sorted(unknown))} cannot be"
            f" measured. Choose from {', '.join(RIVALS)}."
        )
    return Options(
        model=parse_model(flags.model),
        model_name=flags.model,
        layers=tuple(int(n) for n in flags.layers.split(",")) if flags.layers else (),
        pairs=pairs,
        devices=flags.devices or needed,
        devices_per_host=flags.devices_per_host,
        processes=flags.processes,
        dry=flags.dry,
        against=against,
        repetitions=flags.repetitions,
        dtype=flags.dtype,
        draw=flags.draw,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan or measure, then one line of JSON."""
    options = parse(arguments)
    if options.dry:
        found = plan(options)
    else:
        if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update(
                "jax_num_cpu_devices", options.devices // options.processes
            )
        # Planning needs none of what moves arrays, so it is loaded here.
        rates = importlib.import_module("realjax.bench.reallocation_rates")
        found = rates.measure(options)
    result = {
        "bench": "reallocation",
        **describe(),
        "dry": options.dry,
        "model": options.model_name,
        "parameters": options.model.num_parameters,
        "devices": options.devices,
        "devices_per_host": options.devices_per_host,
        "processes": options.processes,
        "dtype": options.dtype,
        "repetitions": options.repetitions,
    }
    print(json.dumps(result | found))


if __name__ == "__main__":
    main()
