"""Loading and saving a checkpoint: time, and host memory over the shards themselves.

    python -m realjax.bench.checkpoint

Writes a Llama-shaped checkpoint of about a gigabyte (bfloat16, one file) into a
temporary folder, then in a new process loads it into f8 on eight virtual CPU devices
and saves it again. CPU devices keep their arrays in host memory, so the memory of the
process is the shards (float32 masters, twice the checkpoint) and what loading needs
besides; that is the difference to the process before the load, less the shards. The
last line is one JSON object.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from realjax.bench.environment import bytes_read, describe, memory_bytes
from realjax.models import hf
from realjax.models.byte_ranges import FLOATS
from realjax.models.config import ModelConfig
from realjax.models.families import llama
from realjax.models.layout import stored_shape
from realjax.models.parameters import Parameter, abstract_parameters
from realjax.models.tensor_writer import plan_files, write_file, write_index
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings

MODEL = ModelConfig(
    vocab_size=32000,
    width=2048,
    num_layers=8,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_width=5632,
)
ALLOCATION = "f8"
STORED_DTYPE = FLOATS["BF16"]


def make_checkpoint(folder: pathlib.Path, config: ModelConfig) -> int:
    """Write a checkpoint of random numbers; return its bytes."""
    folder.mkdir()
    hf.write_config(folder, config, dtype=STORED_DTYPE)
    is_leaf = lambda x: isinstance(x, Parameter)
    abstract = jax.tree.leaves(abstract_parameters(config), is_leaf=is_leaf)
    tensors = jax.tree.leaves(
        llama.stored_tensors(config), is_leaf=lambda x: hasattr(x, "groups")
    )
    shapes = {
        name: stored_shape(tensor, parameter.real_shape[tensor.num_stacked :])
        for tensor, parameter in zip(tensors, abstract, strict=True)
        for name in tensor.names(parameter.real_shape)
    }
    plan = plan_files(shapes.items(), STORED_DTYPE, hf.MAX_SHARD_BYTES)
    generator = np.random.default_rng(0)
    for planned in plan:
        arrays = (
            generator.standard_normal(shape, np.float32)
            for shape in planned.shapes.values()
        )
        write_file(folder, planned, arrays, STORED_DTYPE)
    write_index(folder, plan, STORED_DTYPE)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(folder: pathlib.Path) -> dict[str, Any]:
    """Load and save in this process."""
    config = hf.read_config(folder)
    mesh = make_mesh(Allocation.parse(ALLOCATION))
    shardings = parameter_shardings(abstract_parameters(config), mesh)
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(8))())  # Start the devices.
    before, read_before = memory_bytes("VmRSS"), bytes_read()
    begin = time.perf_counter()
    parameters = jax.block_until_ready(hf.load(folder, shardings=shardings))
    load_seconds, peak = time.perf_counter() - begin, memory_bytes("VmHWM")
    num_read = bytes_read() - read_before
    shard_bytes = sum(
        shard.data.nbytes
        for array in jax.tree.leaves(parameters)
        for shard in array.addressable_shards
    )
    after, begin = memory_bytes("VmRSS"), time.perf_counter()
    hf.save(folder.with_name("saved"), config, parameters, dtype=STORED_DTYPE)
    save_seconds = time.perf_counter() - begin
    return {
        "shard_bytes": shard_bytes,
        "bytes_read": num_read,
        "load_seconds": round(load_seconds, 2),
        "load_peak_bytes_over_shards": peak - before - shard_bytes,
        "loaded_bytes_over_shards": after - before - shard_bytes,
        "save_seconds": round(save_seconds, 2),
        "save_peak_bytes_over_loaded": max(0, memory_bytes("VmHWM") - after),
    }


def child(folder: pathlib.Path) -> dict[str, Any]:
    """Measure in a new process with eight virtual devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-m", "realjax.bench.checkpoint", "--child", str(folder)]
    found = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the checkpoint, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(options.child)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "checkpoint"
        checkpoint_bytes = make_checkpoint(folder, MODEL)
        runs = []
        for _ in range(options.repetitions):
            runs.append(child(folder))
            shutil.rmtree(folder.with_name("saved"))
    result = {"bench": "checkpoint", **describe(), "allocation": ALLOCATION}
    result |= {"parameters": MODEL.num_parameters, "checkpoint_bytes": checkpoint_bytes}
    print(json.dumps(result | {"runs": runs}))


if __name__ == "__main__":
    main()
