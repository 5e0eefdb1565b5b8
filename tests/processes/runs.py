"""What the processes of `executor_test.py` and `trainer_test.py` do."""

import contextlib
import gc
import os
import pathlib
import signal

import jax
import numpy as np

from realjax.planner import Work, memory_account
from realjax.runtime import cluster, plan_choice
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.console import Console
from realjax.runtime.measures import to_numbers
from realjax.runtime.run import prepare
from realjax.runtime.run_config import EvaluationConfig
from realjax.runtime.trainer import Trainer
from realjax.testing import tiny_model
from tests.e2e import tiny_ppo
from tests.runtime import small_runs


def tiny_steps(num_steps=2, offload=("reference", "policy")):
    """Steps of the tiny PPO; what this process saw of them.

    The rollout is in the first half of the devices, the reference in the second, and
    the policy trains over all; of four processes, reward and reference have one each.
    """
    executor = tiny_ppo.make_executor(
        tiny_ppo.hyperparameters(), tiny_ppo.PLAN, offload=offload
    )
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
    executor.close()
    del metrics, buffer
    gc.collect()
    live = {kind: live_by_device(kind) for kind in ("device", "pinned_host")}
    cluster.barrier("done")
    return {
        "steps": found,
        "num_runs": executor.calls.num_runs,
        "here": here,
        "live": live,
        "counted": counted_by_device(executor),
    }


def live_by_device(kind):
    """Bytes of all live arrays in one kind of memory, by index of the device."""
    buffers = {}
    for array in jax.live_arrays():
        if array.sharding.memory_kind == kind:
            for shard in array.addressable_shards:
                address = shard.data.unsafe_buffer_pointer()
                buffers[shard.device, address] = shard.data.nbytes
    found = {}
    for (device, _), size in buffers.items():
        index = str(jax.devices().index(device))
        found[index] = found.get(index, 0) + size
    return found


def counted_by_device(executor):
    """The same after a step, as the memory account has it, for the devices here."""
    account = memory_account(
        executor.graph,
        executor.plan,
        executor.programs.roles,
        Work(num_rows=tiny_ppo.SIZE, width=tiny_ppo.WIDTH, prompt_width=8),
    )
    resting = {
        "device": account.resting_bytes,
        "pinned_host": account.resting_host_bytes,
    }
    return {
        kind: {
            str(index): int(size)
            for group, size in zip(account.groups, sizes, strict=True)
            for index in group
            if jax.devices()[index].process_index == jax.process_index()
        }
        for kind, sizes in resting.items()
    }


def traced_steps(folder, num_steps=3):
    """PPO of a policy in process 0 and its reference, which is offloaded, in process 1.

    Returns the events of this process; the clock is one for all of a host.
    """
    first, second = "d1@0", "d1@1"
    plan = dict.fromkeys(("rollout", "train_policy"), first) | dict.fromkeys(
        ("reference", "reward", "value", "advantages", "train_critic"), second
    )
    # So large that the reload of 57 MB can be seen.
    model = tiny_model(width=384, num_layers=6, mlp_width=1536)
    executor = tiny_ppo.make_executor(
        tiny_ppo.hyperparameters(),
        plan,
        offload=("reference",),
        model=model,
        num_devices=2,
        fits=lambda _: True,
    )
    for step in range(1, num_steps + 1):
        metrics, _ = executor.run(tiny_ppo.prompts_of(step), step=step)
        executor.watch.wait()
        cluster.merge(f"numbers/{step}", to_numbers(metrics))
    timeline = executor.watch.timeline
    timeline.write_trace(f"{folder}/timeline{jax.process_index()}.json")
    executor.close()
    cluster.barrier("done")
    return [
        [event.name, event.kind, event.step, event.start, event.end]
        for event in timeline.events
    ]


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
        evaluation=EvaluationConfig(at_start=False),
        checkpoint=CheckpointConfig(keep=2),
    )
    run = prepare(config)
    trainer = Trainer(run, pathlib.Path(workdir), Console(is_quiet=True))
    agree = trainer._agree

    def agree_and_stop(numbers):
        found = agree(numbers)
        # When the processes have told each other of this step: 0 knows of no signal.
        if trainer.step == stop_after and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

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


def found_plan(folder):
    """The plan that a search finds for training on answers; only process 0 searches."""
    if jax.process_index():
        plan_choice._found = None
    config = small_runs.sft_config(pathlib.Path(folder), allocation="", steps=4)
    return prepare(config).chosen.as_dict()


def stop_and_go_on(folder, workdir, allocation):
    """Two runs in one folder: the first is stopped after two steps."""
    return [
        small_run(folder, workdir, allocation, stop_after=2),
        small_run(folder, workdir, allocation),
    ]
