"""What the processes of `executor_test.py` and `trainer_test.py` do."""

import jax
import numpy as np

from realjax.runtime import cluster
from realjax.runtime.measures import to_numbers
from tests.e2e import tiny_ppo

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
