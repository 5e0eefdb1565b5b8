"""The execution plan: the allocation of every call, and the rows it takes at a time."""

import dataclasses
import math
from collections.abc import Collection, Mapping

from realjax.core.config import suggest
from realjax.dataflow.graph import DataflowGraph
from realjax.functions.function import Generate, Infer, Score, Transform
from realjax.models.pages import DTYPES as KV_DTYPES
from realjax.models.quantized import DTYPES as WEIGHTS
from realjax.parallel.allocation import Allocation
from realjax.rollout.settings import Settings

MOST_SLOTS = 256
"""Completions that a row shard decodes at the same time, where a plan does not say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallPlan:
    """Where one call runs.

    Attributes:
        allocation: devices and strategy.
        rows: packed rows of a microbatch, or completions decoded at the same time; 0
            chooses them from `microbatch_tokens`, or up to `MOST_SLOTS` completions a
            row shard.
        pages: of the pool of a call that generates; 0 is enough for any completions.
        kv_dtype: of that pool; "" is the model's.
        weights: type of matrices in the call's copy of the parameters, one of
            `models.quantized.DTYPES`; "" is that of the role.
        remat: what the backward pass of a call that trains computes anew, where the
            role leaves it open; one of `models.transformer.REMATS`, or "".
    """

    allocation: Allocation
    rows: int = 0
    pages: int = 0
    kv_dtype: str = ""
    weights: str = ""
    remat: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """Every call's allocation; calls of text alone (`Score`) have none.

    Attributes:
        graph: whose calls these are.
        calls: by name, in the graph's order.
        microbatch_tokens: tokens of a microbatch where a call does not say its rows.
    """

    graph: DataflowGraph = dataclasses.field(repr=False, compare=False)
    calls: Mapping[str, CallPlan]
    microbatch_tokens: int

    def num_rows(self, name: str, *, max_rows: int, row_length: int) -> int:
        """Rows that call `name` takes at a time, a multiple of its data shards.

        Args:
            name: of the call.
            max_rows: rows it has in all.
            row_length: tokens of a row.
        """
        plan = self.calls[name]
        shards = plan.allocation.num_row_shards
        rows = plan.rows or max(1, self.microbatch_tokens // row_length)
        return math.ceil(min(rows, max_rows) / shards) * shards

    def rollout_settings(self, name: str, *, num_rows: int) -> Settings:
        """How the engine of a call that generates works.

        Args:
            name: of the call.
            num_rows: completions it has in all.
        """
        plan = self.calls[name]
        shards = plan.allocation.num_row_shards
        slots = min(plan.rows or MOST_SLOTS * shards, num_rows)
        return Settings(
            slots=math.ceil(slots / shards) * shards,
            pages=plan.pages,
            kv_dtype=plan.kv_dtype,
        )

    def table(self) -> str:
        """One line a call, for people."""
        width = max(map(len, self.calls), default=0)
        return "\n".join(
            f"{name:<{width}}  {plan.allocation}"
            + "".join(
                f"  {key} {value}"
                for key in ("rows", "pages", "kv_dtype", "weights", "remat")
                if (value := getattr(plan, key))
            )
            for name, plan in self.calls.items()
        )

    def __str__(self) -> str:
        """The table."""
        return self.table()

    def _repr_svg_(self) -> str:
        """The graph with its allocations, as a notebook shows it."""
        from realjax.dataflow.draw import graph_svg  # It draws plans, too.

        return graph_svg(self.graph, self)

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return {
            "microbatch_tokens": self.microbatch_tokens,
            "calls": {
                name: {
                    "allocation": str(plan.allocation),
                    "rows": plan.rows,
                    "pages": plan.pages,
                    "kv_dtype": plan.kv_dtype,
                    "weights": plan.weights,
                    "remat": plan.remat,
                }
                for name, plan in self.calls.items()
            },
        }


def make_plan(
    graph: DataflowGraph,
    *,
    num_devices: int,
    allocation: str = "",
    allocations: Mapping[str, str] | None = None,
    rows: Mapping[str, int] | None = None,
    pages: Mapping[str, int] | None = None,
    kv_dtype: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
    role_weights: Mapping[str, str] | None = None,
    microbatch_tokens: int = 2048,
    offloaded: Collection[str] = (),
) -> ExecutionPlan:
    """The plan that a config asks for.

    Args:
        graph: whose calls get a place.
        num_devices: of the machine.
        allocation: of every call not named below; "" means data over all devices.
        allocations: by call. A `Transform` follows the first call that reads it.
        rows: by call; see `CallPlan.rows`.
        pages: by call that generates; see `CallPlan.pages`.
        kv_dtype: by call that generates; see `CallPlan.kv_dtype`.
        weights: by call that generates or infers; see `CallPlan.weights`.
        role_weights: by role that no call trains, for all such calls of it that are
            not in `weights`.
        microbatch_tokens: see `ExecutionPlan`.
        offloaded: roles whose calls all have the option `+offload`.

    Raises:
        ValueError: a name that is no call, or an allocation that needs more devices.
    """
    allocations = {k: v for k, v in (allocations or {}).items() if v}
    rows = {k: v for k, v in (rows or {}).items() if v}
    pages = {k: v for k, v in (pages or {}).items() if v}
    kv_dtype = {k: v for k, v in (kv_dtype or {}).items() if v}
    for name in (*allocations, *rows, *pages, *kv_dtype):
        if name not in graph.calls:
            raise ValueError(
                f"The plan names the call {name!r}, which this graph does not "
                f"have. {suggest(name, graph.calls)}"
            )
    for name in (*pages, *kv_dtype):
        if not isinstance(graph.calls[name].function, Generate):
            raise ValueError(
                f"The plan gives pages or a kv_dtype to the call {name!r}, which does "
                "not generate and has no pool of keys and values. Leave them out."
            )
    for name, dtype in kv_dtype.items():
        if dtype not in KV_DTYPES:
            raise ValueError(
                f"kv_dtype.{name} is {dtype!r}; it must be one of "
                f"{', '.join(KV_DTYPES)}."
            )
    weights = _call_weights(graph, weights or {}, role_weights or {})
    default = allocation or f"d{num_devices}"
    places: dict[str, CallPlan] = {}
    for name in reversed(graph.order()):  # Readers first.
        function = graph.calls[name].function
        if isinstance(function, Score):
            continue
        text = allocations.get(name, "")
        if not text and isinstance(function, Transform):
            readers = [child for child in graph.children(name) if child in places]
            text = str(places[readers[0]].allocation) if readers else ""
        if not text and isinstance(function, Infer) and function.is_as_trained:
            text = allocations.get(_training_call(graph, name), "")
        place = Allocation.parse(text or default)
        _check_devices(name, place, num_devices)
        role = graph.calls[name].role
        if role in offloaded:
            options = place.options | {"offload"}
            place = dataclasses.replace(place, options=options)
        elif role is None:
            # A Transform keeps nothing, whoever it follows.
            options = place.options - {"offload"}
            place = dataclasses.replace(place, options=options)
        places[name] = CallPlan(
            allocation=place,
            rows=rows.get(name, 0),
            pages=pages.get(name, 0),
            kv_dtype=kv_dtype.get(name, ""),
            weights=weights.get(name, ""),
        )
        if isinstance(function, Generate) and place.stage > 1:
            raise ValueError(
                f"Call {name!r} generates, and its allocation {place} has {place.stage}"
                " stages. A stage would wait for the others at every token: give a call"
                " that generates data, fsdp, tensor or expert instead."
            )
    ordered = {name: places[name] for name in graph.order() if name in places}
    return ExecutionPlan(
        graph=graph, calls=ordered, microbatch_tokens=microbatch_tokens
    )


def planned(
    graph: DataflowGraph, calls: Mapping[str, CallPlan], *, microbatch_tokens: int
) -> ExecutionPlan:
    """Make a plan of the calls that have roles; each `Transform` follows a reader.

    Args:
        graph: whose calls these are.
        calls: where each call of a role runs.
        microbatch_tokens: see `ExecutionPlan`.
    """
    places = dict(calls)
    for name in reversed(graph.order()):  # Readers first.
        if name in places or isinstance(graph.calls[name].function, Score):
            continue
        near = [c for c in (*graph.children(name), *graph.parents(name)) if c in places]
        followed = (places[near[0]] if near else next(iter(calls.values()))).allocation
        # A Transform keeps nothing, whoever it follows.
        options = followed.options - {"offload"}
        places[name] = CallPlan(
            allocation=dataclasses.replace(followed, options=options)
        )
    ordered = {name: places[name] for name in graph.order() if name in places}
    return ExecutionPlan(
        graph=graph, calls=ordered, microbatch_tokens=microbatch_tokens
    )


def _training_call(graph: DataflowGraph, name: str) -> str:
    """The call that trains the role of a call."""
    role = graph.calls[name].role
    training = (n for n, c in graph.calls.items() if c.role == role and c.is_training)
    found = next(training, "")
    if not found:
        raise ValueError(
            f"Call {name!r} infers as the training of {role!r} would, and no call "
            "trains that role. Leave is_as_trained out."
        )
    return found


def _call_weights(
    graph: DataflowGraph, by_call: Mapping[str, str], by_role: Mapping[str, str]
) -> dict[str, str]:
    """The type of every call's weights; refuses those that cannot be of 8 bits."""
    given = [(f"weights.{name}", dtype) for name, dtype in by_call.items()]
    given += [(f"roles.{role}.weights", dtype) for role, dtype in by_role.items()]
    for option, dtype in given:
        if dtype and dtype not in WEIGHTS:
            raise ValueError(
                f"{option} is {dtype!r}; it must be one of {', '.join(WEIGHTS)}."
            )
    for role, dtype in by_role.items():
        if dtype and role in graph.trained_roles:
            raise ValueError(
                f"roles.{role}.weights is {dtype!r}, and a call trains this role: an "
                "optimizer's steps are smaller than those between numbers of 8 bits. "
                "Quantize the copy of a call that samples or infers: weights.<call>."
            )
    found = {}
    for name, node in graph.calls.items():
        is_read = isinstance(node.function, Generate | Infer)
        can_be_cut = is_read and not node.needs_masters
        of_role = by_role.get(node.role or "", "") if can_be_cut else ""
        found[name] = by_call.get(name, "") or of_role
        if found[name] and not can_be_cut:
            raise ValueError(
                f"weights.{name} is {found[name]!r}, and this call does not sample or "
                "infer with a copy of parameters. Training, following and inferring as "
                "the training would take whole numbers: leave it out."
            )
    if unknown := sorted(by_call.keys() - found.keys()):
        raise ValueError(
            f"The plan names the call {unknown[0]!r}, which this graph does not have. "
            f"{suggest(unknown[0], graph.calls)}"
        )
    return found


def _check_devices(name: str, allocation: Allocation, num_devices: int) -> None:
    if max(allocation.devices) >= num_devices:
        raise ValueError(
            f"Call {name!r} has the allocation {allocation}, and there are "
            f"{num_devices} devices (0 to {num_devices - 1}). Give it fewer, or run "
            "where there are more."
        )
