"""Processes find each other, exchange values on the host, and notice who is missing."""

import signal

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.runtime import cluster
from tests.processes import exchanges
from tests.processes.launch import launch


@pytest.mark.parametrize(
    "num_processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))]
)
def test_values_and_arrays_reach_all_processes_and_nothing_stays(num_processes):
    fetched, left = zip(
        *launch(
            exchanges.fetch_and_exchange,
            num_processes=num_processes,
            num_devices=8 // max(num_processes, 2),
        ),
        strict=True,
    )
    dtypes = {"rows": "float32", "scale": "bfloat16", "last": "int32"}
    assert fetched == (dtypes,) * num_processes
    assert left == ([],) * num_processes


def test_a_failed_process_is_named_to_those_who_wait_for_it():
    (status, text), (other_status, _) = launch(
        exchanges.one_fails, num_processes=2, num_devices=1, may_fail=True
    )
    assert status and other_status
    assert "ClusterError: Process 1 failed: ValueError: the reward of row 3" in text


@pytest.mark.slow
def test_a_failed_process_ends_those_who_wait_for_its_devices():
    (status, text), _ = launch(
        exchanges.one_fails_while_another_waits_for_its_device,
        num_processes=2,
        num_devices=1,
        may_fail=True,
    )
    assert status == 1 and "Process 1 failed: ValueError: the reward of row 3" in text


@pytest.mark.slow
def test_an_error_that_all_have_dealt_with_ends_nothing_later():
    launch(exchanges.all_go_on_after_a_failure, num_processes=2, num_devices=1)


@pytest.mark.slow
def test_a_late_process_is_named():
    message, _ = launch(exchanges.one_is_late, num_processes=2, num_devices=1)
    assert message.startswith("Process 1 did not publish 'late' in time")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_ends_the_others(number):
    (status, text), (killed, _) = launch(
        exchanges.one_is_killed, number, num_processes=2, num_devices=1, may_fail=True
    )
    assert killed == -number and status
    assert "heartbeat" in text


def test_one_process_exchanges_with_itself():
    cluster.start()
    cluster.publish("a", 1)
    cluster.barrier("here")
    assert cluster.collect("a", []) == []
    assert cluster.gather("b", (1, 2)) == [(1, 2)]
    assert cluster.merge("c", {"x": 1}) == {"x": 1}
    fetched = cluster.fetch({"x": jnp.arange(3), "y": np.arange(2)}, "d")
    assert isinstance(fetched["x"], np.ndarray) and fetched["x"].tolist() == [0, 1, 2]
    assert fetched["y"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"coordinator": "a:1"}, "no number of processes"),
        ({"num_processes": 2, "process_index": 0}, "address of process 0 as host:port"),
        (
            {"num_processes": 2, "process_index": 2, "coordinator": "a:1"},
            "process 2 of 2.*0 to 1",
        ),
    ],
)
def test_an_incomplete_start_says_what_is_missing(given, message, monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    with pytest.raises(ValueError, match=message):
        cluster.start(**given)
