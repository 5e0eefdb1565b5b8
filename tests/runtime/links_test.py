"""Tests of `realjax/runtime/links.py`."""

import contextlib

import jax

from realjax.algorithms import ppo
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import home_places
from realjax.realloc.links import check_links
from realjax.runtime.executor import Executor
from realjax.runtime.links import plan_links
from realjax.runtime.parameters import ParameterStore
from realjax.testing import tiny_tokenizer
from tests.e2e.tiny_ppo import MODEL, roles_of


def links_of(**allocations):
    graph = ppo.graph(ppo.PPO())
    plan = make_plan(graph, num_devices=8, allocation="d1@0", allocations=allocations)
    roles = roles_of(graph, plan, (), MODEL)
    homes = home_places(graph, plan, dict.fromkeys(roles, "float32"))
    executor = Executor(
        graph,
        plan,
        roles,
        ParameterStore({name: role.model for name, role in roles.items()}, homes),
        tokenizer=tiny_tokenizer(),
        optimizer_steps=dict.fromkeys(graph.calls, 1),
        seed=0,
        width=24,
    )
    with contextlib.closing(executor):
        return plan_links(executor, 16, 24)


def test_one_device_has_no_link():
    assert links_of() == set()


def test_parameters_and_batches_of_a_plan_use_its_links_both_ways():
    # The policy trains on 0 and samples on 2 and 3, each a half of the heads; what they
    # drew comes back to 0, from 2 alone where both have it all.
    found = links_of(rollout="t2@2-3", reference="d1@5")
    to_rollout = {(0, 2), (0, 3)}
    assert to_rollout <= found
    assert found - to_rollout <= {(2, 0), (3, 0), (2, 5), (3, 5), (5, 0)}
    assert (5, 0) in found and {(2, 5), (3, 5)} & found
    check_links(found)
    assert len(jax.devices()) == 8
