"""A run of several processes, one per host, none of them a master.

    JAX_COORDINATOR_ADDRESS=host0:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0   on host0
    JAX_COORDINATOR_ADDRESS=host0:8476 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1   on host1

Every process runs the same program. What they must know of each other on the host,
as a count of rows or a metric, goes through the key-value store of `jax.distributed`
and never through collectives: those need devices, which belong to calls of other
meshes, and would make the meshes wait for each other.

    publish(key, value)     leaves a value for others and does not wait
    collect(key, [1, 2])    waits for the values of processes 1 and 2
    gather, merge, barrier  all processes publish, and collect from all
    fetch(tree, key)        the whole values of small arrays, wherever they lie

A key stands for one exchange: whoever comes back takes a new one, as `metrics/17`.
Values are what JSON holds, and NumPy arrays in lists and dicts. With one process
nothing is sent anywhere.
"""

import contextlib
import importlib.metadata
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from realjax.core.arrays import Array, PyTree
from realjax.realloc.processes import handle
from realjax.runtime.messages import decode, encode

__all__ = [
    "ClusterError",
    "barrier",
    "collect",
    "fetch",
    "gather",
    "handle",
    "merge",
    "publish",
    "start",
    "telling_failures",
]

TIMEOUT_SECONDS = 1200.0
"""How long to wait for a process that may be compiling."""

_HEARTBEAT_SECONDS = 60
_WATCH_SECONDS = 5.0
_GRACE_SECONDS = 20.0
_LOOK_SECONDS = 2.0  # How often someone who waits asks whether a process has failed.
_NUM_CPU_THREADS = 32
_CHUNK_BYTES = 1 << 20  # A message of gRPC has at most 4 MiB.
_PREFIX = "realjax"
_FAILED = f"{_PREFIX}/failed"

# Of each time that `telling_failures` was entered here, whether it is under way.
_UNDER_WAY: list[bool] = []


Box = tuple[tuple[int, int], ...]
"""A block of an array: (start, stop) of every dimension."""


class ClusterError(RuntimeError):
    """Another process failed, did not come, or came to another place."""


