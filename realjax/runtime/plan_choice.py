"""Which execution plan a run takes, and what is expected of it.

What a config gives is taken (`given_plans`); what it wants found is looked for by the
planner, around the allocations that it gives single calls. A plan that was found fits
the devices by the account of its schedule.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from realjax.dataflow.account import Account, DoesNotFitError
from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan, adjusted
from realjax.functions.function import Generate
from realjax.functions.role import Role
from realjax.parallel.allocation import Allocation
from realjax.parallel.sharding import check_fit, padded_for
from realjax.planner.cluster import Cluster
from realjax.planner.coefficients import coefficients_of
from realjax.planner.cost import Coefficients
from realjax.planner.exhaustive import best_of_all
from realjax.planner.fitting import until_it_fits
from realjax.planner.memory import Work, fit_pools, memory_account
from realjax.planner.options import Wish
from realjax.planner.search import search
from realjax.planner.simulate import price
from realjax.planner.space import Lengths, Space, make_space
from realjax.planner.symmetric import symmetric_plans
from realjax.runtime.agreement import Agreement
from realjax.runtime.given_plans import (
    adjustments,
    asked,
    fixed_allocations,
    given_plan,
    microbatch_tokens,
    mode_of,
    wish_of,
    wishes_of,
)
from realjax.runtime.plan_remedies import remedies
from realjax.runtime.run_config import RunConfig

UNLIMITED_BYTES = 2**60
"""Of devices whose memory nobody knows: anything fits."""

MOST_LOOKED_AT = 2**18
"""Plans that are looked at one by one; of more, a search looks at some."""

MOVES, CPU_MOVES = 2048, 256
"""Of each chain of a search: for GPUs, and for the CPUs that tests and first looks use,
whose steps are over in moments."""

_AGAIN = ", as before"

TRIED_MOVES = 64
"""The same, to see whether a change of the config helps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a plan is for.

    Attributes:
        graph: of the algorithm.
        roles: by name; their models need not be padded.
        work: shapes of a step.
        lengths: of its sequences in the mean.
        cluster: the machine.
        limit_bytes: memory of a device; 0 is not known.
    """

    graph: DataflowGraph
    roles: Mapping[str, Role]
    work: Work
    lengths: Lengths
    cluster: Cluster
    limit_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """An execution plan, and what is expected of it.

    Attributes:
        plan: every call's allocation.
        origin: how it was found, for people.
        call_seconds: expected of each call of a role, without copies.
        step_seconds: expected of a step; 0 where nobody asked.
        symmetric: the fastest strategy that is the same for all calls, and the seconds
            of its step, if both are known.
        is_measured: whether these are seconds of a machine that was measured.
    """

    plan: ExecutionPlan
    origin: str
    call_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    step_seconds: float = 0.0
    symmetric: tuple[str, float] | None = None
    is_measured: bool = False

    def summary(self) -> str:
        """The plan's table, with seconds."""
        lines = []
        for line, name in zip(
            self.plan.table().split("\n"), self.plan.calls, strict=True
        ):
            seconds = self.call_seconds.get(name)
            shown = f"{seconds:10.4f} s" if seconds is not None else " " * 12
            lines.append(f"{shown}  {line}")
        title = f"plan: {self.origin}"
        if self.step_seconds:
            title += f", {self.step_seconds:.4f} s a step expected"
        if self.symmetric:
            strategy, seconds = self.symmetric
            title += f" ({seconds:.4f} s with {strategy} for every call)"
        return "\n".join([title, *lines])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; those of the plan are among them."""
        return self.plan.as_dict() | {
            "origin": self.origin,
            "call_seconds": dict(self.call_seconds),
            "step_seconds": self.step_seconds,
            "symmetric": list(self.symmetric) if self.symmetric else None,
            "is_measured": self.is_measured,
        }

    @classmethod
    def from_dict(
        cls, graph: DataflowGraph, values: Mapping[str, Any], *, num_devices: int
    ) -> "Chosen":
        """Read back what `as_dict` gave."""
        symmetric = values.get("symmetric")
        return cls(
            plan=ExecutionPlan.from_dict(graph, values, num_devices=num_devices),
            origin=values.get("origin", ""),
            call_seconds=values.get("call_seconds", {}),
            step_seconds=values.get("step_seconds", 0.0),
            symmetric=(symmetric[0], symmetric[1]) if symmetric else None,
            is_measured=values.get("is_measured", False),
        )


def choose_plan(
    config: RunConfig,
    setting: Setting,
    *,
    kept: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Chosen:
    """Find the plan of a run.

    Process 0 looks for it, and all take what it found.

    Args:
        config: of the run.
        setting: what the plan is for.
        kept: what an earlier run in this folder took, as `Chosen.as_dict` and what was
            `asked` then. A plan that was found, and for the same question, is taken
            again: it may have been found with other coefficients.
        tell: is told what is being done.

    Raises:
        ValueError: the config gives a plan that cannot be, or none fits the devices.
    """
    graph, num_devices = setting.graph, setting.cluster.num_devices
    given = given_plan(config, graph, setting.cluster)
    if given is not None:
        _check_fit(setting, given)
        return _described(setting, given, mode_of(config, num_devices) or "by hand")
    if kept and kept.get("asked") == asked(config, num_devices):
        with contextlib.suppress(
            ValueError
        ):  # Of a graph that this folder will refuse.
            chosen = Chosen.from_dict(graph, kept, num_devices=num_devices)
            origin = chosen.origin.removesuffix(_AGAIN) + _AGAIN
            return dataclasses.replace(chosen, origin=origin)
    find = lambda: _found(config, setting, tell).as_dict()
    values = Agreement("execution plan", errors=(DoesNotFitError,)).decide(find)
    return Chosen.from_dict(graph, values, num_devices=num_devices)


def lengths_of(
    config: RunConfig,
    graph: DataflowGraph,
    mean_tokens: float,
    work: Work,
    *,
    new_tokens: float = 0.0,
) -> Lengths:
    """Return the tokens of a step's sequences.

    Args:
        config: of the run.
        graph: of its algorithm.
        mean_tokens: of a prompt, or of a sequence where nothing is generated.
        work: shapes of a step.
        new_tokens: mean of a completion; 0 is what the config expects.
    """
    limits = [
        node.function.sampling.max_new_tokens
        for node in graph.calls.values()
        if isinstance(node.function, Generate)
    ]
    if not limits:
        return Lengths(prompt_tokens=min(mean_tokens, work.width))
    return Lengths(
        prompt_tokens=min(mean_tokens, work.prompt_width),
        new_tokens=min(
            new_tokens or config.expected_new_tokens or max(limits), max(limits)
        ),
        most_new_tokens=max(limits),
    )


def padded_roles(
    roles: Mapping[str, Role],
    graph: DataflowGraph,
    plan: ExecutionPlan,
    others: Iterable[ExecutionPlan] = (),
) -> dict[str, Role]:
    """Return roles with their models padded for the strategies of all their calls.

    Args:
        roles: by name.
        graph: of the steps.
        plan: of the steps.
        others: plans of other graphs in which the same parameters are used.
    """
    known = [(graph, plan), *((other.graph, other) for other in others)]
    padded = {}
    for name, role in roles.items():
        allocations = [
            place.allocation
            for of_graph, of_plan in known
            for call, place in of_plan.calls.items()
            if of_graph.calls[call].role == name
        ]
        model = padded_for(role.model, allocations)
        padded[name] = dataclasses.replace(role, model=model)
    return padded


def _check_fit(setting: Setting, plan: ExecutionPlan) -> None:
    """Refuse a given plan whose strategies do not divide the models."""
    for name, place in plan.calls.items():
        role = setting.graph.calls[name].role
        if role is not None:
            try:
                check_fit(place.allocation, setting.roles[role].model)
            except ValueError as error:
                raise ValueError(f"Call {name!r}, role {role!r}: {error}") from error


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Compute on the host, if JAX can: the devices' memory is the run's."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        yield
        return
    with jax.default_device(device):
        yield


def _space(
    setting: Setting,
    tokens: int,
    fixed: Mapping[str, Allocation],
    wishes: Mapping[str, Wish],
    coefficients: Coefficients,
    limit_bytes: int = 0,
) -> Space:
    device = dataclasses.replace(
        setting.cluster.device, memory_bytes=limit_bytes or UNLIMITED_BYTES
    )
    return make_space(
        setting.graph,
        setting.roles,
        setting.work,
        setting.lengths,
        dataclasses.replace(setting.cluster, device=device),
        coefficients,
        microbatch_tokens=tokens,
        fixed=fixed,
        wishes=wishes,
    )


def _described(setting: Setting, plan: ExecutionPlan, origin: str) -> Chosen:
    """Say what is expected of a given plan's calls."""
    known = coefficients_of(setting.cluster)
    fixed, wishes, num_rows = {}, {}, setting.work.num_rows
    for name in setting.graph.order():
        node = setting.graph.calls[name]
        if node.role is None:
            continue
        call = plan.calls[name]
        if isinstance(node.function, Generate):
            num_rows *= node.function.completions_per_prompt
            rows = plan.rollout_settings(name, num_rows=num_rows).slots
        else:
            width = setting.work.width
            rows = plan.num_rows(name, max_rows=num_rows, row_length=width)
        # Which devices those are changes no call's seconds.
        fixed[name] = dataclasses.replace(call.allocation, devices=())
        wishes[name] = wish_of(call, rows=rows, remat=call.remat or "none")
    given = (fixed, wishes, known.coefficients)
    with _on_cpu():
        space = _space(setting, plan.microbatch_tokens, *given)
    seconds = {
        name: options[0].seconds
        for name, options in zip(space.names, space.options, strict=True)
    }
    return Chosen(
        plan=plan,
        origin=origin,
        call_seconds=seconds,
        is_measured=known.is_measured,
    )


