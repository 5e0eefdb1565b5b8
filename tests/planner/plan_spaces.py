"""Plans of small models on machines that are not there, for tests of the planner."""

import dataclasses
import functools

from realjax.algorithms import ppo
from realjax.functions.role import Role, RoleConfig
from realjax.models.families import llama
from realjax.parallel.allocation import Allocation
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Coefficients
from realjax.planner.memory import Work
from realjax.planner.space import Lengths, make_space
from realjax.rl import Sampling

WORK = Work(num_rows=64, width=512, prompt_width=256)


def roles_of(graph, **changes):
    """Return the roles of a graph: Llamas of 1B, or with changes."""
    roles = {}
    for name in graph.roles:
        head = "scalar" if name in ("reward", "critic") else "language"
        model = dataclasses.replace(llama.size("3.2-1b"), head=head)
        roles[name] = Role(
            name=name,
            config=RoleConfig(),
            model=dataclasses.replace(model, **changes),
            eos_ids=(2,),
            dtype="bfloat16",
            is_trained=name in graph.trained_roles,
        )
    return roles


@functools.cache
def space_of(cluster, algorithm=ppo, rules=None, memory=None, staleness=0, **changes):
    """Return the plans of an algorithm on a preset with some bytes of memory."""
    sampling = Sampling(max_new_tokens=256)
    graph = algorithm.graph(
        ppo.PPO(sampling=sampling, minibatches=4, staleness=staleness)
        if algorithm is ppo
        else algorithm.HYPERPARAMETERS()
    )
    machine = Cluster.load(cluster)
    if memory is not None:
        device = dataclasses.replace(machine.device, memory_bytes=int(memory))
        machine = dataclasses.replace(machine, device=device)
    return make_space(
        graph,
        roles_of(graph, **changes),
        WORK,
        Lengths(prompt_tokens=256, new_tokens=256, most_new_tokens=256),
        machine,
        Coefficients(),
        microbatch_tokens=8192,
        rules=rules,
    )


def numbers_of(space, allocations):
    """Return the plan with some allocations, by call."""
    return tuple(
        space.number_of(name, Allocation.parse(allocations[name]))
        for name in space.names
    )
