"""How fast reallocation is: rates, rivals, time in Python, and memory.

Everything of one pair of layouts is measured in one interleaved run: our reallocation,
the rivals, and a plain copy of the result on its devices (`jnp.copy`, one program),
which is what memory can do. Before that, results are compared bit by bit.

`jax.device_put` keeps shards that are in place already, sharing their buffers with the
source. Where it does, ours is measured twice: sharing as well (`alias=True`), which is
what the rival is compared with, and copying.
"""

import contextlib
import dataclasses
import gc
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from realjax.bench.layout_pairs import GIGABYTE, Options, Pair, fitted
from realjax.core.arrays import PyTree
from realjax.models.config import ModelConfig
from realjax.models.transformer import abstract_parameters
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import parameter_shardings
from realjax.realloc import Traffic, reallocate

Mover = Callable[[PyTree], PyTree]

SMALL = {"width": 64, "mlp_width": 128, "num_heads": 8, "head_dim": 8}
"""So small that Python is all that a reallocation costs."""


def measure(options: Options) -> dict[str, Any]:
    """Measure every pair, what Python costs, and memory."""
    model = fitted(options.model, options.pairs)
    pairs = []
    for pair in options.pairs:
        pairs.append(_measure_pair(pair, model, options))
        print(_line(pairs[-1]), flush=True)
    found = {
        "pairs": pairs,
        "host_seconds": _host_seconds(options),
        "equal_layouts_seconds": _equal_layouts(options),
    }
    for pair, result in zip(options.pairs, pairs, strict=True):
        result["memory"] = memory_of(pair, model, options.dtype)
        beside = result["memory"]["share_beside_result"]
        print(f"{pair!s:24} beside the result {beside:.2f} of the tree", flush=True)
    return found


@dataclasses.dataclass
class _Times:
    """Seconds until the call returned, and until the devices were done."""

    returned: list[float] = dataclasses.field(default_factory=list)
    done: list[float] = dataclasses.field(default_factory=list)


def _measure_pair(pair: Pair, model: ModelConfig, options: Options) -> dict[str, Any]:
    source, places = (
        shardings(model, allocation) for allocation in (pair.source, pair.destination)
    )
    tree = filled(model, source, options.dtype)
    traffic = Traffic()
    movers = _movers(places, options.against, same_devices=_same_devices(pair))
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        expected = jax.block_until_ready(
            reallocate(_fresh(tree), places, traffic=traffic)
        )
    shared: dict[str, int] = {}
    for name, mover in movers.items():
        moved = mover(_fresh(tree))
        check_equal(name, moved, expected)
        shared[name] = _shared_bytes(moved, tree)
        del moved
    if not shared.get("device_put"):
        movers.pop("ours_shared")
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    jax.block_until_ready(copy(expected))
    times = {name: _Times() for name in (*movers, "copy")}
    for _ in range(options.repetitions):
        for name, mover in movers.items():
            _time(mover, _fresh(tree), times[name])
        _time(copy, expected, times["copy"])
    result_bytes = _bytes(expected)
    del expected
    return _summary(pair, times, traffic, shared, result_bytes) | {
        "tree_bytes": _tree_bytes(tree)
    }


def _movers(
    places: PyTree, against: Sequence[str], *, same_devices: bool
) -> dict[str, Mover]:
    movers: dict[str, Mover] = {
        "ours": lambda tree: reallocate(tree, places),
        "ours_shared": lambda tree: reallocate(tree, places, alias=True),
    }
    if "device_put" in against:
        movers["device_put"] = lambda tree: jax.device_put(tree, places)
    if "jit" in against and same_devices:
        movers["jit"] = jax.jit(
            lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=places
        )
    return movers


def _time(mover: Mover, tree: PyTree, times: _Times) -> None:
    gc.collect()  # What the last one made is gone.
    _time_call(mover, tree, times)


def _time_call(mover: Mover, tree: PyTree, times: _Times) -> None:
    begin = time.perf_counter()
    moved = mover(tree)
    returned = time.perf_counter()
    jax.block_until_ready(moved)
    times.returned.append(returned - begin)
    times.done.append(time.perf_counter() - begin)


def _summary(
    pair: Pair,
    times: dict[str, _Times],
    traffic: Traffic,
    shared: dict[str, int],
    result_bytes: int,
) -> dict[str, Any]:
    median = {name: statistics.median(found.done) for name, found in times.items()}
    ours = times["ours"]
    rival = min((median[n] for n in ("device_put", "jit") if n in median), default=None)
    # A rival that shares buffers is compared with ours that shares them.
    against = median.get("ours_shared", median["ours"])
    if rival is not None and median.get("jit") == rival:
        against = median["ours"]
    return {
        "pair": str(pair),
        "kinds": {kind: number for kind, number in traffic.leaves.items() if number},
        "sent_bytes": traffic.sent_bytes,
        "collective_bytes": traffic.collective_bytes,
        "result_bytes": result_bytes,
        "shared_bytes": shared,
        "seconds": {name: _spread(found.done) for name, found in times.items()},
        "gigabytes_per_second": round(result_bytes / median["ours"] / 1e9, 3),
        "share_of_copy": round(median["copy"] / median["ours"], 3),
        "times_best_rival": rival and round(against / rival, 3),
        "blocked": round(
            statistics.median(
                returned / done
                for returned, done in zip(ours.returned, ours.done, strict=True)
            ),
            3,
        ),
    }


def _line(found: dict[str, Any]) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in found["kinds"].items())
    return (
        f"{found['pair']:24} {kinds:20} {found['gigabytes_per_second']:7.2f} GB/s"
        f"  copy x {found['share_of_copy']:.2f}"
        f"  best rival x {found['times_best_rival']}"
        f"  blocked {found['blocked']:.2f}"
    )


