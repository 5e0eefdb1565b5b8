"""Offload: the link between devices and host memory, and updates that stream over it.

    python -m realjax.bench.offload

Three things, on all devices, of one Llama-shaped model over fsdp. What the link gives:
one large array a device, to pinned host memory, back, and both at once. What
`realloc.to_host` and `to_device` reach of that with the tree of masters. And one
update of the optimizer with its moments on the devices, against one that streams them
from the host and back, in bytes of moments a second each way.

The default shape on GPUs is 8 layers of Llama 3.1 8B (2.8 billion parameters: 42 GiB
with moments and gradients); `--layers=32` is the whole model. On CPUs, where both
memories are one, it is a small model, and only ratios are reported.
The last line is one JSON object: medians, and the spread over the repetitions.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from realjax.algorithms import sft
from realjax.bench.environment import describe
from realjax.bench.quick import spread
from realjax.core.arrays import PyTree
from realjax.functions.function import Train
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.packed import ModelProgram
from realjax.functions.train import TrainProgram
from realjax.models import transformer
from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.parallel.sharding import padded_for
from realjax.realloc.offload import moved_in_program, to_device, to_host
from realjax.rl.masking import Mean

SMALL = ModelConfig(
    vocab_size=4096,
    width=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_width=1536,
)
LLAMA = ModelConfig(
    vocab_size=128256,
    width=4096,
    num_layers=8,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14336,
)
LINK_BYTES = 2**30
"""Of the array that finds out what the link gives, on each device."""

SMALL_LINK_BYTES = 2**26
"""The same on CPUs."""

REPETITIONS = 7


def make_program(model: ModelConfig, is_offloaded: bool) -> TrainProgram:
    """The update of a model over all devices."""
    allocation = Allocation.parse(f"f{jax.device_count()}")
    mesh = make_mesh(allocation)
    spec = sft.graph(sft.SFT()).calls["train_policy"].function
    assert isinstance(spec, Train)
    program = ModelProgram(
        config=padded_for(model, [allocation]), partition=partition_for(mesh)
    )
    config = OptimizerConfig(offload=is_offloaded)
    return TrainProgram(spec, program, mesh, config, 1000, moved_in_program)


def seconds_of(work: Callable[[], Any], repetitions: int) -> list[float]:
    """How long each call took, after one that compiles and touches the memory."""
    seconds = []
    for _ in range(repetitions + 1):
        begin = time.perf_counter()
        found = jax.block_until_ready(work())
        seconds.append(time.perf_counter() - begin)
        del found
    return seconds[1:]


def copy_seconds(tree: PyTree, repetitions: int) -> dict[str, list[float]]:
    """Seconds of copies of a tree to the host, back, and both at once."""
    host = jax.block_until_ready(to_host(tree))
    return {
        "to_host": seconds_of(lambda: to_host(tree), repetitions),
        "to_device": seconds_of(lambda: to_device(host), repetitions),
        "both": seconds_of(lambda: (to_host(tree), to_device(host)), repetitions),
    }


def update_seconds(model: ModelConfig, is_offloaded: bool, repetitions: int):
    """Seconds of an update, and the seconds of copies of its masters."""
    program = make_program(model, is_offloaded)
    init = jax.jit(
        transformer.init_parameters,
        static_argnums=0,
        out_shardings=program.shardings.parameters,
    )
    masters = init(program.program.config, jax.random.key(0))
    gradients = jax.jit(
        lambda tree: jax.tree.map(lambda x: 1e-3 * jnp.ones_like(x), tree),
        out_shardings=program._cut,
    )(masters)
    one = jnp.float32(1.0)
    means = jax.jit(lambda: {"loss": Mean(one, one)}, out_shardings=program._whole)()
    copies = {} if is_offloaded else copy_seconds(masters, repetitions)
    state = program.init_optimizer(masters)
    del masters

    def update():
        nonlocal state
        state, _ = program._apply(state, (gradients, means))
        return state

    return seconds_of(update, repetitions), copies


def rates(num_bytes: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """GB/s of each device; of both ways at once, the sum of the two."""
    scale = {"both": 2}
    return {
        way: spread([scale.get(way, 1) * num_bytes / s / 1e9 for s in times], digits=2)
        for way, times in seconds.items()
    }


def shares(found: dict[str, Any], link: dict[str, Any]) -> dict[str, float]:
    """Medians as a part of what the link gives."""
    return {way: round(found[way]["median"] / link[way]["median"], 3) for way in found}


def measure(model: ModelConfig, repetitions: int) -> dict[str, Any]:
    """Everything once, in this process."""
    num_devices, is_cpu = jax.device_count(), jax.devices()[0].platform == "cpu"
    mesh = make_mesh(Allocation.parse(f"f{num_devices}"))
    link_bytes = SMALL_LINK_BYTES if is_cpu else LINK_BYTES
    array = jax.jit(
        lambda: jnp.ones((num_devices, link_bytes // 4), jnp.float32),
        out_shardings=NamedSharding(mesh, PartitionSpec("fsdp")),
    )()
    link = rates(link_bytes, copy_seconds({"x": array}, repetitions))
    del array
    resident, copies = update_seconds(model, False, repetitions)
    streamed, _ = update_seconds(model, True, repetitions)
    masters_bytes = 4 * model.num_parameters // num_devices
    tree = rates(masters_bytes, copies)
    # Two moments, each way: as many bytes as both ways of two trees of masters.
    stream = rates(2 * masters_bytes, {"both": streamed})
    ratios = {
        "streamed_over_resident": round(
            statistics.median(streamed) / statistics.median(resident), 3
        ),
        "tree_share_of_link": shares(tree, link),
        "update_share_of_link": shares(stream, link)["both"],
    }
    if is_cpu:
        return ratios
    return ratios | {
        "link_gb_per_second": link,
        "tree_gb_per_second": tree,
        "update_gb_per_second": stream["both"],
        "resident_update_seconds": spread(resident),
        "streamed_update_seconds": spread(streamed),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--layers", type=int, default=0, help="of the model")
    options = parser.parse_args(arguments)
    model = SMALL if jax.devices()[0].platform == "cpu" else LLAMA
    if options.layers:
        model = dataclasses.replace(model, num_layers=options.layers)
    result = {"bench": "offload", **describe(), "repetitions": options.repetitions}
    result["parameters"] = model.num_parameters
    print(json.dumps(result | measure(model, options.repetitions)))


if __name__ == "__main__":
    main()
