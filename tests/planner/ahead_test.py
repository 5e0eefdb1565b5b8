"""Plans of a graph whose rollout runs a step ahead: beside the training, or in turn."""

import functools

import numpy as np
import pytest

from realjax.planner.explain import alternative
from realjax.planner.memory import memory_account
from realjax.planner.search import lower_bound, search
from realjax.planner.simulate import price_all
from realjax.planner.timeline import plan_timeline
from tests.planner import plan_spaces

PARTED = {
    "rollout": "d2@0-1",
    "reward": "d2@2-3",
    "reference": "d2@2-3",
    "value": "d2@2-3",
    "train_policy": "f2@2-3",
    "train_critic": "f2@2-3",
}
TOGETHER = PARTED | {"rollout": "d4@0-3"}


@functools.cache
def space(staleness):
    return plan_spaces.space_of("4xh100", staleness=staleness)


def account_of(plan):
    return memory_account(
        *(space(1).graph, plan, plan_spaces.roles_of(space(1).graph)),
        plan_spaces.WORK,
        limit_bytes=int(space(1).problem.memory_bytes),
    )


@functools.cache
def timeline(staleness):
    numbers = plan_spaces.numbers_of(space(staleness), PARTED)
    return plan_timeline(
        space(staleness), numbers, account_of(space(staleness).execution_plan(numbers))
    )


def seconds_of(staleness, allocations):
    plan = plan_spaces.numbers_of(space(staleness), allocations)
    return float(price_all(space(staleness).problem, np.asarray([plan]))[0][0])


def events(staleness):
    return {event.name: event for event in timeline(staleness).events}


def test_a_rollout_ahead_is_issued_last_and_what_it_takes_is_the_same():
    assert space(0).names[0] == space(1).names[-1] == "rollout"
    options = dict(zip(space(1).names, space(1).options, strict=True))
    for name, known in zip(space(0).names, space(0).options, strict=True):
        found = options[name]
        assert found[0].seconds == known[0].seconds
        assert found[0].allocation == known[0].allocation


def test_a_step_is_as_long_as_the_longer_of_rollout_and_the_rest():
    rollout = events(1)["rollout"]
    rest = [event for event in events(1).values() if 2 in event.devices]
    assert {"reference", "train_policy", "train_critic"} <= {e.name for e in rest}
    others = max(e.end for e in rest) - min(e.start for e in rest)
    copy = events(1)["copy of policy for rollout"]
    longest = max(rollout.end - copy.start, others)
    assert timeline(1).seconds == pytest.approx(longest, rel=1e-5)
    assert timeline(1).seconds < timeline(0).seconds
    assert timeline(1).details["rollout"] == "d2@0-1, a step ahead"


def test_it_runs_beside_the_training_with_a_copy_made_before():
    train, rollout = events(1)["train_policy"], events(1)["rollout"]
    assert max(train.start, rollout.start) < min(train.end, rollout.end)
    assert events(1)["copy of policy for rollout"].end <= train.start + 1e-6
    train, rollout = events(0)["train_policy"], events(0)["rollout"]
    assert train.start >= rollout.end


def test_on_devices_of_the_training_nothing_is_won():
    ahead, on_policy = (seconds_of(staleness, TOGETHER) for staleness in (1, 0))
    assert ahead == pytest.approx(on_policy, rel=1e-5)


def test_memory_of_a_plan_is_about_that_of_its_account():
    plan = plan_spaces.numbers_of(space(1), PARTED)
    priced = price_all(space(1).problem, np.asarray([plan]))[1][0]
    account = account_of(space(1).execution_plan(plan))
    assert priced == pytest.approx(float(account.peak_bytes.max()), rel=0.1)
    kinds = [moment.held for moment in account.moments]
    # On the rollout's devices: the batch that waits, and the one that is made.
    group = [devices[0] for devices in account.groups].index(0)
    first, last = kinds[0]["batch"][group], kinds[-1]["batch"][group]
    assert last == 2 * first > 0


def test_why_a_rollout_is_where_it_is_can_be_explained():
    plan = plan_spaces.numbers_of(space(1), PARTED)
    found = alternative(space(1), plan, "rollout")
    assert sum(found.parts) == pytest.approx(found.seconds)


@pytest.mark.slow
def test_a_search_parts_the_devices_and_finds_a_shorter_step():
    found = {
        staleness: search(space(staleness), most_moves=3000) for staleness in (0, 1)
    }
    assert found[1].seconds < found[0].seconds
    assert found[1].seconds >= lower_bound(space(1))
    chosen = space(1).chosen(found[1].plan)
    rollout, train = (set(chosen[n].devices) for n in ("rollout", "train_policy"))
    assert not rollout & train