def _host_seconds(options: Options) -> dict[str, Any]:
    """Until a cached reallocation of a tiny model returns, by number of layers.

    In a loop, as a training run does it: nothing collects garbage in between.
    """
    found: dict[str, Any] = {}
    for pair in options.pairs:
        for layers in (8, 32):
            tree, places = _small_tree(pair, layers, options.dtype)
            times = _Times()
            for _ in range(options.repetitions + 2):
                _time_call(lambda tree, to=places: reallocate(tree, to), tree, times)
            found.setdefault(str(pair), {})[layers] = _spread(times.returned[2:])
    return found


def _equal_layouts(options: Options) -> dict[str, float]:
    """A tree that is where it shall be, and may be shared."""
    tree, _ = _small_tree(options.pairs[0], 32, options.dtype)
    places = jax.tree.map(lambda array: array.sharding, tree)
    times = _Times()
    for _ in range(options.repetitions + 2):
        _time_call(lambda tree: reallocate(tree, places, alias=True), tree, times)
    return _spread(times.returned[2:])


def _small_tree(pair: Pair, layers: int, dtype: str) -> tuple[PyTree, PyTree]:
    config = dataclasses.replace(GIGABYTE, **SMALL, num_layers=layers, vocab_size=512)
    model = fitted(config, [pair])
    tree = filled(model, shardings(model, pair.source), dtype)
    return tree, shardings(model, pair.destination)


def memory_of(pair: Pair, model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Resident memory during one move, in a process of its own.

    There, what is freed is given back to the system at once, so that what is resident
    is what is in use.
    """
    done = subprocess.run(
        [sys.executable, "-m", "realjax.bench.reallocation_rates"],
        input=json.dumps([str(pair), dtype, dataclasses.asdict(model)]),
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure the memory of one move, which standard input tells."""
    text, dtype, model = json.loads(sys.stdin.read())
    pair = Pair.parse(text)
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", pair.num_devices)
    config = ModelConfig(**model)
    tree = filled(config, shardings(config, pair.source), dtype)
    print(json.dumps(_peak_memory(tree, shardings(config, pair.destination))))


def _peak_memory(tree: PyTree, places: PyTree) -> dict[str, Any]:
    jax.block_until_ready(reallocate(tree, places))  # Compiled, and gone.
    gc.collect()
    with _resident() as sampled:
        before = _resident_bytes()
        moved = jax.block_until_ready(reallocate(tree, places))
    beside = max(sampled) - before - _bytes(moved)
    return {
        "peak_bytes_beside_result": beside,
        "share_beside_result": round(beside / _tree_bytes(tree), 3),
    }


@contextlib.contextmanager
def _resident() -> Iterator[list[int]]:
    """Sample the resident memory of this process until the block ends."""
    sampled, is_over = [_resident_bytes()], threading.Event()

    def sample() -> None:
        while not is_over.wait(0.0005):
            sampled.append(_resident_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield sampled
    finally:
        is_over.set()
        thread.join()


def _resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def shardings(model: ModelConfig, allocation: Allocation) -> PyTree:
    """How the parameters of a model lie on the devices of an allocation."""
    return parameter_shardings(abstract_parameters(model), make_mesh(allocation))


def filled(model: ModelConfig, shardings: PyTree, dtype: str) -> PyTree:
    """Parameters in which no two elements of an array are alike, modulo their type."""
    shapes = jax.tree.map(
        lambda leaf: leaf.shape,
        abstract_parameters(model),
        is_leaf=lambda node: hasattr(node, "axes"),
    )

    def fill() -> PyTree:
        return jax.tree.map(
            lambda shape: jnp.sin(
                jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
            ).astype(dtype),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    return jax.block_until_ready(jax.jit(fill, out_shardings=shardings)())


def _fresh(tree: PyTree) -> PyTree:
    """The same buffers as new arrays: `device_put` keeps a host copy on its source."""
    return jax.tree.map(
        lambda array: jax.make_array_from_single_device_arrays(
            array.shape,
            array.sharding,
            [shard.data for shard in array.addressable_shards],
        ),
        tree,
    )


def _same_devices(pair: Pair) -> bool:
    """Tell whether a jitted function can take and make both."""
    return pair.source.devices == pair.destination.devices


def check_equal(name: str, moved: PyTree, expected: PyTree) -> None:
    """Check that what one way made is what ours made, and as many bytes.

    Raises:
        RuntimeError: it is not.
    """
    equal = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), a, b))
    wrong = [
        jax.tree_util.keystr(path)
        for path, is_equal in jax.tree_util.tree_leaves_with_path(
            equal(moved, expected)
        )
        if not is_equal
    ]
    if wrong or _bytes(moved) != _bytes(expected):
        raise RuntimeError(
            f"{name} did not do the same work as reallocate: {wrong or 'other bytes'}."
            " Its time says nothing."
        )


def _shared_bytes(moved: PyTree, tree: PyTree) -> int:
    """Bytes of the result that are buffers of the source."""
    before = set(_buffers(tree))
    return sum(size for key, size in _buffers(moved).items() if key in before)


def _buffers(tree: PyTree) -> dict[tuple[int, int], int]:
    return {
        (shard.device.id, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
    }


def _bytes(tree: PyTree) -> int:
    """Bytes on all devices."""
    return sum(
        shard.data.nbytes
        for array in jax.tree.leaves(tree)
        for shard in array.addressable_shards
    )


def _tree_bytes(tree: PyTree) -> int:
    """Bytes of one copy."""
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(seconds), 6),
        "min": round(min(seconds), 6),
        "max": round(max(seconds), 6),
    }


if __name__ == "__main__":
    main()
