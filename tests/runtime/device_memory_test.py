"""Tests of `realjax/runtime/device_memory.py`."""

import types

import jax
import pytest

from realjax.runtime import device_memory
from realjax.runtime.run_config import RunConfig


class Devices:
    """Devices of this process, and what the other processes have found."""

    def __init__(self, monkeypatch, limits, others=()):
        stats = [{"bytes_limit": limit} if limit else None for limit in limits]
        devices = [
            types.SimpleNamespace(memory_stats=lambda one=one: one) for one in stats
        ]
        gather = lambda find: [find(), *others]
        agreement = lambda about: types.SimpleNamespace(gather=gather)
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        monkeypatch.setattr(device_memory, "Agreement", agreement)


@pytest.mark.parametrize(
    "limits, others, found",
    (
        ((80, 79), (), 79),
        # Schedules depend on it: two processes must not believe different things.
        ((80, 80), (78, 81), 78),
        # One that does not know how much it has would issue copies in another order.
        ((80,), (0,), 0),
        ((0,), (80,), 0),
    ),
)
def test_the_memory_of_a_device_is_the_least_of_all_processes(
    monkeypatch, limits, others, found
):
    Devices(monkeypatch, limits, others)
    assert device_memory.device_bytes(RunConfig()) == found


def test_a_config_says_how_much_memory_there_is_whatever_devices_say(monkeypatch):
    Devices(monkeypatch, (80,), (78,))
    assert device_memory.device_bytes(RunConfig(memory_gib=2)) == 2 << 30
