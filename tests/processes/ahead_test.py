"""Rollouts a step ahead in two processes: one draws while the other trains."""

import pytest

from tests.processes import drawing
from tests.processes.launch import launch

pytestmark = pytest.mark.slow  # Two programs compile in every process, four times.


@pytest.fixture(scope="module")
def ahead(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead")
    return run(1, folder), folder


def run(staleness, folder):
    return launch(
        drawing.traced_steps, staleness, str(folder), num_processes=2, num_devices=1
    )


def spans(events, name):
    """Begin and end of a call, by step."""
    return {step: (start, end) for n, step, start, end in events if n == name}


def are_at_once(one, other):
    return max(one[0], other[0]) < min(one[1], other[1])


def test_a_rollout_of_the_next_step_runs_beside_the_training_of_this_one(ahead):
    (sampler, trainer), folder = ahead
    rollouts = spans(sampler["events"], "rollout")
    trainings = spans(trainer["events"], "train_policy")
    steps = range(1, drawing.NUM_STEPS + 1)
    assert sorted(rollouts) == sorted(trainings) == list(steps)
    # The first step compiles, the last draws nothing.
    for step in steps[1:-1]:
        assert are_at_once(rollouts[step + 1], trainings[step]), step
        assert not are_at_once(rollouts[step], trainings[step])
    assert {path.name for path in folder.iterdir()} == {
        "timeline0.json",
        "timeline1.json",
    }


def test_on_policy_nothing_is_trained_while_something_is_sampled(tmp_path):
    sampler, trainer = run(0, tmp_path)
    rollouts = spans(sampler["events"], "rollout")
    trainings = spans(trainer["events"], "train_policy")
    assert not any(
        are_at_once(rollout, training)
        for rollout in rollouts.values()
        for training in trainings.values()
    )


def test_each_process_runs_its_calls_and_both_know_what_was_sampled(ahead):
    (sampler, trainer), _ = ahead
    assert sampler["num_runs"]["train_policy"] == 0
    assert trainer["num_runs"]["rollout"] == 0
    assert trainer["num_runs"]["train_policy"] == drawing.NUM_STEPS
    assert sampler["tokens"] == trainer["tokens"]
    assert sampler["numbers"] == trainer["numbers"]
    assert trainer["staleness"] == [0, *[1] * (drawing.NUM_STEPS - 1)]


def test_a_run_of_two_processes_goes_on_with_what_waits(tmp_path):
    found = launch(
        drawing.stopped_and_resumed, str(tmp_path), num_processes=2, num_devices=1
    )
    for whole, resumed in found:
        assert whole["is_finished"] and resumed["is_finished"]
        assert resumed["text"].count("resumed from the checkpoint of step 2") == 1
        assert resumed["metrics"] == whole["metrics"]