def start(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
) -> None:
    """Join the other processes of the run, before anything touches a device.

    With one process, nothing is done.

    Args:
        coordinator: Address of process 0, as in "10.0.0.1:8476", where it will listen;
            `JAX_COORDINATOR_ADDRESS` of the environment if None.
        num_processes: One per host; `JAX_NUM_PROCESSES` if None, else one.
        process_index: Which of them this is; `JAX_PROCESS_ID` if None.

    Raises:
        ValueError: a part is missing, or the index is not below the number.
        ClusterError: the others cannot be reached.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _from_environment("JAX_NUM_PROCESSES", num_processes)
    process_index = _from_environment("JAX_PROCESS_ID", process_index)
    if num_processes in (None, 1):
        if coordinator and num_processes is None:
            raise ValueError(
                f"There is a coordinator, {coordinator}, and no number of processes."
                " Give it as well, or in JAX_NUM_PROCESSES."
            )
        return
    host, _, port = (coordinator or "").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"{num_processes} processes need the address of process 0 as host:port, and"
            f" it is {coordinator!r}. Give one in JAX_COORDINATOR_ADDRESS."
        )
    if process_index is None or not 0 <= process_index < num_processes:
        raise ValueError(
            f"This is process {process_index} of {num_processes}. Give each its index,"
            f" 0 to {num_processes - 1}, in JAX_PROCESS_ID."
        )
    # Its handler swallows SIGTERM: a process that loads a model could not be ended.
    jax.config.update("jax_enable_preemption_service", False)
    if _has_cpus_only():
        _let_cpus_talk(host)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_index,
            # A process has all devices of its host; detection would give it one.
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ClusterError(
            f"Process {process_index} of {num_processes} did not get through to process"
            f" 0 at {coordinator}: {_first_line(error)}. Start all processes within"
            " five minutes, each with its own index."
        ) from error


@contextlib.contextmanager
def telling_failures() -> Iterator[None]:
    """Tell the others of an error in this process, and hear of theirs.

    Who waits for a value of the failed process gets a `ClusterError`. One that waits
    for its devices cannot: it ends, some seconds later, with a message. A process that
    is killed tells nothing: the others miss its heartbeat, and end.

    All processes enter this alike: an error that they have dealt with, as a config that
    is wrong in all of them, says nothing of what they do under it next.
    """
    # Not jax.process_count(): it starts the devices, and so waits for the others.
    from jax._src import distributed

    client, index = distributed.global_state.client, distributed.global_state.process_id
    if client is None:
        yield
        return
    number = len(_UNDER_WAY)
    _UNDER_WAY.append(True)
    is_over = threading.Event()
    watch = threading.Thread(target=_watch, args=(client, number, is_over), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(
                    f"{_FAILED}/{number}/{index}",
                    f"{type(error).__name__}: {error}",
                    allow_overwrite=True,
                )
        raise
    finally:
        is_over.set()
        _UNDER_WAY[number] = False


def _watch(client: Any, number: int, is_over: threading.Event) -> None:
    """End this process when another has failed and this one does not notice."""
    while not is_over.wait(_WATCH_SECONDS):
        try:
            failed = client.key_value_dir_get(f"{_FAILED}/{number}/")
        except jax.errors.JaxRuntimeError:
            return  # The store is gone, which JAX notices as well.
        if failed and not is_over.wait(_GRACE_SECONDS):
            print(_failure(*failed[0]), file=sys.stderr, flush=True)
            os._exit(1)


def publish(key: str, value: Any, *, to: Sequence[int] | None = None) -> None:
    """Leave a value for other processes; does not wait for them.

    Args:
        key: Of the exchange; new each time.
        value: What JSON holds, and NumPy arrays in lists and dicts.
        to: The processes that will collect it; all others if None. When they have,
            it is gone from the store.
    """
    me = jax.process_index()
    readers = [p for p in (range(jax.process_count()) if to is None else to) if p != me]
    if not readers:
        return
    message = encode(value)
    starts = range(0, max(len(message), 1), _CHUNK_BYTES)
    name = _name(key, me)
    try:
        for number, start in enumerate(starts):
            chunk = message[start : start + _CHUNK_BYTES]
            _client().key_value_set_bytes(f"{name}/{number}", chunk)
        # Last, because it says that all is there.
        header = json.dumps({"chunks": len(starts), "readers": len(readers)})
        _client().key_value_set_bytes(f"{name}/header", header.encode())
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" in str(error):
            raise ClusterError(
                f"Process {me} has published {key!r} before. A key stands for one"
                " exchange: number them."
            ) from error
        raise _lost(error) from error


def collect(
    key: str, processes: Sequence[int], *, timeout_seconds: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Wait for the values that other processes publish, each value once.

    Args:
        key: Of the exchange.
        processes: Whose values; not this one's.
        timeout_seconds: How long to wait for all of them.

    Raises:
        ClusterError: a process failed or did not come; says which.
    """
    deadline = time.monotonic() + timeout_seconds
    values = []
    for process in processes:
        name = _name(key, process)
        header = json.loads(_wait(f"{name}/header", key, process, deadline))
        chunks = [
            _wait(f"{name}/{number}", key, process, deadline)
            for number in range(header["chunks"])
        ]
        values.append(decode(b"".join(chunks)))
        is_last = header["readers"] == 1 or (
            _client().key_value_increment(f"{name}/read", 1) == header["readers"]
        )
        if is_last:
            _client().key_value_delete(f"{name}/")
    return values


