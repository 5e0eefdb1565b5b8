"""Tests of `realjax/planner/stored.py`, and of what one call takes alone."""

import dataclasses

import pytest

from realjax.algorithms import ppo
from realjax.dataflow.plan import CallPlan, ExecutionPlan, make_plan
from realjax.dataflow.schedule import Place
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import Role, RoleConfig
from realjax.models.transformer import abstract_parameters
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import abstract_mesh
from realjax.parallel.sharding import bytes_per_device, padded_for
from realjax.planner.memory import Work, call_bytes, memory_sizes
from realjax.planner.stored import cut_bytes, fitted, parameter_bytes
from realjax.rl import Sampling
from realjax.testing import tiny_model

WORK = Work(num_rows=16, width=32, prompt_width=8)


def graph_and_roles(vocab_size=64, **config):
    graph = ppo.graph(ppo.PPO(sampling=Sampling(max_new_tokens=24)))
    model = dataclasses.replace(tiny_model(num_layers=4), vocab_size=vocab_size)
    return graph, {
        name: Role(
            name=name,
            config=RoleConfig(**config),
            model=dataclasses.replace(
                model, head="scalar" if name in ("reward", "critic") else "language"
            ),
            eos_ids=(1,),
            dtype="bfloat16",
            is_trained=name in graph.trained_roles,
        )
        for name in graph.roles
    }


@pytest.mark.parametrize("strategy", ["d4t2", "f8", "f4t2+zero1", "s2f2t2"])
def test_remembered_bytes_are_those_of_the_shardings(strategy):
    allocation = Allocation.parse(strategy)
    model = padded_for(tiny_model(num_layers=4), [allocation])
    tree, mesh = abstract_parameters(model), abstract_mesh(allocation)
    options = allocation.options
    # Twice: the second time they are remembered.
    for _ in range(2):
        found = parameter_bytes(model, Place(allocation, "float32"))
        assert found == bytes_per_device(tree, mesh, options=options)
        assert parameter_bytes(model, Place(allocation, "bfloat16")) == found // 2
        assert cut_bytes(model, allocation) == bytes_per_device(tree, mesh)


def test_a_model_is_padded_only_where_it_does_not_divide():
    model = dataclasses.replace(tiny_model(num_layers=4), vocab_size=101)
    assert fitted(model, Allocation(data=8)) is model
    padded = fitted(model, Allocation(tensor=2, fsdp=2))
    assert padded.padded_vocab_size == 104
    # What is padded for more stays so.
    assert fitted(padded, Allocation(tensor=2)) is padded


def call_alone(graph, roles, name, call):
    plan = ExecutionPlan(graph=graph, calls={name: call}, microbatch_tokens=256)
    return call_bytes(graph, plan, name, roles, WORK.num_rows, WORK)


@pytest.mark.parametrize("strategy", ["d8", "f4t2", "s2f2t2"])
def test_a_call_alone_takes_what_it_takes_in_a_plan(strategy):
    graph, roles = graph_and_roles(vocab_size=104)
    allocations = {"rollout": "d4t2"}
    plan = make_plan(
        *(graph,),
        num_devices=8,
        allocation=strategy,
        allocations=allocations,
        microbatch_tokens=256,
    )
    sizes = memory_sizes(graph, plan, roles, WORK)
    for name in ("rollout", "reference", "train_policy"):
        alone = call_alone(graph, roles, name, plan.calls[name])
        assert alone.working == sizes.working[name]
        assert alone.batch == sizes.batch[name]
        assert alone.pool == sizes.pools.get(name, 0)
    parts = sizes.parts["policy", "parameters"], sizes.parts["policy", "optimizer"]
    assert call_alone(
        graph, roles, "train_policy", plan.calls["train_policy"]
    ).masters == sum(parts)


def test_a_call_is_counted_with_the_padding_that_its_allocation_needs():
    call = CallPlan(allocation=Allocation.parse("t4"))
    odd, even = (
        call_alone(*graph_and_roles(vocab_size), "reference", call)
        for vocab_size in (101, 104)
    )
    assert odd == even


def test_moments_in_host_memory_are_not_counted_on_devices():
    graph, roles = graph_and_roles()
    call = CallPlan(allocation=Allocation.parse("f8"))
    whole = call_alone(graph, roles, "train_policy", call)
    graph, roles = graph_and_roles(optimizer=OptimizerConfig(offload=True))
    streamed = call_alone(graph, roles, "train_policy", call)
    assert whole.masters == 3 * streamed.masters
