"""What the processes of `executor_test.py` and `trainer_test.py` do."""

import contextlib
import os
import pathlib
import signal

import jax
import numpy as np

from realjax.runtime import cluster
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.console import Console
from realjax.runtime.measures import to_numbers
from realjax.runtime.run import prepare
from realjax.runtime.run_config import EvaluationConfig
from realjax.runtime.trainer import Trainer
from tests.e2e import tiny_ppo
from tests.runtime import small_runs

# Of 8 devices: the rollout is in the first half, the reference in the second, and both
# train over all. With four processes of 2 devices, reward and reference have one each.
PLAN = {
    "rollout": "t4@0-3",
    "reward": "t2@6-7",
    "reference": "d2@4-5",
    "value": "f2t2@0-3",
    "advantages": "d4@1-4",
    "train_policy": "d2f4@0-7",
    "train_critic": "f2t2@4-7",
}


def tiny_steps(num_steps=2, offload=()):
    """Steps of the tiny PPO; what this process saw of them."""
    executor = tiny_ppo.make_executor(tiny_ppo.hyperparameters(), PLAN, offload=offload)
    found = []
    for step in range(1, num_steps + 1):
        metrics, buffer = executor.run(tiny_ppo.prompts_of(step), step=step)
        executor.watch.wait()
        numbers = cluster.merge(f"numbers/{step}", to_numbers(metrics))
        tokens = executor.calls.fetch(buffer, "tokens")["tokens"]
        found.append({"numbers": numbers, "tokens": tokens.tolist()})
    here = [
        name
        for name, place in executor.plan.calls.items()
        if any(
            jax.devices()[index].process_index == jax.process_index()
            for index in place.allocation.devices
        )
    ]
    events = [
        [event.name, event.kind, event.start, event.end]
        for event in executor.watch.timeline.events
    ]
    executor.close()
    cluster.barrier("done")
    return {
        "steps": found,
        "num_runs": executor.calls.num_runs,
        "here": here,
        "events": events,
        "crossed_bytes": executor.traffic.as_dict("").get("crossed_bytes", 0),
    }


def check_equal(found, wanted):
    """Two runs drew the same tokens and measured the same, but for rounding."""
    for mine, theirs in zip(found["steps"], wanted["steps"], strict=True):
        np.testing.assert_array_equal(mine["tokens"], theirs["tokens"])
        assert mine["numbers"].keys() == theirs["numbers"].keys()
        for name, value in mine["numbers"].items():
            np.testing.assert_allclose(
                value, theirs["numbers"][name], rtol=2e-4, atol=1e-5, err_msg=name
            )


def small_run(folder, workdir, allocation, stop_after=0):
    """Trains on answers; process 1 alone gets a signal after some steps, if any.

    Returns what was measured, whether it finished, and the rows that were read here.
    """
    folder = pathlib.Path(folder)
    config = small_runs.sft_config(
        folder,
        allocation=allocation,
        steps=4,
        evaluation=EvaluationConfig(),
        checkpoint=CheckpointConfig(keep=2),
    )
    run = prepare(config)
    trainer = Trainer(run, pathlib.Path(workdir), Console(is_quiet=True))
    agree = trainer._agree

    def agree_and_stop(numbers):
        if trainer.step == stop_after and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return agree(numbers)

    trainer._agree = agree_and_stop
    with contextlib.closing(trainer):
        result = trainer.train()
    columns = {name: values.tolist() for name, values in result.metrics.items()}
    return {
        "metrics": columns,
        "is_finished": result.is_finished,
        "num_rows_read": run.train_data.num_rows_read,
        "step": trainer.step,
    }


def stop_and_go_on(folder, workdir, allocation):
    """Two runs in one folder: the first is stopped after two steps."""
    return [
        small_run(folder, workdir, allocation, stop_after=2),
        small_run(folder, workdir, allocation),
    ]
