"""What the processes of `checkpoint_test.py` do, all of them in one folder."""

import contextlib
import errno
import os
import pathlib
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from realjax.runtime import cluster, manifest, shards
from realjax.runtime.checkpoint import (
    Checkpointer,
    FailedSaveError,
    MismatchedCheckpointError,
    NoCheckpointError,
)
from realjax.runtime.workdir import WorkdirError, claim_workdir
from tests.processes import exports


def numbers(scale):
    """What is saved, by NumPy; equal in all processes."""
    square = scale * np.arange(64, dtype=np.float32).reshape(8, 8)
    return {
        "policy": {"kernel": square, "scale": square[0].astype(jnp.bfloat16)},
        "moments": {"kernel": square + 1, "count": np.int32(scale)},
        "critic": {"kernel": square[:4] + 2, "bias": square[1] + 3},
        "reward": {"kernel": square[:2] + 4},
        "normalizer": {"mean": np.float32(scale)},
        "buffer": {"ids": np.arange(5), "half": 0.5, "empty": np.zeros((0, 4))},
    }


def shardings(layout):
    """Where the arrays lie: of 8 devices, whichever processes they belong to."""
    devices = np.array(jax.devices()[:8])
    if layout == "wide":
        whole = Mesh(devices.reshape(4, 2), ("a", "b"))
        last, first = Mesh(devices[-2:], ("a",)), Mesh(devices[:2], ("a",))
        square = P("a", "b")
    else:  # Other pieces, in other places, in another order.
        whole = Mesh(devices[::-1].reshape(2, 4), ("a", "b"))
        last, first = Mesh(devices[2:4], ("a",)), Mesh(devices[3:7], ("a",))
        square = P("b", None)
    return {
        "policy": {
            "kernel": NamedSharding(whole, square),
            "scale": NamedSharding(whole, P()),
        },
        "moments": {
            "kernel": NamedSharding(whole, P("b"), memory_kind="pinned_host"),
            "count": NamedSharding(whole, P()),
        },
        "critic": {
            "kernel": NamedSharding(last, P("a")),
            "bias": NamedSharding(last, P()),
        },
        "reward": {"kernel": NamedSharding(first, P(None, "a"))},
    }


def make(scale, layout):
    """Arrays of all processes, one that each has of its own, and NumPy arrays."""

    def put(whole, sharding):
        return jax.make_array_from_callback(
            whole.shape, sharding, lambda index: whole[index], dtype=whole.dtype
        )

    values = numbers(scale)
    places = shardings(layout)
    arrays = jax.tree.map(put, {name: values[name] for name in places}, places)
    own = {"normalizer": {"mean": jnp.float32(scale)}}
    return {**arrays, **own, "buffer": values["buffer"]}


def described(trees):
    def describe(leaf):
        leaf = np.asarray(leaf) if isinstance(leaf, float) else leaf
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, trees)


def check(found, scale, layout):
    """Checks structure, places and every shard of this process."""
    values = numbers(scale)
    assert jax.tree.structure(found) == jax.tree.structure(values)
    for name, places in shardings(layout).items():
        for key, sharding in places.items():
            assert found[name][key].sharding == sharding
    for (path, array), whole in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(values), strict=True
    ):
        whole = np.asarray(whole)
        assert array.dtype == whole.dtype, path
        if not isinstance(array, jax.Array):
            np.testing.assert_array_equal(array, whole, err_msg=str(path))
            continue
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index], str(path))


def save(folder, layout):
    with Checkpointer(folder, keep=2) as checkpointer:
        for step in (1, 2, 3):
            assert checkpointer.save(step, make(step, layout), {"position": step})
    return sorted(path.name for path in pathlib.Path(folder).iterdir())


def restore(folder, layout, scale):
    with Checkpointer(folder) as checkpointer:
        found = checkpointer.restore_latest(described(make(0, layout)))
    check(found.arrays, scale, layout)
    return [found.step, found.metadata]


def live_and_export(folder, saved_alone, exported):
    return {"left": live(folder, saved_alone), **exports.live(exported, 8, True)}


def live(folder, saved_alone):
    """Restores, saves, fails and goes on; asserts what this process sees."""
    me = jax.process_index()
    assert restore(saved_alone, "narrow", 3) == [3, {"position": 3}]
    with Checkpointer(folder, keep=2) as checkpointer:
        assert [checkpointer.steps(), checkpointer.latest_step()] == [[], None]
        with exports.raising(NoCheckpointError, "no complete checkpoint"):
            checkpointer.restore_latest({})
        for step in (1, 2, 3):
            trees = make(step, "wide")
            with pending_call(step), no_collectives():
                checkpointer.save(step, trees, {"position": 10 * step + me})
                checkpointer.wait()
            assert checkpointer.steps()[-1] == step
        assert not checkpointer.save(3, trees, {})
        check_that_arrays_may_change(checkpointer)
        check_failures(checkpointer)
        found = checkpointer.restore_latest(described(make(0, "narrow")))
        check(found.arrays, 4, "narrow")
        assert found.metadata == {"position": 4}
        check_damage(checkpointer)
        assert checkpointer.save(5, make(5, "narrow"), {})
        checkpointer.wait()
        checkpointer.discard_after(3)
        assert checkpointer.steps() == [3]
        assert checkpointer.save(5, make(5, "narrow"), {"position": 5})
    check_claims(pathlib.Path(folder, "run"))
    return sorted(path.name for path in pathlib.Path(folder).iterdir())


