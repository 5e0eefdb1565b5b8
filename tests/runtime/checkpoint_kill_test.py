"""Processes killed while they write a checkpoint."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.runtime.checkpoint import Checkpointer

VICTIM = """
import sys
import jax.numpy as jnp
from realjax.runtime.checkpoint import Checkpointer

checkpointer = Checkpointer(sys.argv[1], keep=2)
for step in range(1, 10_000):
    trees = {"policy": {f"w{i}": jnp.full((1000, 500), step + i) for i in range(8)}}
    checkpointer.save(step, trees, {"position": 10 * step})
    print(step, flush=True)
"""


def kill_inside_a_save(folder, *, at_least_step):
    """Runs the victim and kills it when it is writing; returns what it left."""
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert victim.stdout is not None
    for line in victim.stdout:
        if int(line) >= at_least_step:
            break
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(folder.glob("*.orbax-checkpoint-tmp*/*")):
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            # The rename may have been faster than the signal.
            if left := [path.name for path in folder.glob("*-tmp*")]:
                return left
            break
    victim.kill()
    victim.wait()
    victim.stdout.close()
    return []


def check_what_a_kill_left(folder):
    with Checkpointer(folder) as checkpointer:
        assert not list(folder.glob("*-tmp*"))  # Cleaned at the start.
        shape = jax.ShapeDtypeStruct((1000, 500), jnp.int32)
        restored = checkpointer.restore_latest(
            {"policy": {f"w{i}": shape for i in range(8)}}
        )
        assert restored.metadata == {"position": 10 * restored.step}
        for i in range(8):
            kernel = restored.arrays["policy"][f"w{i}"]
            np.testing.assert_array_equal(
                kernel, np.full_like(kernel, restored.step + i)
            )
        assert checkpointer.save(10_001, restored.arrays, {})
        return restored.step


def test_killed_inside_a_save_the_last_complete_one_restores(tmp_path):
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        if kill_inside_a_save(folder, at_least_step=3):
            assert check_what_a_kill_left(folder) >= 2
            return
    pytest.fail("No kill fell inside a save.")


@pytest.mark.slow
def test_killed_inside_saves_again_and_again_the_last_complete_one_restores(tmp_path):
    num_inside = 0
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        num_inside += bool(kill_inside_a_save(folder, at_least_step=2 + attempt))
        check_what_a_kill_left(folder)
    assert num_inside >= 3
