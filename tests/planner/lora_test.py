"""What the planner counts of a role with adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import ppo, sft
from realjax.dataflow.plan import make_plan
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.train import TrainProgram
from realjax.models.lora import with_adapters
from realjax.models.parameters import abstract_parameters
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings
from realjax.planner import memory_account, memory_sizes
from realjax.planner.cluster import Cluster
from realjax.planner.cost import CallWork, Coefficients, quantities
from realjax.planner.memory import call_bytes
from realjax.planner.search import search
from realjax.planner.space import Lengths, make_space
from realjax.rl import Sampling
from tests.planner import plan_spaces
from tests.planner.memory_test import WORK, bytes_on, roles_of

PPO = ppo.graph(ppo.PPO(sampling=Sampling(max_new_tokens=8)))
PPO_OF_1B = ppo.graph(ppo.PPO(sampling=Sampling(max_new_tokens=256), minibatches=4))
PLAN = {
    "rollout": "t2@4-5",
    "reward": "d1@6",
    "reference": "d1@7",
    "value": "d2@6-7",
    "train_policy": "f4@0-3",
    "train_critic": "d2@6-7",
}


def adapted(roles, base_dtype="", names=("policy",)):
    """The roles, some of them with adapters."""
    return {
        name: dataclasses.replace(
            role,
            model=with_adapters(
                role.model,
                rank=4,
                alpha=8.0,
                targets=("all-linear",),
                base_dtype=base_dtype,
            ),
        )
        if name in names
        else role
        for name, role in roles.items()
    }


@pytest.mark.parametrize("strategy", ["d8", "f4t2", "f8+zero1", "s2f2t2"])
@pytest.mark.parametrize("base_dtype", ["", "bfloat16"])
def test_what_a_role_with_adapters_keeps_is_counted_to_the_byte(strategy, base_dtype):
    graph = sft.graph(sft.SFT())
    plan = make_plan(graph, num_devices=8, allocation=strategy)
    roles = adapted(roles_of(graph, plan), base_dtype)
    (place,), role = plan.calls.values(), roles["policy"]
    program = TrainProgram(
        graph.calls["train_policy"].function,
        role.program(place.allocation),
        make_mesh(place.allocation),
        OptimizerConfig(),
        10,
    )
    abstract = abstract_parameters(role.model)
    shardings = parameter_shardings(
        abstract, program.mesh, options=place.allocation.options
    )
    parameters = jax.tree.map(
        lambda leaf, sharding: jnp.zeros(
            leaf.shape, leaf.dtype or "float32", device=sharding
        ),
        abstract,
        shardings,
        is_leaf=lambda leaf: hasattr(leaf, "axes"),
    )
    state = program.init_optimizer(parameters)
    sizes, device = memory_sizes(graph, plan, roles, WORK), jax.devices()[0]
    counted = sizes.parts["policy", "parameters"]
    assert counted == bytes_on(device, state.parameters)
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
    assert sizes.parts["policy", "optimizer"] == bytes_on(device, moments)


def test_a_base_stays_at_a_call_elsewhere_and_adapters_come_and_go():
    plan = make_plan(PPO, num_devices=8, allocations=PLAN)
    plain = roles_of(PPO, plan)
    found = memory_sizes(PPO, plan, adapted(plain), WORK)
    before = memory_sizes(PPO, plan, plain, WORK)
    ((key, copy),) = found.copies.items()
    (((role, _), (place, base)),) = found.bases.items()
    assert (role, place.allocation) == ("policy", plan.calls["rollout"].allocation)
    assert base == before.copies[key] > 2 * copy > 0
    account = memory_account(PPO, plan, adapted(plain), WORK)
    group = next(i for i, g in enumerate(account.groups) if 4 in g)
    what = "base of policy at t2@4-5"
    assert [moment.held[what][group] for moment in account.moments] == [base] * len(
        account.moments
    )


def test_a_base_of_an_offloaded_role_stays_nowhere():
    calls = PLAN | {"train_policy": "f4@0-3+offload"}
    plan = make_plan(PPO, num_devices=8, allocations=calls)
    roles = adapted(roles_of(PPO, plan))
    sizes = memory_sizes(PPO, plan, roles, WORK)
    assert not sizes.bases
    kept = memory_sizes(
        PPO, make_plan(PPO, num_devices=8, allocations=PLAN), roles, WORK
    )
    ((_, whole),), ((_, adapters),) = sizes.copies.items(), kept.copies.items()
    ((_, base),) = kept.bases.values()
    assert whole == adapters + base


def test_training_adapters_works_with_less():
    plan = make_plan(PPO, num_devices=8, allocations=PLAN)
    plain = roles_of(PPO, plan, remat="block")
    of = lambda roles: call_bytes(PPO, plan, "train_policy", roles, 16, WORK)
    found, before = of(adapted(plain)), of(plain)
    # The base once, adapters with two moments.
    adapters = found.parameters - before.parameters
    assert found.masters == before.parameters + 3 * adapters
    assert before.masters == 3 * before.parameters
    assert found.working < before.working


def test_a_backward_pass_beside_adapters_is_one_product_of_two():
    cluster = Cluster.load("8xh100")
    model = roles_of(PPO, make_plan(PPO, num_devices=8, allocations=PLAN))[
        "policy"
    ].model
    allocation = Allocation.parse("f8@0-7")
    work = CallWork(kind="train", model=model, num_rows=64, prompt_tokens=128)
    with_all = quantities(work, allocation, cluster)
    beside = dataclasses.replace(
        work, model=with_adapters(model, rank=2, alpha=1.0, targets=("q_proj",))
    )
    found = quantities(beside, allocation, cluster)
    np.testing.assert_allclose(found.products / with_all.products, 2 / 3, rtol=1e-3)
    assert found.link < with_all.link
    assert found.memory < with_all.memory


@pytest.mark.slow
def test_a_searched_plan_takes_what_its_account_says():
    graph, memory = PPO_OF_1B, int(4e9)
    machine = Cluster.load("8xh100")
    device = dataclasses.replace(machine.device, memory_bytes=memory)
    roles = adapted(
        plan_spaces.roles_of(graph), base_dtype="bfloat16", names=("policy", "critic")
    )
    space = make_space(
        graph,
        roles,
        plan_spaces.WORK,
        Lengths(prompt_tokens=256, new_tokens=256, most_new_tokens=256),
        dataclasses.replace(machine, device=device),
        Coefficients(),
        microbatch_tokens=8192,
    )
    found = search(space, most_moves=200)
    plan = space.execution_plan(found.plan)
    account = memory_account(graph, plan, roles, plan_spaces.WORK, limit_bytes=memory)
    assert account.fits
    assert found.memory_bytes == pytest.approx(account.peak_bytes.max(), rel=0.02)