def _found(config: RunConfig, setting: Setting, tell: Callable[[str], None]) -> Chosen:
    """Look for a plan, in one process.

    Raises:
        ValueError: none fits; names the call, the bytes, and what would do.
    """
    moves = CPU_MOVES if setting.cluster.device.kind == "cpu" else MOVES
    try:
        with _on_cpu():
            return _look(config, setting, moves, tell)
    except ValueError as error:
        if not setting.limit_bytes:
            raise
        advice = _what_would_fit(config, setting)
        if not advice:  # It is not for want of memory.
            raise
        raise type(error)(f"{error}\n{advice}") from error


def _what_would_fit(config: RunConfig, setting: Setting) -> str:
    """Try changes of a config, and then larger machines, the smallest first."""
    with _on_cpu():
        try:
            _look(config, dataclasses.replace(setting, limit_bytes=0), TRIED_MOVES)
        except ValueError:
            return ""
        for remedy in remedies(config, setting.roles, setting.cluster):
            changed = dataclasses.replace(
                setting,
                roles=remedy.roles,
                cluster=remedy.cluster,
                limit_bytes=int(setting.limit_bytes * remedy.memory_share),
            )
            with contextlib.suppress(ValueError):
                _look(remedy.config, changed, TRIED_MOVES)
                return f"A plan fits with {remedy.text}."
    return "No single change that was tried makes a plan fit."


