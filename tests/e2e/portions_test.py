"""What follows a rollout on portions, and rollouts that go on in the next step."""

import dataclasses

import numpy as np
import pytest

from realjax.functions import Delivery
from realjax.functions.score import RewardFunction
from realjax.rl import KLControl
from tests.e2e.tiny_ppo import (
    NEW_TOKENS,
    PLAN,
    SIZE,
    hyperparameters,
    make_executor,
    prompts_of,
    run_step,
)


def length_of(prompts, completions):
    """A score by the text alone."""
    return [float(len(text)) for text in completions]


def first_step(**changes):
    """The first step of a tiny PPO, and what was running when."""
    executor = make_executor(hyperparameters(**changes), PLAN)
    try:
        found = run_step(executor, 1)
        return found, executor.watch.timeline.events, dict(executor.calls.num_runs)
    finally:
        executor.close()


def assert_same_step(found, expected):
    assert found.made.keys() == expected.made.keys()
    for key, values in expected.made.items():
        if values.dtype == np.float32:
            np.testing.assert_allclose(found.made[key], values, atol=1e-4, err_msg=key)
        else:
            np.testing.assert_array_equal(found.made[key], values, err_msg=key)
    assert found.numbers.keys() == expected.numbers.keys()
    for name, value in expected.numbers.items():
        assert found.numbers[name] == pytest.approx(value, abs=2e-3, rel=1e-3), name


@pytest.fixture(scope="module")
def whole():
    return first_step(completions_per_prompt=2)


@pytest.mark.parametrize("portions", (4, pytest.param(3, marks=pytest.mark.slow)))
def test_portions_change_nothing_of_a_step(whole, portions):
    found, events, runs = first_step(
        completions_per_prompt=2, delivery=Delivery(portions=portions)
    )
    expected, events_of_whole, _ = whole
    assert_same_step(found, expected)
    # Reward and reference are on devices of their own; the value is not.
    assert runs["reward"] == runs["reference"] == portions
    assert runs["value"] == 1

    def first_begin(events, name):
        return min(event.start for event in events if event.name == name)

    def last_end(events, name):
        return max(event.end for event in events if event.name == name)

    for name in ("reward", "reference"):
        assert first_begin(events, name) < last_end(events, "rollout")
        assert first_begin(events_of_whole, name) >= last_end(
            events_of_whole, "rollout"
        )


@pytest.mark.slow
def test_functions_of_the_text_score_portions_alike():
    changes = {
        "completions_per_prompt": 2,
        "rewards": (RewardFunction(fn=length_of),),
        "kl": KLControl(coef=0.1),
    }
    expected, _, _ = first_step(**changes)
    found, _, runs = first_step(**changes, delivery=Delivery(portions=4))
    assert_same_step(found, expected)
    assert runs["reward"] == 4
    assert len(set(found.made["scores"].tolist())) > 2


def carried_steps(num_steps, *, token_budget, num_carried=SIZE):
    """Steps whose policy never changes: the batch and the rollout of each."""
    hp = hyperparameters(
        completions_per_prompt=2,
        delivery=Delivery(token_budget=token_budget, num_carried=num_carried),
        max_ratio=1e-9,  # No minibatch is this near: all are skipped.
    )
    # Few slots: some rows wait while others end.
    executor = make_executor(hp, PLAN, rows={"rollout": 8})
    steps = []
    try:
        for step in range(1, num_steps + 1):
            batch = prompts_of(step)
            batch = dataclasses.replace(batch, ids=batch.ids + step * SIZE)
            _, buffer = executor.run(batch, step=step)
            executor.watch.wait()
            made = {
                key: buffer.host(key)
                for key in ("tokens", "completion_mask", "old_logprobs")
            }
            steps.append((buffer.ids, buffer.samples, made))
        carry = executor.calls.generating.carries.get("rollout")
        return steps, [] if carry is None else carry.ids[carry.ids >= 0].tolist()
    finally:
        executor.close()


def by_row(steps):
    """Completions by (data id, sample)."""
    found = {}
    for ids, samples, made in steps:
        for row in np.flatnonzero(ids >= 0):
            key = (int(ids[row]), int(samples[row]))
            assert key not in found
            mask = made["completion_mask"][row]
            assert mask.any()
            found[key] = (
                made["tokens"][row].tolist(),
                made["old_logprobs"][row][mask],
            )
    return found


def test_groups_that_do_not_end_within_the_budget_go_on_in_the_next_step():
    expected, _ = carried_steps(3, token_budget=0, num_carried=0)
    steps, left = carried_steps(3, token_budget=SIZE * 2 * NEW_TOKENS // 4)
    whole, found = by_row(expected), by_row(steps)
    assert left  # Some go on after the last step.
    assert (steps[0][0] < 0).any()  # The first has fewer groups than it was given.
    # Each group comes once, in this step or a later one, with the tokens that it would
    # have had at once, as the policy stayed the same.
    assert {key for key, _ in found} | set(left) == {key for key, _ in whole}
    for key, (tokens, logprobs) in found.items():
        assert tokens == whole[key][0]
        np.testing.assert_allclose(logprobs, whole[key][1], atol=2e-5)
    late = [id for ids, _, _ in steps[1:] for id in ids if id >= 0]
    assert any(id < 2 * SIZE for id in late)


@pytest.mark.slow
def test_no_more_groups_go_on_than_there_is_room_for():
    steps, left = carried_steps(2, token_budget=1, num_carried=4)
    assert len(left) <= 4
    assert len({id for ids, _, _ in steps for id in ids if id >= 0}) >= 2 * SIZE - 4
