"""Rollouts a step ahead: which parameters draw, what waits, and what is saved."""

import json
import shutil

import numpy as np
import pytest

from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.measures import to_numbers
from realjax.runtime.parameters import VersionError
from realjax.runtime.run_config import EvaluationConfig
from tests.runtime import small_runs
from tests.runtime.small_rollouts import (
    ALGORITHM,
    SIZE,
    Even,
    graph,
    make_executor,
    prompts_of,
    run_steps,
)
from tests.runtime.small_runs import (
    check_same_arrays,
    check_same_metrics,
    saved_arrays,
    train,
)

NUM_STEPS = 3


class Trace:
    """Runs steps; notes which parameters, by their values, each call has read."""

    def __init__(self, executor):
        self.executor, self.calls, self.tokens = executor, [], []
        self._versions: list[np.ndarray] = []
        self._current = ("", 0)
        self._run, self._get = executor.calls.run, executor.store.get
        executor.calls.run, executor.store.get = self.run, self.get
        self._note()
        metrics = run_steps(executor, NUM_STEPS, self._after_step)
        executor.calls.run, executor.store.get = self._run, self._get
        self.numbers = [to_numbers(one) for one in metrics]

    def run(self, name, version, passing):
        self._current = name, passing.step
        return self._run(name, version, passing)

    def get(self, role, place, version):
        parameters = self._get(role, place, version)
        found = np.asarray(parameters["embedding"])
        (number,) = (
            number
            for number, known in enumerate(self._versions)
            if np.array_equal(known, found)
        )
        self.calls.append((*self._current, number))
        return parameters

    def _after_step(self, buffer):
        self.tokens.append(np.asarray(buffer.value("tokens")))
        self._note()

    def _note(self):
        """Version v is the policy after v updates."""
        masters = self.executor.store.at_home("policy")
        self._versions.append(np.asarray(masters["embedding"]))


def traced(staleness, rollout, train):
    executor = make_executor(
        graph(Even(staleness=staleness)), rollout=rollout, train=train
    )
    try:
        return Trace(executor)
    finally:
        executor.close()


@pytest.fixture(scope="module")
def on_policy():
    return traced(0, "d1@0", "d1@1")


@pytest.fixture(scope="module")
def ahead():
    return traced(1, "d1@0", "d1@1")


def test_on_policy_a_rollout_reads_what_its_own_step_trains(on_policy):
    assert on_policy.calls == [
        ("rollout", 1, 0),
        ("train_policy", 1, 0),
        ("rollout", 2, 1),
        ("train_policy", 2, 1),
        ("rollout", 3, 2),
        ("train_policy", 3, 2),
    ]


def test_a_step_ahead_a_rollout_reads_what_the_step_before_has_trained(ahead):
    assert ahead.calls == [
        ("rollout", 1, 0),  # There is no step before: the policy it begins with.
        ("train_policy", 1, 0),
        ("rollout", 2, 0),
        ("train_policy", 2, 1),
        ("rollout", 3, 1),
        ("train_policy", 3, 2),  # The last step draws nothing.
    ]


def test_the_ratio_says_how_far_the_trainer_is_from_what_has_sampled(on_policy, ahead):
    gap = "rollout_gap/kl"
    assert all(abs(numbers[gap]) < 1e-5 for numbers in on_policy.numbers)
    assert abs(ahead.numbers[0][gap]) < 1e-5
    assert all(abs(numbers[gap]) > 1e-4 for numbers in ahead.numbers[1:])
    staleness = [numbers["completions/staleness"] for numbers in ahead.numbers]
    assert staleness == [0, 1, 1]
    assert "completions/staleness" not in on_policy.numbers[0]


def test_a_step_trains_on_its_own_prompts_and_draws_of_its_own_keys(on_policy, ahead):
    # Both begin with one policy: their first steps are the same.
    np.testing.assert_array_equal(ahead.tokens[0], on_policy.tokens[0])
    assert not np.array_equal(ahead.tokens[1], on_policy.tokens[1])
    for step, tokens in enumerate(ahead.tokens, start=1):
        prompts = prompts_of(step)
        for row in range(SIZE):
            length = prompts.lengths[row]
            np.testing.assert_array_equal(
                tokens[2 * row, :length], prompts["prompts"][row, :length]
            )


