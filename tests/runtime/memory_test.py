"""Tests of `realjax/runtime/memory.py`."""

import types

import jax
import pytest

from realjax.runtime import memory
from realjax.runtime.run import Run


def run(memory_gib=0.0):
    """A run of which nothing is known but its config."""
    found = Run.__new__(Run)
    config = types.SimpleNamespace(memory_gib=memory_gib)
    object.__setattr__(found, "config", config)
    return found


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
        monkeypatch.setattr(memory, "Agreement", agreement)


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
    assert memory.device_bytes(run()) == found


def test_a_config_says_how_much_memory_there_is_whatever_devices_say(monkeypatch):
    Devices(monkeypatch, (80,), (78,))
    assert memory.device_bytes(run(memory_gib=2)) == 2 << 30
