"""A PPO step whose every operation runs as its kernel, interpreted, on one device."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_a_step_of_interpreted_kernels_equals_that_of_the_references():
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.interpreted_step"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # All that there is a kernel of our own for; tokamax's are not interpreted.
    assert {name: sorted(names) for name, names in found["chosen"].items()} == {
        "attention": ["dense"],
        "linear_logprob": ["mosaic"],
        "paged attention": ["mosaic"],
        "sampling": ["mosaic"],
        "unpack": ["mosaic", "slices"],  # Single numbers are no kernel's.
    }
    assert found["num_kernels"] > 60
    differences, numbers = found["differences"], found["numbers"]
    assert differences["tokens"] == differences["kept"] == 0
    # The types are the same, and sequences lie in one page: other sums of the same
    # products, most of which are the same number in bfloat16.
    for name, difference in differences.items():
        scale = max(1.0, abs(numbers.get(name, 1.0)))
        assert difference < 0.01 * scale, name
