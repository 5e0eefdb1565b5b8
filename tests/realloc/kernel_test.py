"""Reallocation whose blocks the kernel copies, interpreted: the bits of slices."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.interval_copy import mosaic
from pallas_kernels.testing.interpret import interpreted
from realjax.parallel import Allocation, make_mesh
from realjax.realloc import mix, parcel_plans, plans, programs, reallocate

SHAPES = {"up": (2, 4, 256), "norm": (2, 256)}
ROOT = pathlib.Path(__file__).parents[2]
WHEELS = ROOT / ".venv" / "aot"
CACHES = (
    plans.make_plan,
    parcel_plans.plan_chunks,
    programs.cut_program,
    programs.join_program,
    programs.begin_program,
)


def tree_on(text, seed):
    """Arrays whose last two dimensions are cut over fsdp and tensor."""
    mesh, rng = make_mesh(Allocation.parse(text)), np.random.default_rng(seed)
    return {
        name: jax.device_put(
            rng.standard_normal(shape, np.float32),
            NamedSharding(
                mesh, PartitionSpec(*(None, "fsdp", "tensor")[3 - len(shape) :])
            ),
        )
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def forgetful():
    """Programs are made anew: what they run as is chosen when they are traced."""

    def forget():
        for function in CACHES:
            function.cache_clear()

    yield forget
    forget()


@pytest.mark.parametrize(
    "is_mixed", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_the_kernel_moves_parameters_with_the_bits_of_slices(
    is_mixed, forgetful, monkeypatch
):
    # One place of the target is a source, too: its own blocks lie in two arrays, and
    # the two devices look up different starts.
    source, target = tree_on("f2@0-1", 0), tree_on("t2@1-2", 1)
    shardings = jax.tree.map(lambda array: array.sharding, target)

    def move():
        if is_mixed:
            return mix(source, target, eta=0.3)
        return reallocate(source, shardings, dtype=jnp.bfloat16)

    plain = jax.block_until_ready(move())
    forgetful()
    monkeypatch.setattr(mosaic, "FEWEST_LAUNCHES", 0)
    with interpreted() as checks:
        moved = jax.block_until_ready(move())
    assert checks.num_kernels and not checks.has_races
    for name, array in plain.items():
        assert moved[name].sharding == array.sharding
        np.testing.assert_array_equal(
            np.asarray(moved[name]).view(np.uint8), np.asarray(array).view(np.uint8)
        )


@pytest.mark.slow
@pytest.mark.skipif(
    not WHEELS.exists(), reason="needs .venv/aot, made by `make check-gpu-compile`"
)
def test_the_kernel_compiles_into_the_programs_of_eight_gpus():
    done = subprocess.run(
        [sys.executable, "tests/compile_reallocation.py", "f8:d2t4", "mix", "kernel"],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": f"{WHEELS}{os.pathsep}{ROOT}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    kernels = [
        p for p in found["programs"] if set(p["custom_calls"]) & {"mosaic_gpu_v2"}
    ]
    # The head is cut over 4 parts of 32,064 columns, which 128 does not divide.
    assert len(kernels) == len(found["programs"]) - 2
    for program in kernels:
        assert program["temporary_bytes"] < 4096, program["program"]
        if program["program"].startswith("join"):
            assert program["output_bytes"] - program["alias_bytes"] < 1024