@pytest.mark.slow
@pytest.mark.parametrize("place", ["d1@0", "d2@0-1"])
def test_on_the_devices_that_train_it_draws_first_and_the_same(ahead, place):
    found = traced(1, place, "d1@0")
    assert found.calls == [
        ("rollout", 1, 0),
        ("rollout", 2, 0),
        ("train_policy", 1, 0),
        ("rollout", 3, 1),
        ("train_policy", 2, 1),
        ("train_policy", 3, 2),
    ]
    for mine, theirs in zip(found.tokens, ahead.tokens, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_steps_out_of_order_and_parameters_set_in_between_are_refused():
    executor = make_executor(graph(Even(staleness=1)), rollout="d1@0", train="d1@1")
    with_next = lambda step: executor.run(
        prompts_of(step), step=step, ahead=prompts_of(step + 1)
    )
    with_next(1)
    with pytest.raises(ValueError, match=r"for step 2 and data \[16, 17, .*step 3"):
        executor.run(prompts_of(3), step=3)
    with pytest.raises(ValueError, match="this is step 2 with data"):
        executor.run(prompts_of(7), step=2)
    store = executor.store
    store.set_train_state("policy", store.train_state("policy"))
    with pytest.raises(VersionError, match=r"policy has been changed 2 times .* is 1"):
        with_next(2)
    executor.close()


def test_a_batch_ahead_is_for_graphs_that_run_ahead():
    executor = make_executor(graph(Even()), rollout="d1@0", train="d1@1")
    with pytest.raises(ValueError, match="no call of this pass runs a step ahead"):
        executor.run(prompts_of(1), step=1, ahead=prompts_of(2))
    executor.close()


# -- runs --------------------------------------------------------------------------


def run_config(folder, **changes):
    """Seven prompts, three at a time, over two epochs: five steps."""
    optimizer = OptimizerConfig(learning_rate=3e-2, schedule="constant")
    data = {
        split: str(folder / f"prompts_{split}.jsonl") for split in ("train", "valid")
    }
    return small_runs.sft_config(
        folder,
        **{
            "algorithm": "",
            "hp": {"staleness": 1},
            "roles": {"policy": small_runs.new_role(folder, optimizer)},
            "data": DataConfig(
                path=data["train"],
                valid_path=data["valid"],
                kind="prompts",
                max_prompt_length=8,
                batch_size=3,
            ),
            "allocation": "d1@1",
            "allocations": {"rollout": "d1@0"},
            "epochs": 2,
            "checkpoint": CheckpointConfig(every_steps=1, keep=20, export=False),
        }
        | changes,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    small_runs.write_data(folder)
    animals = ("cat", "dog", "mat")
    for split, count in {"train": 7, "valid": 3}.items():
        records = [{"prompt": f"the {animals[i % 3]} {i}"} for i in range(count)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"prompts_{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    result, _ = train(run_config(folder), workdir, algorithm=ALGORITHM)
    assert result.is_finished
    return result


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"every_steps": 1, "at_start": True}])
def test_a_resumed_run_goes_on_with_what_was_drawn_bit_for_bit(
    folder, whole, tmp_path, changes
):
    steps = int(whole.metrics["step"][-1])
    assert steps == 5
    # Seven prompts by three: the third and the last batch are of two epochs.
    assert whole.metrics["epoch"].tolist() == [0, 0, 0, 1, 1]
    assert whole.metrics["completions/staleness"].tolist() == [0, 1, 1, 1, 1]
    shutil.copytree(whole.workdir, tmp_path / "run")
    for step in range(3, steps + 1):
        shutil.rmtree(tmp_path / "run/checkpoints" / str(step))
    # An evaluation in between takes nothing of what waits, either.
    evaluation = EvaluationConfig(**{"at_start": False, "at_end": False} | changes)
    config = run_config(folder, evaluation=evaluation)
    resumed, text = train(config, tmp_path / "run", algorithm=ALGORITHM)
    assert "resumed from the checkpoint of step 2" in text
    if not changes:
        check_same_metrics(tmp_path / "run", whole.workdir)
    else:
        assert np.isfinite(resumed.metrics["eval/objective/scores"][2:-1]).all()
    check_same_arrays(
        saved_arrays(tmp_path / "run", steps), saved_arrays(whole.workdir, steps)
    )
    waiting = [n for n in saved_arrays(whole.workdir, 2) if n.startswith("ahead_")]
    assert sorted(waiting) == [
        "ahead_rollout/completion_mask",
        "ahead_rollout/is_truncated",
        "ahead_rollout/old_logprobs",
        "ahead_rollout/tokens",
    ]
    assert not [n for n in saved_arrays(whole.workdir, steps) if "ahead" in n]


@pytest.mark.slow
def test_what_waits_goes_on_with_another_allocation(folder, whole, tmp_path):
    shutil.copytree(whole.workdir, tmp_path / "run")
    for step in range(3, 6):
        shutil.rmtree(tmp_path / "run/checkpoints" / str(step))
    config = run_config(folder, allocation="f2@2-3", allocations={"rollout": "t2@4-5"})
    resumed, _ = train(config, tmp_path / "run", algorithm=ALGORITHM)
    assert resumed.is_finished
    # Step 3 trains on the same tokens; what it updates is the same but for rounding.
    for name in ("num_tokens", "objective/scores"):
        np.testing.assert_allclose(
            resumed.metrics[name][2], whole.metrics[name][2], rtol=1e-6
        )
    np.testing.assert_allclose(
        resumed.metrics["grad_norm"][2], whole.metrics["grad_norm"][2], rtol=1e-3
    )


@pytest.mark.slow
def test_a_run_that_is_made_longer_goes_on_from_its_last_step(folder, whole, tmp_path):
    shutil.copytree(whole.workdir, tmp_path / "run")
    config = run_config(folder, steps=7)
    longer, _ = train(config, tmp_path / "run", algorithm=ALGORITHM)
    # Nothing waits after a last step: the one after it is on-policy again.
    assert longer.metrics["completions/staleness"].tolist() == [0, 1, 1, 1, 1, 0, 1]
