"""What the processes of `cluster_test.py` do."""

import contextlib
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from realjax.runtime import cluster


def store():
    from jax._src import distributed

    return distributed.global_state.client


def exchange():
    me, num = jax.process_index(), jax.process_count()
    big = np.arange(700_000, dtype=np.float32) + me  # Three chunks.
    values = cluster.gather(
        "values", {"me": me, "small": np.float32(me).astype(jnp.bfloat16), "big": big}
    )
    for process, value in enumerate(values):
        assert value["me"] == process and value["small"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(value["big"], big - me + process)
    merged = cluster.merge("metrics", {f"only/{me}": me, "all": me})
    assert merged == {"all": 0} | {f"only/{p}": p for p in range(num)}
    if me == num - 1:
        cluster.publish("one", [1.5, None, "text"], to=[0])
    if me == 0 and num > 1:
        assert cluster.collect("one", [num - 1]) == [[1.5, None, "text"]]
    cluster.barrier("end")
    # The last barrier may still be read by others.
    left = [] if num == 1 else store().key_value_dir_get_bytes("realjax/exchange/")
    return [name for name, _ in left if "barrier" not in name]


def fetch():
    devices = np.array(jax.devices())
    values = {
        "rows": np.arange(32, dtype=np.float32).reshape(8, 4),
        "scale": np.float32(3).astype(jnp.bfloat16),
        "last": np.arange(6),
    }
    where = {
        "rows": NamedSharding(Mesh(devices, "d"), PartitionSpec("d")),
        "scale": NamedSharding(Mesh(devices, "d"), PartitionSpec()),
        "last": NamedSharding(Mesh(devices[-2:], "d"), PartitionSpec("d")),
    }
    make = lambda x, s: jax.make_array_from_callback(
        x.shape, s, lambda index: x[index], dtype=x.dtype
    )
    tree = jax.tree.map(make, values, where)
    everywhere = cluster.fetch(tree, "all")
    jax.tree.map(np.testing.assert_array_equal, everywhere, values)
    first = cluster.fetch(tree, "first", to=[0])
    assert (first is None) == (jax.process_index() != 0)
    return {key: value.dtype.name for key, value in everywhere.items()}


def fetch_and_exchange():
    return fetch(), exchange()


def one_fails():
    if jax.process_index() == 1:
        raise ValueError("the reward of row 3 is not a number")
    cluster.barrier("never")


def all_go_on_after_a_failure():
    with contextlib.suppress(ValueError), cluster.telling_failures():
        raise ValueError("the config names 9 devices, and there are 2")
    with cluster.telling_failures():
        if jax.process_index() == 1:
            time.sleep(4)  # The other looks whether this one has failed.
        cluster.barrier("together again")


def one_is_late():
    if jax.process_index() == 0:
        try:
            cluster.gather("late", 0, timeout_seconds=1)
        except cluster.ClusterError as error:
            return str(error)
    else:
        time.sleep(2)
        return None


def one_is_killed(number):
    if jax.process_index() == 1:
        os.kill(os.getpid(), number)
    cluster.barrier("never")


def one_fails_while_another_waits_for_its_device():
    ours, theirs = (SingleDeviceSharding(device) for device in jax.devices())
    if jax.process_index() == 1:
        raise ValueError("the reward of row 3 is not a number")
    sent = cluster.handle((8,), np.float32, theirs)
    jax.block_until_ready(jax.device_put(sent, ours))
