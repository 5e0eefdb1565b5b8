"""Tests of `realjax/planner/search.py` and `space.py`: PPO on up to 8 devices."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import ppo, sft
from realjax.functions.role import Role, RoleConfig
from realjax.models.families import llama
from realjax.planner import search as search_lib
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Coefficients
from realjax.planner.exhaustive import best_of_all
from realjax.planner.memory import Work
from realjax.planner.search import lower_bound, search, tight_lower_bound
from realjax.planner.simulate import price
from realjax.planner.space import Lengths, make_space
from realjax.planner.strategies import Rules
from realjax.rl import Sampling


@functools.cache
def space_of(cluster, size="3.2-1b", algorithm=ppo, memory=None, rules=None):
    if algorithm is ppo:
        hp = ppo.PPO(sampling=Sampling(max_new_tokens=256), minibatches=4)
    else:
        hp = algorithm.HYPERPARAMETERS()
    graph = algorithm.graph(hp)
    roles = {}
    for name in graph.roles:
        head = "scalar" if name in ("reward", "critic") else "language"
        roles[name] = Role(
            name=name,
            config=RoleConfig(),
            model=dataclasses.replace(llama.size(size), head=head),
            eos_ids=(2,),
            dtype="bfloat16",
            is_trained=name in graph.trained_roles,
        )
    machine = Cluster.load(cluster)
    if memory is not None:
        device = dataclasses.replace(machine.device, memory_bytes=int(memory))
        machine = dataclasses.replace(machine, device=device)
    return make_space(
        graph,
        roles,
        Work(num_rows=64, width=512, prompt_width=256),
        Lengths(prompt_tokens=256, new_tokens=256, most_new_tokens=256),
        machine,
        Coefficients(),
        microbatch_tokens=8192,
        rules=rules,
    )


def all_plans(space):
    counts = (range(len(options)) for options in space.options)
    return jnp.asarray(list(itertools.product(*counts)), jnp.int32)


def test_the_search_finds_the_best_of_all_plans():
    space = space_of("2xh100", rules=Rules(varies=False))
    plans = all_plans(space)
    assert len(plans) == space.num_plans > 1000
    found = price(space.problem, plans)
    fits = np.asarray(found.memory_bytes) <= float(space.problem.memory_bytes)
    best = np.where(fits, np.asarray(found.seconds), np.inf).min()
    plan, seconds = best_of_all(space)
    assert seconds == best
    assert float(price(space.problem, jnp.asarray([plan])).seconds[0]) == best
    for seed in range(3):
        searched = search(space, seed=seed, most_moves=128)
        assert searched.seconds == pytest.approx(best, rel=1e-6)
        assert searched.lower_bound <= best
        assert searched.gap >= 0


def test_a_search_by_moves_depends_on_its_seed_alone():
    space = space_of("4xh100")
    first, again = (search(space, seed=3, most_moves=128) for _ in range(2))
    assert (first.plan, first.seconds) == (again.plan, again.seconds)


def test_a_plan_given_is_never_made_worse():
    space = space_of("4xh100")
    best = search(space, most_moves=256)
    after = search(space, seed=9, most_moves=64, starts=[best.plan])
    assert after.seconds <= best.seconds


def test_no_plan_takes_less_than_the_lower_bound():
    space = space_of("4xh100")
    generator = np.random.default_rng(0)
    columns = [generator.integers(0, len(o), 5000) for o in space.options]
    found = price(space.problem, jnp.asarray(np.stack(columns, axis=1)))
    assert float(found.seconds.min()) >= lower_bound(space)


def test_a_chain_that_the_next_step_overlaps_is_no_bound():
    # The critic's training ends what a step computes, and the next rollout need not
    # wait for it: only the way to the policy's training is a bound.
    space = space_of("4xh100")
    fastest = np.asarray(space.problem.options.seconds)
    fastest = np.where(fastest > 0, fastest, np.inf).min(1).tolist()
    seconds = dict(zip(space.names, fastest, strict=True))
    to_policy = seconds["rollout"] + seconds["train_policy"]
    to_policy += max(seconds[name] for name in ("reward", "reference", "value"))
    assert search_lib._longest_way(space) == pytest.approx(to_policy)


def test_a_bound_by_places_is_tighter_than_one_by_calls():
    space = space_of("2xh100", rules=Rules(varies=False))
    tight = tight_lower_bound(space)
    assert lower_bound(space) * (1 - 1e-6) <= tight <= best_of_all(space)[1]


def test_plans_that_do_not_fit_are_not_proposed():
    roomy = search(space_of("4xh100"), most_moves=256)
    tight = 0.75 * roomy.memory_bytes
    space = space_of("4xh100", memory=tight)
    found = search(space, most_moves=256)
    assert found.memory_bytes <= tight
    assert found.seconds >= roomy.seconds


def test_what_fits_nowhere_is_said_with_its_bytes():
    with pytest.raises(
        ValueError, match=r"'train_policy' fits no devices.*GiB.*optimizer.offload"
    ):
        space_of("2xh100", size="3.1-8b", memory=20e9)


def test_an_option_is_found_by_its_allocation():
    space = space_of("4xh100")
    found = search(space, most_moves=64)
    for number, (name, allocation) in zip(
        found.plan, space.chosen(found.plan).items(), strict=True
    ):
        options = space.options[space.names.index(name)]
        one, same = options[space.number_of(name, allocation)], options[number]
        assert one.allocation == same.allocation
        assert one.seconds <= same.seconds  # The fastest of those that lie alike.
    wrong = dataclasses.replace(next(iter(space.chosen(found.plan).values())))
    wrong = dataclasses.replace(wrong, data=3, fsdp=1, tensor=1, devices=(0, 1, 2))
    with pytest.raises(ValueError, match="'rollout' cannot have the allocation d3"):
        space.number_of("rollout", wrong)


def test_any_graph_will_do():
    found = search(space_of("8xh100", algorithm=sft), most_moves=64)
    assert len(found.plan) == 1
    assert found.gap < 0.01  # One call: the best option is the bound.
