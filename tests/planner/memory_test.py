"""Tests of `realjax/planner/memory.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from realjax.algorithms import ppo, sft
from realjax.dataflow import DataflowGraph, call
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import Move, Reload
from realjax.functions import Generate, Infer, Train
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import Role, RoleConfig
from realjax.functions.train import TrainProgram
from realjax.models import cache, transformer
from realjax.models.config import ModelConfig
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import padded_for, parameter_shardings
from realjax.planner import Work, memory_account, memory_sizes
from realjax.rl import Sampling
from realjax.testing import tiny_model

WORK = Work(num_rows=16, width=32, prompt_width=8)


def roles_of(graph, plan, dtype="float32", **config):
    model = padded_for(
        tiny_model(num_layers=4), [p.allocation for p in plan.calls.values()]
    )
    scalar = ("reward", "critic")
    return {
        name: Role(
            name=name,
            config=RoleConfig(**config),
            model=dataclasses.replace(
                model, head="scalar" if name in scalar else "language"
            ),
            eos_ids=(1,),
            dtype=dtype,
            is_trained=name in graph.trained_roles,
        )
        for name in graph.roles
    }


def bytes_on(device, tree):
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize("strategy", ("d8", "f4t2", "f8+zero1", "s2f2t2"))
def test_what_a_trained_role_keeps_is_counted_to_the_byte(strategy):
    graph = sft.graph(sft.SFT())
    plan = make_plan(graph, num_devices=8, allocation=strategy)
    roles = roles_of(graph, plan)
    (role,) = graph.trained_roles
    (place,) = plan.calls.values()
    program = TrainProgram(
        graph.calls["train_policy"].function,
        roles[role].program(place.allocation),
        make_mesh(place.allocation),
        OptimizerConfig(),
        10,
    )
    shardings = parameter_shardings(
        transformer.abstract_parameters(roles[role].model),
        program.mesh,
        options=place.allocation.options,
    )
    parameters = jax.tree.map(
        lambda leaf, sharding: jnp.zeros(leaf.shape, device=sharding),
        transformer.abstract_parameters(roles[role].model),
        shardings,
        is_leaf=lambda node: hasattr(node, "axes"),
    )
    state = program.init_optimizer(parameters)
    sizes = memory_sizes(graph, plan, roles, WORK)
    device = jax.devices()[5]
    assert sizes.parts[role, "parameters"] == bytes_on(device, state.parameters)
    counters = 2 * 4  # Adam's and the schedule's.
    found = bytes_on(device, state.optimizer)
    assert found - counters <= sizes.parts[role, "optimizer"] <= found


def test_copies_are_counted_in_their_own_type_and_layout():
    graph = ppo.graph(ppo.PPO(sampling=Sampling(max_new_tokens=16)))
    plan = make_plan(graph, num_devices=8, allocations={"rollout": "t2@0-1"})
    roles = roles_of(graph, plan, dtype="bfloat16")
    sizes = memory_sizes(graph, plan, roles, WORK)
    (copy,) = [size for (role, _), size in sizes.copies.items() if role == "policy"]
    # Half the elements and half their size, against whole float32 masters on d8; norms
    # are not cut.
    assert sizes.parts["policy", "parameters"] / copy == pytest.approx(4, rel=0.05)


def test_a_rollout_works_with_its_cache_above_all():
    sampling = Sampling(max_new_tokens=4096)
    graph = ppo.graph(ppo.PPO(sampling=sampling))
    plan = make_plan(graph, num_devices=8)
    roles = roles_of(graph, plan)
    work = Work(num_rows=64, width=4104, prompt_width=8)
    sizes = memory_sizes(graph, plan, roles, work)
    rows = 64 // 8
    held = cache.num_bytes(roles["policy"].model, rows, 8 + 4096, jnp.float32)
    assert held <= sizes.working["rollout"] <= 1.1 * held


LLAMA_8B = ModelConfig(
    vocab_size=128256,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14336,
)


def role_8b(allocation, **config):
    model = padded_for(LLAMA_8B, [allocation])
    return Role(
        name="policy",
        config=RoleConfig(**config),
        model=model,
        eos_ids=(1,),
        dtype="bfloat16",
        is_trained=True,
    )


# GiB of temporaries that XLA takes on H200s, compiled ahead of time: the gradient of
# one microbatch of 4096 tokens a row, beside the sums.
@pytest.mark.parametrize(
    "strategy, remat, rows, compiled",
    (
        ("f8", "block", 32, 11.2),
        ("f8", "none", 32, 81.0),
        ("f8", "dots", 32, 50.1),
        ("f8", "offload", 32, 7.2),
        ("t8", "block", 4, 8.8),
    ),
)
def test_training_an_8b_model_is_estimated_as_xla_finds_it(
    strategy, remat, rows, compiled
):
    graph = sft.graph(sft.SFT())
    plan = make_plan(
        graph, num_devices=8, allocation=strategy, microbatch_tokens=rows * 4096
    )
    allocation = plan.calls["train_policy"].allocation
    role = role_8b(allocation, remat=remat)
    sizes = memory_sizes(graph, plan, {"policy": role}, Work(num_rows=rows, width=4096))
    sums = 4 * role.model.num_parameters / 8
    found = (sizes.working["train_policy"] - sums) / 2**30
    assert found == pytest.approx(compiled, rel=0.25)


def test_generating_with_an_8b_model_is_estimated_as_xla_finds_it():
    # 256 prompts of 1024 tokens and as many new ones on one device: 83.3 GiB.
    graph = DataflowGraph(
        rollout=call("policy", Generate(sampling=Sampling(max_new_tokens=1024)))
    )
    plan = make_plan(graph, num_devices=1)
    role = role_8b(plan.calls["rollout"].allocation)
    work = Work(num_rows=256, width=2048, prompt_width=1024)
    sizes = memory_sizes(graph, plan, {"policy": role}, work)
    assert sizes.working["rollout"] / 2**30 == pytest.approx(83.3, rel=0.1)


def dpo_shaped():
    """A reference that infers, and a policy that trains on what it says."""
    return DataflowGraph(
        reference=call("reference", Infer(), logprobs="ref_logprobs"),
        train_policy=call(
            "policy",
            Train(loss=max, reads=("tokens", "completion_mask", "ref_logprobs")),
        ),
    )


@pytest.mark.parametrize("offloaded", ((), ("reference",)))
def test_an_offloaded_reference_costs_dpo_no_memory_over_sft(offloaded):
    def peak(graph):
        plan = make_plan(
            graph,
            num_devices=8,
            allocation="f8",
            offloaded=offloaded,
            microbatch_tokens=8 * 8,
        )
        roles = roles_of(graph, plan, remat="block")
        work = Work(num_rows=8, width=8)
        return memory_account(graph, plan, roles, work).peak_bytes.max()

    ratio = peak(dpo_shaped()) / peak(sft.graph(sft.SFT()))
    assert ratio < 1.1 if offloaded else ratio > 1.1


def test_a_limit_decides_how_early_copies_are_issued():
    graph = ppo.graph(ppo.PPO(sampling=Sampling(max_new_tokens=256)))
    plan = make_plan(graph, num_devices=8, offloaded=("reference", "reward"))
    roles = roles_of(graph, plan)
    # So many completions that the rollout takes more than the training.
    work = Work(num_rows=256, width=264, prompt_width=8)

    def reloads_before_rollout(limit):
        steps = [
            moment.step
            for moment in memory_account(
                graph, plan, roles, work, limit_bytes=limit
            ).moments
        ]
        first = next(i for i, s in enumerate(steps) if "rollout" in str(s))
        return sum(isinstance(s, Reload | Move) for s in steps[:first])

    roomy = memory_account(graph, plan, roles, work, limit_bytes=1 << 40)
    assert reloads_before_rollout(1 << 40) == 2
    tight = int(roomy.peak_bytes.max()) - 1
    assert memory_account(graph, plan, roles, work, limit_bytes=tight).fits
    assert reloads_before_rollout(tight) < 2


def test_streamed_moments_are_counted_on_the_host():
    graph = sft.graph(sft.SFT())
    plan = make_plan(graph, num_devices=8, allocation="f8")
    optimizer = OptimizerConfig(offload=True)
    whole = memory_account(graph, plan, roles_of(graph, plan), WORK)
    streamed = memory_account(
        graph, plan, roles_of(graph, plan, optimizer=optimizer), WORK
    )
    assert not whole.resting_host_bytes.any()
    # Two moments leave, one array of masters stays.
    assert (3 * streamed.resting_bytes == whole.resting_bytes).all()
    assert (streamed.resting_host_bytes == 2 * streamed.resting_bytes).all()
