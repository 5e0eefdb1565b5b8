"""Tests of `realjax/planner/memory.py`."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from realjax.algorithms import ppo, sft
from realjax.dataflow import DataflowGraph, call
from realjax.dataflow.account import DoesNotFitError
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import Move, Reload
from realjax.functions import Generate, Infer, Train
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import Role, RoleConfig
from realjax.functions.train import TrainProgram
from realjax.models import transformer
from realjax.models.config import ModelConfig
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import padded_for, parameter_shardings
from realjax.planner import Work, fit_pools, memory_account, memory_sizes
from realjax.rl import Sampling
from realjax.rollout.engine import Engine
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


def generating(*others):
    """A graph that samples up to 16 tokens, and of more calls that do."""
    generate = Generate(sampling=Sampling(max_new_tokens=16))
    renamed = {
        name: call("policy", generate, **{w: f"{name}_{w}" for w in generate.writes})
        for name in others
    }
    return DataflowGraph(rollout=call("policy", generate), **renamed)


@pytest.mark.parametrize(
    ("strategy", "kv_dtype", "pages"),
    [("d1", "", 0), ("t2", "bfloat16", 0), ("d2t2", "int8", 0), ("d2t2", "", 40)],
)
def test_a_pool_is_counted_to_the_byte_and_held_all_the_time(strategy, kv_dtype, pages):
    graph = generating()
    plan = make_plan(
        graph,
        num_devices=8,
        allocation=strategy,
        pages={"rollout": pages},
        kv_dtype={"rollout": kv_dtype},
    )
    roles, place = roles_of(graph, plan), plan.calls["rollout"]
    role = roles["policy"]
    engine = Engine(
        role.program(place.allocation),
        make_mesh(place.allocation),
        Sampling(max_new_tokens=16),
        eos_ids=role.eos_ids,
        width=WORK.width,
        settings=plan.rollout_settings("rollout", num_rows=WORK.num_rows),
    )
    pool = engine.programs.make_pool(**engine.pool_shape)
    held = memory_sizes(graph, plan, roles, WORK).pools["rollout"]
    assert held == bytes_on(jax.devices()[0], pool)
    found = memory_account(graph, plan, roles, WORK)
    assert found.moments
    for moment in found.moments:
        assert (moment.held["pool of rollout"] == held).all()
    parameters = memory_sizes(graph, plan, roles, WORK).parts["policy", "parameters"]
    assert (found.resting_bytes == held + parameters).all()


def test_a_pool_has_room_for_the_longest_row_of_every_slot():
    graph = generating()
    plan = make_plan(graph, num_devices=8)
    roles = roles_of(graph, plan)
    work = Work(num_rows=64, width=4104, prompt_width=8)
    sizes = memory_sizes(graph, plan, roles, work)
    model = roles["policy"].model
    token = 2 * 4 * model.num_layers * model.num_kv_heads * model.head_dim
    # 8 rows a device; 4103 tokens are in 129 pages of 32, and a row may hold one more.
    assert sizes.pools["rollout"] == 8 * 130 * 32 * token


def pages_of(plan):
    return {name: place.pages for name, place in plan.calls.items()}


class Fitted:
    """PPO on eight devices, and its pool where the devices have less than it takes."""

    def __init__(self, **plan):
        self.graph = ppo.graph(ppo.PPO(sampling=Sampling(max_new_tokens=256)))
        self.plan = make_plan(self.graph, num_devices=8, **plan)
        self.roles = roles_of(self.graph, self.plan)
        self.work = Work(num_rows=256, width=264, prompt_width=8)
        self.account = memory_account(
            self.graph, self.plan, self.roles, self.work, limit_bytes=1
        )
        self.peak = int(self.account.peak_bytes.max())
        sizes = memory_sizes(self.graph, self.plan, self.roles, self.work)
        self.pool = sizes.pools["rollout"]

    def fit(self, limit):
        shape = self.graph, self.plan, self.roles, self.work
        return fit_pools(*shape, limit_bytes=limit)

    def account_of(self, plan, limit):
        shape = self.graph, plan, self.roles, self.work
        return memory_account(*shape, limit_bytes=limit)


def test_a_pool_that_fits_is_left_whole():
    ppo_run = Fitted()
    assert ppo_run.fit(ppo_run.peak) == ppo_run.plan


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_pool_takes_what_the_rest_leaves_free(share):
    ppo_run = Fitted(allocations={"rollout": "d4t2"})
    limit = ppo_run.peak - int(share * ppo_run.pool)
    plan = ppo_run.fit(limit)
    (pages,) = filter(None, pages_of(plan).values())
    assert pages == plan.calls["rollout"].pages
    assert pages % 4 == 0  # As many for each row shard.
    found = ppo_run.account_of(plan, limit)
    assert found.fits
    # Not a page less than there is room for.
    left = limit - int(found.peak_bytes.max())
    assert left < ppo_run.pool * 4 / full_pages(ppo_run)
    assert pages / full_pages(ppo_run) == pytest.approx(1 - share, abs=0.01)


def full_pages(run):
    """64 rows a row shard, of 263 tokens in 9 pages of 32 and one more."""
    assert str(run.plan.calls["rollout"].allocation).startswith("d4t2")
    return 4 * 64 * 10


def test_a_pool_without_room_for_a_row_is_left_to_be_refused():
    ppo_run = Fitted(allocations={"rollout": "d4t2"})
    # 9 of 10 x 64 pages are too few for one row.
    for pages, is_enough in ((10, True), (9, False)):
        limit = ppo_run.peak - ppo_run.pool + ppo_run.pool * pages // (10 * 64)
        plan = ppo_run.fit(limit)
        assert pages_of(plan)["rollout"] == (4 * pages if is_enough else 0)
        found = ppo_run.account_of(plan, limit)
        assert found.fits == is_enough
    with pytest.raises(DoesNotFitError, match=r"pool of rollout.*fewer pages"):
        found.check()


def test_pages_that_a_plan_gives_are_left_alone():
    ppo_run = Fitted(pages={"rollout": 64 * 10})
    assert ppo_run.fit(ppo_run.peak - 1) == ppo_run.plan


def test_pools_on_devices_of_their_own_give_way_by_themselves():
    graph = generating("greedy")
    places = {"rollout": "d2@0-1", "greedy": "d4@4-7"}
    plan = make_plan(graph, num_devices=8, allocations=places)
    roles, work = roles_of(graph, plan), Work(num_rows=64, width=4104, prompt_width=8)
    found = memory_account(graph, plan, roles, work, limit_bytes=1)
    # Of 32 rows a device and of 16: only the first are too many.
    sizes = memory_sizes(graph, plan, roles, work)
    assert sizes.pools["rollout"] == 2 * sizes.pools["greedy"]
    limit = int(found.peak_bytes.max()) - sizes.pools["rollout"] // 4
    fitted = fit_pools(graph, plan, roles, work, limit_bytes=limit)
    assert memory_account(graph, fitted, roles, work, limit_bytes=limit).fits
    assert pages_of(fitted)["greedy"] == 0
    assert pages_of(fitted)["rollout"] == 2 * 32 * 130 * 3 // 4


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


# The same of rollouts: a launch of decoding, or a chunk of prompts where that is more.
@pytest.mark.parametrize(
    "strategy, slots, prompt_width, max_new_tokens, compiled",
    (
        ("d1", 256, 1024, 1024, 2.10),
        ("d1", 64, 1024, 3072, 1.06),
        ("d1", 256, 64, 64, 0.38),
        ("d1", 4, 1024, 3072, 0.76),
        ("t8", 256, 1024, 1024, 0.26),
        ("f8", 256, 1024, 1024, 1.12),
    ),
)
def test_generating_with_an_8b_model_is_estimated_as_xla_finds_it(
    strategy, slots, prompt_width, max_new_tokens, compiled
):
    sampling = Sampling(max_new_tokens=max_new_tokens)
    graph = DataflowGraph(rollout=call("policy", Generate(sampling=sampling)))
    plan = make_plan(graph, num_devices=8, allocation=strategy, rows={"rollout": slots})
    role = role_8b(plan.calls["rollout"].allocation)
    width = prompt_width + max_new_tokens
    work = Work(num_rows=256, width=width, prompt_width=prompt_width)
    sizes = memory_sizes(graph, plan, {"policy": role}, work)
    assert sizes.working["rollout"] / 2**30 == pytest.approx(compiled, rel=0.25)


def test_the_pool_of_an_8b_model_is_as_large_as_its_program_says():
    # 256 rows of up to 2048 tokens on one device: 2047 are in 64 pages of 32, and a
    # row may hold one more. The program that decodes gives 65 GiB back in place.
    graph = DataflowGraph(
        rollout=call("policy", Generate(sampling=Sampling(max_new_tokens=1024)))
    )
    plan = make_plan(graph, num_devices=1)
    role = role_8b(plan.calls["rollout"].allocation)
    work = Work(num_rows=256, width=2048, prompt_width=1024)
    sizes = memory_sizes(graph, plan, {"policy": role}, work)
    assert sizes.pools["rollout"] == 256 * 65 * 32 * 2 * 2 * 32 * 8 * 128
    assert sizes.pools["rollout"] / 2**30 == pytest.approx(65.0)


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
    work = Work(num_rows=2048, width=264, prompt_width=8)

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
