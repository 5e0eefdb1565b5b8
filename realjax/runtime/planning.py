"""The plan of a run on a machine that need not be there.

    described_plan(config, Cluster.load("8xh100")).table()     as a run there takes it

    space = described_space(config, Cluster.load("8xh100"), coefficients)
    found = search(space)
    space.chosen(found.plan)         # the allocation of every call

As in `described`, nothing is loaded: models are their configs.
"""

from typing import Any

from realjax.dataflow.account import GIB
from realjax.dataflow.plan import ExecutionPlan
from realjax.functions.role import Role
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Coefficients
from realjax.planner.memory import Work
from realjax.planner.space import Space, make_space
from realjax.runtime.described import (
    DTYPE,
    described_model,
    described_size,
    described_widths,
)
from realjax.runtime.given_plans import given_plan, microbatch_tokens
from realjax.runtime.plan_choice import Setting, choose_plan, lengths_of
from realjax.runtime.run import make_graph, stored_calls
from realjax.runtime.run_config import RunConfig


def described_plan(
    config: RunConfig, cluster: Cluster, *, algorithm: Any = None
) -> ExecutionPlan:
    """Return the plan that a run would take on a machine.

    Args:
        config: of the run. Where the plan has to be found, roles without a path need
            `vocab_size` in their `model`.
        cluster: the machine.
        algorithm: module or object; None is the one that the config names.

    Raises:
        ValueError: a plan that cannot be, a role without a known model, or a call that
            fits nowhere.
    """
    config = of_steps(config, algorithm)
    given = given_plan(config, make_graph(config, algorithm), cluster)
    if given is not None:
        return given
    setting = described_setting(config, cluster, algorithm=algorithm)
    return choose_plan(config, setting).plan


def described_setting(
    config: RunConfig,
    cluster: Cluster,
    *,
    prompt_tokens: float = 0.0,
    new_tokens: float = 0.0,
    algorithm: Any = None,
) -> Setting:
    """Return what the plan of a run is for, from its config alone.

    Args:
        config: of the run. Roles without a path need `vocab_size` in their `model`.
        cluster: the machine.
        prompt_tokens: mean of a prompt, or of a sequence where nothing is generated; 0
            is the longest that the config allows.
        new_tokens: mean of a completion; 0 is what the config expects.
        algorithm: module or object; None is the one that the config names.

    Raises:
        ValueError: a role without a known model.
    """
    config = of_steps(config, algorithm)
    graph = make_graph(config, algorithm)
    prompt_width, width = described_widths(graph, config.data)
    work = Work(
        num_rows=described_size(config.data),
        width=width,
        prompt_width=prompt_width,
        device_kind=cluster.device.kind,
    )
    is_cpu = cluster.device.kind == "cpu"  # There the memory is whatever is needed.
    limit_bytes = 0 if is_cpu else cluster.device.memory_bytes
    return Setting(
        graph=graph,
        roles={name: _role(config, graph, name, cluster) for name in graph.roles},
        work=work,
        lengths=lengths_of(
            config, graph, prompt_tokens or width, work, new_tokens=new_tokens
        ),
        cluster=cluster,
        limit_bytes=int(config.memory_gib * GIB) or limit_bytes,
    )


def of_steps(config: RunConfig, algorithm: Any = None) -> RunConfig:
    """Return the config without what it says of calls that run once, before all steps.

    Args:
        config: of the run.
        algorithm: module or object; None is the one that the config names.
    """
    return config.without_calls(stored_calls(config, algorithm))


def described_space(
    config: RunConfig,
    cluster: Cluster,
    coefficients: Coefficients,
    *,
    prompt_tokens: float = 0.0,
    new_tokens: float = 0.0,
) -> Space:
    """List the plans of a run; see `described_setting`.

    Raises:
        ValueError: a role without a known model, or a call that fits nowhere.
    """
    setting = described_setting(
        config, cluster, prompt_tokens=prompt_tokens, new_tokens=new_tokens
    )
    return make_space(
        *(setting.graph, setting.roles, setting.work, setting.lengths),
        *(cluster, coefficients),
        microbatch_tokens=microbatch_tokens(config, cluster),
    )


def _role(config: RunConfig, graph, name: str, cluster: Cluster) -> Role:
    default = "float32" if cluster.device.kind == "cpu" else DTYPE
    model = described_model(config, graph, name, dtype=default)
    given = config.roles[name]
    return Role(
        name=name,
        config=given,
        model=model,
        eos_ids=model.eos_ids,
        dtype=given.dtype or default,
        is_trained=name in graph.trained_roles,
    )
