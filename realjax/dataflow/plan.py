"""The execution plan: the allocation of every call, and the rows it takes at a time."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from realjax.core.config import check_choice, suggest
from realjax.dataflow.graph import DataflowGraph
from realjax.functions.function import Generate, Infer, Score, Transform
from realjax.models.pages import DTYPES as KV_DTYPES
from realjax.models.quantized import DTYPES as WEIGHTS
from realjax.models.transformer import REMATS
from realjax.parallel.allocation import Allocation
from realjax.rollout.settings import Settings

_OPTIONS = ("rows", "pages", "kv_dtype", "weights", "remat")
"""What a plan says of a call beside its allocation."""

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
                f"  {key} {value}" for key in _OPTIONS if (value := getattr(plan, key))
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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads them back."""
        return {
            "microbatch_tokens": self.microbatch_tokens,
            "calls": {
                name: {"allocation": str(plan.allocation)}
                | {field: getattr(plan, field) for field in _OPTIONS}
                for name, plan in self.calls.items()
            },
        }

    @classmethod
    def from_dict(
        cls, graph: DataflowGraph, values: Mapping[str, Any], *, num_devices: int
    ) -> "ExecutionPlan":
        """Read what `as_dict` wrote; what stands beside its two fields is left aside.

        Args:
            graph: whose calls these are.
            values: `microbatch_tokens` and `calls`. A call that has no role may be
                missing: it follows one that reads it.
            num_devices: of the machine.

        Raises:
            ValueError: calls that the graph does not have or that are missing, fields
                that are none, allocations that are none or need more devices.
        """
        _check_written(graph, values, num_devices)
        calls = {
            name: CallPlan(
                **fields | {"allocation": Allocation.parse(fields["allocation"])}
            )
            for name, fields in values["calls"].items()
        }
        plan = planned(graph, calls, microbatch_tokens=int(values["microbatch_tokens"]))
        of_calls = {
            field: {name: getattr(call, field) for name, call in calls.items()}
            for field in ("pages", "kv_dtype", "weights")
        }
        return adjusted(plan, num_devices=num_devices, **of_calls)


def _check_written(
    graph: DataflowGraph, values: Mapping[str, Any], num_devices: int
) -> None:
    """Refuse what is no written plan of a graph."""
    for field in ("microbatch_tokens", "calls"):
        if field not in values:
            found = ", ".join(values) or "nothing"
            raise ValueError(
                f"The plan has no {field!r} (it has {found}). It needs what"
                " `ExecutionPlan.as_dict` writes: microbatch_tokens and calls."
            )
    calls, example = values["calls"], f'{{"allocation": "d{num_devices}"}}'
    _check_names(graph, calls)
    for name in graph.order():
        if graph.calls[name].role is not None and name not in calls:
            raise ValueError(
                f"The plan has no allocation for the call {name!r}. Add {name!r}:"
                f" {example}, or let this graph be planned anew."
            )
    known = ("allocation", *_OPTIONS)
    for name, fields in calls.items():
        for field in fields:
            if field not in known:
                raise ValueError(
                    f"The plan gives the call {name!r} a {field!r}, which none has."
                    f" {suggest(field, known)}"
                )
        if not isinstance(fields.get("allocation"), str):
            raise ValueError(
                f"The plan gives the call {name!r} no allocation, as in {example}."
            )
        for field in ("rows", "pages"):
            count = fields.get(field, 0)
            if not isinstance(count, int) or count < 0:
                raise ValueError(
                    f"{field} of {name} is {count!r}; it must be a whole number, at"
                    " least 0."
                )
        check_choice(f"remat of {name}", fields.get("remat", ""), ("", *REMATS))


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
    _check_names(graph, allocations)
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
        places[name] = CallPlan(allocation=Allocation.parse(text or default))
    ordered = {name: places[name] for name in graph.order() if name in places}
    plan = ExecutionPlan(
        graph=graph, calls=ordered, microbatch_tokens=microbatch_tokens
    )
    return adjusted(
        plan,
        num_devices=num_devices,
        rows=rows,
        pages=pages,
        kv_dtype=kv_dtype,
        weights=weights,
        role_weights=role_weights,
        offloaded=offloaded,
    )


def adjusted(
    plan: ExecutionPlan,
    *,
    num_devices: int,
    allocations: Mapping[str, str] | None = None,
    rows: Mapping[str, int] | None = None,
    pages: Mapping[str, int] | None = None,
    kv_dtype: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
    role_weights: Mapping[str, str] | None = None,
    offloaded: Collection[str] = (),
) -> ExecutionPlan:
    """Put what a config says of single calls in the place of what a plan says.

    Args:
        plan: to begin with.
        num_devices: of the machine.
        allocations: by call; this and what follows, as `make_plan` takes it.
        rows: by call.
        pages: by call that generates.
        kv_dtype: by call that generates.
        weights: by call that generates or infers.
        role_weights: by role that no call trains.
        offloaded: roles whose calls all have the option `+offload`.

    Raises:
        ValueError: as `make_plan`.
    """
    graph = plan.graph
    given: dict[str, dict[str, Any]] = {
        "rows": {k: v for k, v in (rows or {}).items() if v},
        "pages": {k: v for k, v in (pages or {}).items() if v},
        "kv_dtype": {k: v for k, v in (kv_dtype or {}).items() if v},
    }
    allocations = {k: v for k, v in (allocations or {}).items() if v}
    for names in (allocations, *given.values()):
        _check_names(graph, names)
    _check_pools(graph, given["pages"], given["kv_dtype"])
    given["weights"] = _call_weights(graph, weights or {}, role_weights or {})
    calls = {}
    for name, call in plan.calls.items():
        text = allocations.get(name, "")
        place = Allocation.parse(text) if text else call.allocation
        _check_devices(name, place, num_devices)
        role = graph.calls[name].role
        if role in offloaded:
            place = dataclasses.replace(place, options=place.options | {"offload"})
        elif role is None:
            # A Transform keeps nothing, whoever it follows.
            place = dataclasses.replace(place, options=place.options - {"offload"})
        if isinstance(graph.calls[name].function, Generate) and place.stage > 1:
            raise ValueError(
                f"Call {name!r} generates, and its allocation {place} has {place.stage}"
                " stages. A stage would wait for the others at every token: give a call"
                " that generates data, fsdp, tensor or expert instead."
            )
        options = {
            field: of_calls[name]
            for field, of_calls in given.items()
            if of_calls.get(name)
        }
        calls[name] = dataclasses.replace(call, allocation=place, **options)
    return dataclasses.replace(plan, calls=calls)


def _check_names(graph: DataflowGraph, names: Collection[str]) -> None:
    for name in names:
        if name not in graph.calls:
            raise ValueError(
                f"The plan names the call {name!r}, which this graph does not "
                f"have. {suggest(name, graph.calls)}"
            )


def _check_pools(
    graph: DataflowGraph, pages: Mapping[str, int], kv_dtype: Mapping[str, str]
) -> None:
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