def gather(
    key: str, value: Any, *, timeout_seconds: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Return the values of all processes, in their order, to all of them."""
    if _is_alone():
        return [value]
    me = jax.process_index()
    publish(key, value)
    others = [p for p in range(jax.process_count()) if p != me]
    values = collect(key, others, timeout_seconds=timeout_seconds)
    # What one gets back is what the others get: lists where there were tuples.
    return [*values[:me], decode(encode(value)), *values[me:]]


def merge(
    key: str, values: Mapping[str, Any], *, timeout_seconds: float = TIMEOUT_SECONDS
) -> dict[str, Any]:
    """Return the union of the dicts of all processes, to all of them.

    What several processes give is taken from the first.
    """
    merged: dict[str, Any] = {}
    for given in gather(key, dict(values), timeout_seconds=timeout_seconds):
        merged = given | merged
    return merged


def barrier(key: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Wait until all processes have come here; no device does anything.

    Raises:
        ClusterError: a process failed or did not come; says which.
    """
    # The barrier of jax.distributed cannot look up while it waits: an error elsewhere
    # would show only when the time is over.
    gather(f"barrier/{key}", None, timeout_seconds=timeout_seconds)


def fetch(
    tree: PyTree,
    key: str,
    *,
    to: Sequence[int] | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> PyTree:
    """Return the whole values of arrays as NumPy, wherever their shards lie.

    Every process of a shard's and every one that wants the values must call it. Each
    distinct shard is published once, by the first process that holds it, and only to
    those that lack it. Meant for what is small: metrics, rewards, lengths.

    Args:
        tree: Of arrays; NumPy arrays in it stay what they are in each process.
        key: Of the exchange; new each time.
        to: The processes that get the values, the others get None; all if None.
        timeout_seconds: How long to wait for another process.
    """
    leaves, structure = jax.tree.flatten(tree)
    me = jax.process_index()
    wanting = range(jax.process_count()) if to is None else to
    global_leaves = [n for n, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    places = {number: _places(leaves[number], wanting) for number in global_leaves}
    # From whom to whom: the same in all processes.
    readers: dict[int, set[int]] = {}
    for leaf_places in places.values():
        for publisher, lacking in leaf_places.values():
            readers.setdefault(publisher, set()).update(lacking)
    own = {
        (number, box): np.asarray(shard.data)
        for number in global_leaves
        for box, shard in _distinct_shards(leaves[number]).items()
    }
    if readers.get(me):
        shared = [
            [number, box, own[number, box]]
            for number, leaf_places in places.items()
            for box, (publisher, lacking) in leaf_places.items()
            if publisher == me and lacking
        ]
        publish(f"{key}/fetch", shared, to=sorted(readers[me]))
    if me not in wanting:
        return None
    publishers = sorted(p for p, lacking in readers.items() if me in lacking)
    for shared in collect(f"{key}/fetch", publishers, timeout_seconds=timeout_seconds):
        for number, box, data in shared:
            own[number, tuple(map(tuple, box))] = data
    for number in global_leaves:
        whole = np.empty(leaves[number].shape, leaves[number].dtype)
        for box in places[number]:
            whole[tuple(slice(*bounds) for bounds in box)] = own[number, box]
        leaves[number] = whole
    return structure.unflatten(leaves)


def _distinct_shards(array: Array) -> dict[Box, Any]:
    shards = array.addressable_shards
    return {_box(shard.index, array.shape): shard for shard in shards}


def _places(array: Array, wanting: Sequence[int]) -> dict[Box, tuple[int, list[int]]]:
    """Return who publishes each distinct block of an array, and who lacks it."""
    holders: dict[Box, set[int]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        holders.setdefault(_box(index, array.shape), set()).add(device.process_index)
    return {
        box: (min(found), [p for p in wanting if p not in found])
        for box, found in holders.items()
    }


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _from_environment(name: str, value: int | None) -> int | None:
    text = os.environ.get(name)
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} is no number. Give a whole number.")
    return int(text)


def _has_cpus_only() -> bool:
    """Tell whether JAX will run on CPUs, without asking it to start."""
    platforms = jax.config.jax_platforms
    if platforms:
        return platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins")


def _let_cpus_talk(coordinator_host: str) -> None:
    """Choose how devices of CPUs reach each other: gloo, and a socket for copies."""
    family, kind, _, _, address = socket.getaddrinfo(
        coordinator_host, 9, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # Sends nothing; tells which of our addresses it is.
        own = probe.getsockname()[0]
    with socket.socket(family, socket.SOCK_STREAM) as free:
        free.bind((own, 0))
        port = free.getsockname()[1]
    host = f"[{own}]" if ":" in own else own
    # Threads of a device's work. A collective and a copy each hold one while they wait
    # for the other process: with one thread a core, all may wait and none be left.
    os.environ.setdefault("NPROC", str(_NUM_CPU_THREADS))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A real port: with port 0 the others would look for us there, and wait for ever.
    jax.config.update("jax_cross_host_transfer_socket_address", f"{host}:{port}")
    # The sender of a copy may come late: it compiles, or computes.
    jax.config.update("jax_cross_host_transfer_timeout_seconds", int(TIMEOUT_SECONDS))


def _is_alone() -> bool:
    return jax.process_count() == 1


def _client() -> Any:
    # The store has no public name in jax.
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise ClusterError(
            "This process has not joined the others. Call `cluster.start` first."
        )
    return client


def _name(key: str, process: int) -> str:
    return f"{_PREFIX}/exchange/{key}/{process}"


def _wait(name: str, key: str, process: int, deadline: float) -> bytes:
    """Wait for an entry of the store, looking up for failures now and then."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ClusterError(
                f"Process {process} did not publish {key!r} in time; process"
                f" {jax.process_index()} waited for it. See whether it hangs, or"
                " took another way."
            )
        try:
            milliseconds = int(1000 * min(_LOOK_SECONDS, left)) + 1
            return _client().blocking_key_value_get_bytes(name, milliseconds)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise _lost(error) from error
        _raise_failures()


def _raise_failures() -> None:
    try:
        failed = _client().key_value_dir_get(f"{_FAILED}/")
    except jax.errors.JaxRuntimeError as error:
        raise _lost(error) from error
    for name, message in failed:
        number = int(name.split("/")[-2])
        # In what is done here as well, or in what this process has not come to yet.
        if number >= len(_UNDER_WAY) or _UNDER_WAY[number]:
            raise ClusterError(_failure(name, message))


def _failure(name: str, message: str) -> str:
    return f"Process {name.rpartition('/')[2]} failed: {message}"


def _lost(error: Exception) -> ClusterError:
    return ClusterError(
        f"The store in process 0 does not answer: {_first_line(error)}. See whether"
        " process 0 ended."
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