def check_that_arrays_may_change(checkpointer):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    trees = make(4, "wide")
    checkpointer.save(4, trees, {"position": 4})
    kernel = overwrite(trees["policy"]["kernel"])
    assert all((shard.data == -1).all() for shard in kernel.addressable_shards)
    trees["buffer"]["ids"][:] = -1
    checkpointer.wait()
    check(checkpointer.restore(4, described(make(0, "wide"))), 4, "wide")


def check_failures(checkpointer):
    """What goes wrong in one process is raised in all, and spoils nothing."""
    me, folder, write = jax.process_index(), checkpointer.folder, shards.write

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if me == 1:
        shards.write = full
    checkpointer.save(5, make(5, "wide"), {})
    who = "" if me == 1 else ".*Process 1 failed: OSError"
    with exports.raising(
        FailedSaveError, "is full: the checkpoint of step 5.*4 is complete"
    ):
        checkpointer.wait()
    shards.write = write
    with exports.raising(
        FailedSaveError, r"policy is float32\[2\] in process 0 and .*\[3\] in"
    ):
        checkpointer.save(5, {"policy": np.zeros(2 + me, np.float32)}, {})
    with exports.raising(
        FailedSaveError, "policy has pieces of .*Give it one sharding"
    ):
        where = NamedSharding(Mesh(jax.devices(), "d"), P("d" if me else None))
        policy = jax.make_array_from_callback((8,), where, lambda i: np.zeros(8)[i])
        checkpointer.save(5, {"policy": policy}, {})
    with exports.raising(MismatchedCheckpointError, "is of another model"):
        checkpointer.restore(4, {"policy": np.zeros(3)})
    assert who or me == 1
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4"]


def check_damage(checkpointer):
    """All pass over a checkpoint that process 0 damages."""
    files = (checkpointer.folder / "4" / "arrays").rglob("ocdbt.process_1/d/*")
    if jax.process_index() == 0:
        largest = max(files, key=lambda path: path.stat().st_size)
        data = largest.read_bytes()
        largest.write_bytes(data[:-1] + bytes([data[-1] ^ 0xFF]))
    assert checkpointer.latest_step() == 4  # The sizes are right.
    found = checkpointer.restore_latest(described(make(0, "wide")))
    check(found.arrays, 3, "wide")
    assert found.metadata == {"position": 30}
    assert (checkpointer.folder / "damaged-4").exists()


def check_claims(workdir):
    """One claim for all; a refusal reaches all."""
    with claim_workdir(workdir, {"seed": 0}):
        with exports.raising(WorkdirError, "in use by process"):
            claim_workdir(workdir, {"seed": 0})
    with exports.raising(WorkdirError, "seed was 0 and is 1 now"):
        claim_workdir(workdir, {"seed": 1})
    with exports.raising(
        WorkdirError, "Process 1 was started with another config.*\n  seed"
    ):
        claim_workdir(workdir, {"seed": jax.process_index()})
    claim_workdir(workdir, {"seed": 0}).close()


@contextlib.contextmanager
def pending_call(step):
    """Has all devices of process 0 in a call that others come to only at the end."""
    where = NamedSharding(Mesh(jax.devices(), "d"), P("d"))
    rows = jax.make_array_from_callback((8,), where, lambda index: np.ones(8)[index])
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(where.mesh, P()))
    assert jax.device_get(total(rows)) == 8  # Compiles.
    call = threading.Thread(target=lambda: total(rows).block_until_ready())
    if jax.process_index() == 0:
        call.start()
    begin = time.monotonic()
    yield
    # Gloo gives the others 30 seconds to come; a slow machine may take longer.
    is_late = time.monotonic() - begin > 25
    assert jax.process_index() > 0 or call.is_alive() or is_late
    cluster.barrier(f"the call of {step} was pending")
    if jax.process_index() > 0:
        call.start()
    call.join()


@contextlib.contextmanager
def no_collectives():
    """Fails where processes wait for each other by collectives, or compile."""
    compiled = []

    def listen(event, duration_secs, **_):
        if "compile" in event or "trace" in event:
            compiled.append([event, duration_secs])

    def refuse(*_, **__):
        raise AssertionError("A collective over all devices.")

    names = ("sync_global_devices", "broadcast_one_to_all", "process_allgather")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(multihost_utils, name, refuse)
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def save_until_killed(folder, victim, moment):
    """Saves for ever; a process is killed inside the save of step 4."""
    process, write, list_files = jax.process_index(), shards.write, manifest.write

    def kill(place):
        if process == victim and place.name.startswith("4."):
            os.kill(os.getpid(), signal.SIGKILL)

    def write_half(base, *given):
        if moment == "writes":
            (shards.own_folder(base, process) / "d").mkdir(parents=True)
            kill(base.parent)
        write(base, *given)

    def list_and_end(place, **given):
        list_files(place, **given)
        kill(place)

    shards.write, manifest.write = write_half, list_and_end
    with Checkpointer(folder, keep=2) as checkpointer:
        for step in range(1, 100):
            checkpointer.save(step, make(step, "wide"), {"position": step})
            checkpointer.wait()
