"""Every kernel, compiled for GPUs that are not there: registers, spills, temporaries.

`make check-gpu-compile` runs these. They need the wheels of `requirements/aot.lock` in
.venv/aot and are skipped without them.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels.testing.aot_check import OPERATIONS

ROOT = pathlib.Path(__file__).parents[1]
WHEELS = ROOT / ".venv" / "aot"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not WHEELS.exists(), reason="needs .venv/aot, made by `make check-gpu-compile`"
    ),
]

# What has no matrix instructions runs on older GPUs, too.
CHECKED = [("h200", operation) for operation in OPERATIONS] + [
    ("a100", "sampling"),
    ("a100", "interval_copy"),
]


def run(*arguments: str) -> list[dict]:
    """Run Python without a GPU; return its lines of JSON."""
    paths = (str(WHEELS), str(ROOT), os.environ.get("PYTHONPATH", ""))
    changed = {
        "PYTHONPATH": ":".join(paths),
        "JAX_PLATFORMS": "cpu",
        # tokamax leaves dimensions to broadcasting.
        "JAX_NUMPY_RANK_PROMOTION": "allow",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | changed,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("gpu", "operation"), CHECKED)
def test_kernels_keep_to_their_limits(gpu, operation):
    found = run("-m", "pallas_kernels.testing.aot_check", gpu, operation)
    beyond = {one["case"]: one["problems"] for one in found if one["problems"]}
    assert not beyond


def test_tokamax_is_asked_for_what_our_own_implementations_compute():
    (found,) = run("tests/compile_tokamax.py")
    assert max(found["attention"].values()) < 1e-5
    assert found["groups"] < 1e-5


def test_a_train_step_loses_the_size_of_the_logits_by_the_fused_head():
    # Llama 3.1 8B, 8 rows of 4096 tokens on one device that has room for everything.
    arguments = (
        "--config=configs/compile_llama_8b.py",
        "--for=h200x1",
        "--calls=train_policy",
        "--config.allocation=d1",
        "--config.rows.train_policy=8",
    )
    found = {}
    for name in ("mosaic", "dense"):
        *_, report = run("tests/compile_unfused.py", name, *arguments)
        step = next(p for p in report["programs"] if p["program"] == "accumulate")
        found[name] = step["temporary_bytes"]
    assert found["dense"] - found["mosaic"] > 8 * 4096 * 128256 * 4