def _look(
    config: RunConfig,
    setting: Setting,
    moves: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Chosen:
    """Make the options of all calls, and take the best plan that is found."""
    mode = mode_of(config, setting.cluster.num_devices)
    known = coefficients_of(setting.cluster)
    space = _space(
        setting,
        microbatch_tokens(config, setting.cluster),
        fixed_allocations(config, setting.graph, setting.cluster),
        wishes_of(config, setting.graph, setting.cluster),
        known.coefficients,
        setting.limit_bytes,
    )
    same = symmetric_plans(space)
    numbers, plan = _numbers(mode, config, setting, space, same, moves, tell)
    priced = price(space.problem, jnp.asarray([numbers]))
    symmetric = None
    if same:
        strategy = next(iter(space.chosen(same[0][0]).values())).strategy
        symmetric = (strategy, same[0][1])
    return Chosen(
        plan=plan,
        origin=mode,
        call_seconds={
            name: options[number].seconds
            for name, options, number in zip(
                space.names, space.options, numbers, strict=True
            )
        },
        step_seconds=float(priced.seconds[0]),
        symmetric=symmetric,
        is_measured=known.is_measured,
    )


def _numbers(
    mode: str,
    config: RunConfig,
    setting: Setting,
    space: Space,
    same: list,
    moves: int,
    tell: Callable[[str], None],
) -> tuple[tuple[int, ...], ExecutionPlan]:
    """Return the numbers of the options of a plan that fits, and the plan."""
    if mode == "search":
        tell(f"planning: {space.num_plans:.1e} plans on {setting.cluster.name}")
        starts = [numbers for numbers, _ in same]
        return _searched(config, setting, space, starts, moves)
    if mode == "heuristic":
        from realjax.planner.heuristic import template_plan

        found = template_plan(space)
        candidates = [found] if found else []
    else:
        candidates = same
    for numbers, _ in candidates:
        plan, account = _fitted(config, setting, space.execution_plan(numbers))
        if account is None or account.fits:
            return tuple(numbers), plan
    raise ValueError(
        f"config.plan is {mode!r}, and no such plan fits {setting.cluster.name}. Let"
        " 'search' look for one that has other strategies for other calls."
    )


def _searched(
    config: RunConfig, setting: Setting, space: Space, starts: list, moves: int
) -> tuple[tuple[int, ...], ExecutionPlan]:
    """Search until a plan fits by the account of its schedule, which is exact."""

    def find(space: Space) -> tuple[int, ...]:
        if space.num_plans <= MOST_LOOKED_AT:
            return best_of_all(space)[0]
        return search(space, seed=config.seed, starts=starts, most_moves=moves).plan

    fitted = lambda numbers: _fitted(config, setting, space.execution_plan(numbers))
    numbers = until_it_fits(space, find, lambda numbers: fitted(numbers)[1])
    if numbers is not None:
        return numbers, fitted(numbers)[0]
    # The least that every call can do with, whatever the time.
    needs = lambda option: option.static_bytes + option.working_bytes
    numbers = tuple(options.least(needs) for options in space.options)
    plan, account = fitted(numbers)
    if account is not None:
        account.check()  # Says which step of the schedule takes what.
    return numbers, plan


def _fitted(
    config: RunConfig, setting: Setting, plan: ExecutionPlan
) -> tuple[ExecutionPlan, Account | None]:
    """Return a found plan as the config wants it, and its account if memory counts."""
    plan = adjusted(
        plan, num_devices=setting.cluster.num_devices, **adjustments(config)
    )
    if not setting.limit_bytes:
        return plan, None
    roles = padded_roles(setting.roles, setting.graph, plan)
    given = (roles, setting.work)
    plan = fit_pools(setting.graph, plan, *given, limit_bytes=setting.limit_bytes)
    account = memory_account(
        setting.graph, plan, *given, limit_bytes=setting.limit_bytes
    )
    return plan, account
