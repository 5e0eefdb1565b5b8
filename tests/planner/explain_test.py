"""Tests of `realjax/planner/explain.py`: why a call has no other allocation."""

import functools

import pytest

from realjax.parallel.allocation import Allocation
from realjax.planner.explain import (
    Parts,
    alternative,
    alternatives,
    refusal,
    signed,
)
from tests.planner import plan_spaces

ALLOCATIONS = {
    "rollout": "d4@0-3",
    "reward": "d2@0-1",
    "reference": "d2@2-3",
    "value": "d2@0-1",
    "train_policy": "f2@0-1",
    "train_critic": "f2@2-3",
}


@functools.cache
def space():
    return plan_spaces.space_of("4xh100")


@functools.cache
def plan():
    return plan_spaces.numbers_of(space(), ALLOCATIONS)


def test_a_step_is_the_sum_of_its_parts():
    found = alternative(space(), plan(), "rollout")
    assert sum(found.parts) == pytest.approx(found.seconds)
    assert found.allocation == Allocation.parse("d4@0-3")
    # Both calls that train run beside each other.
    assert found.parts.waiting < 0


def test_parts_say_what_differs():
    assert str(Parts(2.0, 3.0, 0.1, -1.0).less(Parts(1.5, 3.0, 0.2, 0.0))) == (
        "the call itself +0.5 s, other calls +0 s, copies −0.1 s, waiting −1 s"
    )
    assert signed(-1e-5) == "+0 s"


def test_alternatives_differ_in_one_call_and_the_fastest_comes_first():
    found = alternatives(space(), plan(), "rollout")
    index = space().names.index("rollout")
    assert len({str(one.allocation) for one in found}) == len(found) > 5
    for one in found:
        rest = (*one.plan[:index], *one.plan[index + 1 :])
        assert rest == (*plan()[:index], *plan()[index + 1 :])
    fitting = [one.seconds for one in found if one.is_fitting]
    assert fitting == sorted(fitting)
    mine = alternative(space(), plan(), "rollout")
    assert found[0].seconds <= mine.seconds
    with pytest.raises(
        ValueError, match=r"no call 'rolout'.*there are rollout, reward"
    ):
        alternatives(space(), plan(), "rolout")


def refused(name, text, **changes):
    roles = plan_spaces.roles_of(space().graph, **changes)
    allocation = Allocation.parse(text)
    return refusal(space(), roles, plan_spaces.WORK, name, allocation)


def test_what_forbids_an_allocation_is_named():
    assert refused("rollout", "d4@0-3") == ""
    assert refused("train_policy", "s4@0-3") == ""
    assert "a stage would wait" in refused("rollout", "s4@0-3")
    assert refused("rollout", "d8") == "there is no device 7: 1x4xh100 has 4"
    assert "no aligned range" in refused("rollout", "d2@1-2")
    assert "no aligned range" in refused("rollout", "d3@0-2")
    assert "num_heads=6" in refused("rollout", "t4@0-3", num_heads=6, num_kv_heads=2)
    assert "2 layers for 4 stages" in refused("value", "s4@0-3", num_layers=2)
