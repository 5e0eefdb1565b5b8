"""Which trials a run has, by what roles, and where their calls run; see `trials`."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from realjax.data.datasets import Dataset, load_dataset
from realjax.dataflow.graph import DataflowGraph, ModelFunctionCall, call
from realjax.dataflow.plan import CallPlan, ExecutionPlan, planned
from realjax.dataflow.schedule import Part, Place, home_places, place_of
from realjax.functions.function import Generate, Infer, Train
from realjax.functions.role import Role
from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.sharding import check_fit
from realjax.rl.sampling import Sampling
from realjax.runtime.plan_choice import padded_roles
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.runtime.widths import sequence_width

if TYPE_CHECKING:
    from realjax.runtime.run import Run

ROLLOUT, JUDGE = "rollout", "judge"
"""Calls of a trial."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One role's trial.

    Attributes:
        graph: its completions, and the judge's scores of them if there is a judge.
        plan: where those calls run.
        width: T, tokens of prompt and completion.
        data: held-out prompts.
    """

    graph: DataflowGraph
    plan: ExecutionPlan
    width: int
    data: Dataset


def trial_graphs(config: RunConfig, graph: DataflowGraph) -> dict[str, DataflowGraph]:
    """The graphs of a run's trials by the role that completes, the policy's first.

    Args:
        config: of the run.
        graph: of its steps.

    Returns:
        None at all where evaluation asks for no trial.

    Raises:
        ValueError: no role can complete, there is nothing held out, or a role would be
            compared with itself.
    """
    evaluation = config.evaluation
    if not evaluation.has_trials:
        return {}
    what = "judge" if evaluation.judge else "verifier"
    if not config.data.valid_path and not config.data.held_out:
        raise ValueError(
            f"config.evaluation.{what} is set, and nothing is held out. Give"
            " config.data.valid_path or config.data.held_out."
        )
    policy = completing_role(graph)
    if policy is None:
        raise ValueError(
            f"config.evaluation.{what} is set, and no role that this algorithm trains"
            f" completes prompts (it has {', '.join(graph.roles)}). Leave it out."
        )
    if evaluation.judge and evaluation.against == policy:
        raise ValueError(
            f"config.evaluation.against is {policy!r}, the role that is measured. Name"
            " another role, as 'reference'."
        )
    names = (policy, evaluation.against) if evaluation.judge else (policy,)
    sampling = evaluation.sampling or _sampling_of(graph, policy)
    return {name: _graph(evaluation, sampling, name) for name in names}


def completing_role(graph: DataflowGraph) -> str | None:
    """The role whose completions a run is about: that generates, or learns to."""
    for node in graph.calls.values():
        if isinstance(node.function, Generate):
            return node.role
    for node in graph.calls.values():
        if isinstance(node.function, Train) and node.function.output == "logprobs":
            return node.role
    return None


def _sampling_of(graph: DataflowGraph, role: str) -> Sampling:
    """As in training, where the role samples there."""
    for node in graph.of(role):
        if isinstance(node.function, Generate):
            return node.function.sampling
    return Sampling()


def _graph(
    evaluation: EvaluationConfig, sampling: Sampling, role: str
) -> DataflowGraph:
    generate = Generate(
        sampling=sampling, completions_per_prompt=evaluation.completions_per_prompt
    )
    calls = {ROLLOUT: call(role, generate)}
    if evaluation.judge:
        calls[JUDGE] = call(evaluation.judge, Infer(output="scores"))
    return DataflowGraph(**calls)


def trial_plan(
    graph: DataflowGraph, training: ExecutionPlan, evaluation: EvaluationConfig
) -> ExecutionPlan:
    """Where the calls of a trial run: as the calls like them do in training.

    Args:
        graph: of the trial.
        training: the plan of the steps.
        evaluation: may have an allocation for all of them.
    """
    calls = {
        name: _place(node, training, evaluation.allocation)
        for name, node in graph.calls.items()
    }
    return planned(graph, calls, microbatch_tokens=training.microbatch_tokens)


def _place(node: ModelFunctionCall, training: ExecutionPlan, wish: str) -> CallPlan:
    """The first of: such a call of the role, any of the role, such a call, any."""
    kind, known = type(node.function), training.graph.calls

    def distance(name: str) -> int:
        other = known[name]
        is_same = isinstance(other.function, kind)
        return 2 * (other.role != node.role) + (not is_same)

    named = [name for name in training.calls if known[name].role is not None]
    name = min(named, key=distance)
    found = training.calls[name]
    is_extra = node.role not in training.graph.roles
    is_same = isinstance(known[name].function, kind)
    allocation = Allocation.parse(wish) if wish else found.allocation
    if kind is Generate and allocation.stage > 1:
        # Stages would wait for each other at every token; fsdp takes as little memory.
        allocation = dataclasses.replace(
            allocation, fsdp=allocation.fsdp * allocation.stage, stage=1
        )
    offloads = is_extra or "offload" in found.allocation.options
    options = frozenset({"offload"} if offloads else ())
    place = CallPlan(
        allocation=dataclasses.replace(allocation, options=options),
        weights=_weights(node, name, training),
    )
    if not is_same or wish:
        return place
    return dataclasses.replace(
        place, rows=found.rows, pages=found.pages, kv_dtype=found.kv_dtype
    )


def _weights(node: ModelFunctionCall, like: str, training: ExecutionPlan) -> str:
    """Those that the role has, or all that is sampled: roles are compared by them."""
    graph, kept = training.graph, training.calls[like].weights
    if kept and graph.calls[like].role == node.role:
        return kept
    if not isinstance(node.function, Generate):
        return ""
    sampled = [
        call.weights
        for name, call in training.calls.items()
        if isinstance(graph.calls[name].function, Generate)
    ]
    return sampled[0] if sampled else ""


def trial_roles(
    config: RunConfig,
    graphs: Mapping[str, DataflowGraph],
    known: Mapping[str, Role],
    make_role: Callable[[str, DataflowGraph], Role],
) -> dict[str, Role]:
    """The roles of a run and of its trials.

    Args:
        config: of the run.
        graphs: of the trials, by the role that completes.
        known: roles of the steps.
        make_role: reads what a role of a graph is.

    Raises:
        ValueError: a role has the wrong head, or the allocation that evaluation gives
            does not divide its model.
    """
    roles = dict(known)
    for graph in graphs.values():
        for name, node in graph.calls.items():
            role = node.role or ""
            if role not in roles:
                roles[role] = make_role(role, graph)
            _check_head(name, node, roles[role].model)
            if config.evaluation.allocation:
                allocation = Allocation.parse(config.evaluation.allocation)
                _check_fit(name, allocation, roles[role])
    return roles


def with_trials(
    run: "Run", graphs: Mapping[str, DataflowGraph], roles: Mapping[str, Role]
) -> "Run":
    """The run with its trials: their plans and prompts.

    Args:
        run: checked and planned.
        graphs: of the trials, by the role that completes.
        roles: as `trial_roles` gives them.

    Raises:
        ValueError: an allocation does not divide a model, or there are no held-out
            prompts.
    """
    data, found = _held_out_prompts(run), {}
    for role, graph in graphs.items():
        plan = trial_plan(graph, run.plan, run.config.evaluation)
        for name, node in graph.calls.items():
            _check_fit(name, plan.calls[name].allocation, roles[node.role or ""])
        _check_weights(run, graph, plan)
        own = {name: roles[name] for name in graph.roles}
        width = sequence_width(
            graph, own, [data], sampling="config.evaluation.sampling"
        )
        found[role] = Trial(graph=graph, plan=plan, width=width, data=data)
    plans = [trial.plan for trial in found.values()]
    padded = padded_roles(roles, run.graph, run.plan, plans)
    return dataclasses.replace(run, roles=padded, trials=found)


def _check_fit(name: str, allocation: Allocation, role: Role) -> None:
    try:
        check_fit(allocation, role.model)
    except ValueError as error:
        text = f"config.evaluation, call {name!r}, role {role.name!r}: {error}"
        raise ValueError(text) from error


def _check_weights(run: "Run", graph: DataflowGraph, plan: ExecutionPlan) -> None:
    """Refuses to move a role that has whole numbers alone."""
    dtypes = {name: role.dtype for name, role in run.roles.items()}
    homes = home_places(run.graph, run.plan, dtypes)
    for name, node in graph.calls.items():
        home = homes.get(node.role or "")
        if home is None or not home.weights:
            continue
        place = place_of(graph, plan, dtypes, name)
        if place.key != home.key:
            raise ValueError(
                f"config.evaluation takes the role {node.role!r} to {place} for"
                f" {name}, and its weights are {home.weights} at"
                f" {home.allocation}, from where they do not move. Leave"
                " config.evaluation.allocation out, or the weights of the role."
            )


def _held_out_prompts(run: "Run") -> Dataset:
    if run.valid_data is not None and run.valid_data.kind == "prompts":
        return run.valid_data
    prompts, only = dataclasses.replace(run.config.data, kind="prompts"), None
    if run.valid_data is not None and not prompts.valid_path:
        # As prompts other records fit, and the last of those may be trained on.
        only = run.valid_data.numbers
    try:
        return load_dataset(
            prompts, run.tokenizer, split="valid", seed=run.config.seed, only=only
        )
    except ValueError as error:
        raise ValueError(f"config.evaluation completes prompts: {error}") from error


def _check_head(name: str, node: ModelFunctionCall, model: ModelConfig) -> None:
    needed = "language" if isinstance(node.function, Generate) else "scalar"
    if model.head != needed:
        raise ValueError(
            f"config.evaluation takes the role {node.role!r} for {name}, which needs a"
            f" {needed} head, and its model has a {model.head} one. Name another role."
        )


def extra_homes(
    trials: Iterable[Trial], training: DataflowGraph, dtypes: Mapping[str, str]
) -> dict[str, Place]:
    """Where roles stay that only trials use.

    Args:
        trials: of the run.
        training: the graph of its steps.
        dtypes: of each role's computation.
    """
    homes: dict[str, Place] = {}
    for trial in trials:
        homes = home_places(trial.graph, trial.plan, dtypes) | homes
    return {role: home for role, home in homes.items() if role not in training.roles}


def resting_alone(homes: Iterable[str]) -> frozenset[tuple[str, Part]]:
    """Parts of roles that wait in host memory because only trials use them."""
    part: Part = "parameters"
    return frozenset((role, part) for role in homes)
