"""What a config says of its execution plan: how it is found, or the plan itself.

    ""                  by hand where an allocation is given, else "search" where there
                        is more than one device
    "search"            the fastest that the planner finds
    "heuristic"         the faster of ReaL's templates
    "symmetric"         the fastest that has one strategy on all devices for every call
    "symmetric:d4t2"    this one; "d4t2" says the same
    "runs/a/plan.json"  what an earlier run took, or `ExecutionPlan.as_dict` wrote

What `config.allocations` says of single calls holds beside each of them.
"""

import dataclasses
import json
import pathlib
from typing import Any

from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import CallPlan, ExecutionPlan, adjusted, make_plan
from realjax.functions.function import Infer
from realjax.parallel.allocation import Allocation
from realjax.planner.cluster import Cluster
from realjax.planner.space import Wish
from realjax.runtime.run_config import PLAN_MODES, RunConfig

MICROBATCH_TOKENS, CPU_MICROBATCH_TOKENS = 16384, 2048
"""Where the config does not say: of a device, and of all of a CPU's."""


def mode_of(config: RunConfig, num_devices: int) -> str:
    """Return how the plan of a run on so many devices is found; "" is by hand."""
    if config.plan:
        return config.plan
    is_given = config.allocation or hand_allocations(config, num_devices)
    return "" if is_given or num_devices == 1 else "search"


def hand_allocations(config: RunConfig, num_devices: int) -> dict[str, str]:
    """Return what a config gives single calls, if it is for so many devices."""
    fits = num_devices >= config.allocations_devices
    return {k: v for k, v in config.allocations.items() if v} if fits else {}


def given_plan(
    config: RunConfig, graph: DataflowGraph, cluster: Cluster
) -> ExecutionPlan | None:
    """Return the plan of a config that needs no looking for, if it has one.

    Args:
        config: of the run.
        graph: of its algorithm.
        cluster: the machine.

    Raises:
        ValueError, FileNotFoundError: what it says is no plan of this graph on this
            machine; also where the rest would still have to be found.
    """
    num_devices = cluster.num_devices
    mode = mode_of(config, num_devices)
    allocations = hand_allocations(config, num_devices)
    common: dict[str, Any] = adjustments(config) | {"num_devices": num_devices}
    if mode.endswith(".json"):
        plan = _read_plan(mode, graph, num_devices)
        return adjusted(plan, allocations=allocations, **common)
    is_found = mode in PLAN_MODES
    plan = make_plan(
        graph,
        allocation=config.allocation if is_found else _strategy(mode, config),
        allocations=allocations,
        microbatch_tokens=microbatch_tokens(config, cluster),
        **common,
    )
    return None if is_found else plan


def _strategy(mode: str, config: RunConfig) -> str:
    return mode.removeprefix("symmetric:") or config.allocation


def adjustments(config: RunConfig) -> dict[str, Any]:
    """Return what a config says of single calls and roles, as `adjusted` takes it."""
    return {
        "rows": config.rows,
        "pages": config.pages,
        "kv_dtype": config.kv_dtype,
        "weights": config.weights,
        "role_weights": {name: role.weights for name, role in config.roles.items()},
        "offloaded": [name for name, role in config.roles.items() if role.offload],
    }


def microbatch_tokens(config: RunConfig, cluster: Cluster) -> int:
    """Return the tokens of a microbatch where a plan does not say its rows."""
    if config.microbatch_tokens:
        return config.microbatch_tokens
    if cluster.device.kind == "cpu":
        return CPU_MICROBATCH_TOKENS
    return MICROBATCH_TOKENS * cluster.num_devices


def _read_plan(path: str, graph: DataflowGraph, num_devices: int) -> ExecutionPlan:
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"config.plan is {path!r}, which is not there. A run leaves its plan in"
            " plan.json of its work folder."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no object.")
        return ExecutionPlan.from_dict(graph, values, num_devices=num_devices)
    except ValueError as error:
        raise ValueError(f"config.plan, {path}: {error}") from error


def asked(config: RunConfig, num_devices: int) -> dict[str, Any]:
    """Return everything of a config that decides its plan, as plain values."""
    given = adjustments(config)
    return {
        "num_devices": num_devices,
        "plan": config.plan,
        "allocation": config.allocation,
        "allocations": hand_allocations(config, num_devices),
        "expected_new_tokens": config.expected_new_tokens,
        "microbatch_tokens": config.microbatch_tokens,
        "memory_gib": config.memory_gib,
        **{
            name: {k: v for k, v in value.items() if v} if value else {}
            for name, value in given.items()
            if name != "offloaded"
        },
        "offloaded": given["offloaded"],
    }


def fixed_allocations(
    config: RunConfig, graph: DataflowGraph, cluster: Cluster
) -> dict[str, Allocation]:
    """Return the allocations that a config gives single calls of roles."""
    texts = hand_allocations(config, cluster.num_devices)
    fixed = {
        name: Allocation.parse(text)
        for name, text in texts.items()
        if graph.calls[name].role is not None
    }
    for name, node in graph.calls.items():
        if isinstance(node.function, Infer) and node.function.is_as_trained:
            trains = [n for n in fixed if graph.calls[n].role == node.role]
            training = [n for n in trains if graph.calls[n].is_training]
            if name not in fixed and training:
                fixed[name] = fixed[training[0]]
    return fixed


def wishes_of(
    config: RunConfig, graph: DataflowGraph, cluster: Cluster
) -> dict[str, Wish]:
    """Return what a config settles of single calls beside their allocations."""
    num_devices = cluster.num_devices
    plan = make_plan(graph, num_devices=num_devices, **adjustments(config))
    return {name: wish_of(call) for name, call in plan.calls.items()}


def wish_of(call: CallPlan, **changes: Any) -> Wish:
    """Return what a plan says of a call beside its allocation, with changes."""
    fields = [field.name for field in dataclasses.fields(Wish)]
    return Wish(**{name: getattr(call, name) for name in fields} | changes)
