"""The plan of a run on a machine that need not be there.

    space = described_space(config, Cluster.load("8xh100"), coefficients)
    found = search(space)
    space.chosen(found.plan)         # the allocation of every call

As in `described`, nothing is loaded: models are their configs.
"""

from realjax.functions.role import Role
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Coefficients
from realjax.planner.memory import Work
from realjax.planner.space import Lengths, Space, make_space
from realjax.runtime.described import (
    MICROBATCH_TOKENS,
    described_model,
    described_size,
    described_widths,
)
from realjax.runtime.run import make_graph
from realjax.runtime.run_config import RunConfig


def described_space(
    config: RunConfig,
    cluster: Cluster,
    coefficients: Coefficients,
    *,
    prompt_tokens: float = 0.0,
    new_tokens: float = 0.0,
) -> Space:
    """List the plans of a run.

    Args:
        config: of the run. Roles without a path need `vocab_size` in their `model`.
        cluster: the machine.
        coefficients: of its devices.
        prompt_tokens: mean of a prompt, or of a sequence where nothing is generated; 0
            is the longest that the config allows.
        new_tokens: mean of a completion; 0 is the longest.

    Raises:
        ValueError: a role without a known model, or a call that fits nowhere.
    """
    graph = make_graph(config)
    roles = {name: _role(config, graph, name, cluster) for name in graph.roles}
    prompt_width, width = described_widths(graph, config.data)
    longest = width - prompt_width if prompt_width else 0
    lengths = Lengths(
        prompt_tokens=prompt_tokens or prompt_width or width,
        new_tokens=min(new_tokens or longest, longest),
        most_new_tokens=longest,
    )
    work = Work(
        num_rows=described_size(config.data), width=width, prompt_width=prompt_width
    )
    return make_space(
        *(graph, roles, work, lengths, cluster, coefficients),
        microbatch_tokens=config.microbatch_tokens
        or MICROBATCH_TOKENS * cluster.num_devices,
    )


def _role(config: RunConfig, graph, name: str, cluster: Cluster) -> Role:
    model = described_model(config, graph, name)
    given = config.roles[name]
    default = "float32" if cluster.device.kind == "cpu" else "bfloat16"
    return Role(
        name=name,
        config=given,
        model=model,
        eos_ids=model.eos_ids,
        dtype=given.dtype or default,
        is_trained=name in graph.trained_roles,
    )
