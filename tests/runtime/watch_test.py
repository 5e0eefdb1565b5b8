"""Tests of `realjax/runtime/watch.py`."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import pytest

from realjax.realloc.offload import live_bytes
from realjax.runtime.watch import Watch


class Slow:
    """What a call makes, when it is told to."""

    def __init__(self, nbytes, error=""):
        self.nbytes, self.error, self.done = nbytes, error, threading.Event()

    def is_deleted(self):
        return False

    def block_until_ready(self):
        assert self.done.wait(60)
        if self.error:
            raise RuntimeError(self.error)


@contextlib.contextmanager
def behind(kind):
    """A watch whose thread for a kind waits for a call that ends when we leave."""
    slow = Slow(4)
    with contextlib.closing(Watch()) as watch:
        with watch.calling("slow", (0,), step=1, kind=kind) as event:
            event.watch(slow)
        try:
            yield watch
        finally:
            slow.done.set()
        watch.wait()


def on_device(index, size):
    return jax.device_put(jnp.arange(float(size)), jax.devices()[index])


def test_what_was_reloaded_may_be_trained_before_the_watch_gets_there():
    with behind("offload") as watch:
        masters = [on_device(1, 8), on_device(1, 4)]
        with watch.calling("Reload", (1,), step=1, kind="offload") as event:
            event.watch(masters)
        jax.jit(lambda tree: jax.tree.map(jnp.cos, tree), donate_argnums=0)(masters)
        assert all(leaf.is_deleted() for leaf in masters)
    assert [event.name for event in watch.timeline.take()] == ["slow", "Reload"]


def test_a_released_copy_frees_its_memory_whatever_the_watch_waits_for():
    with behind("call") as watch:
        before = live_bytes()
        copy = {"kernel": on_device(1, 1 << 16), "scale": on_device(1, 4)}
        with watch.calling("Move", (1,), step=1, kind="realloc") as event:
            event.watch(copy)
        assert live_bytes() > before + (1 << 16)
        del copy
        # The smallest array alone is still there to be timed.
        assert live_bytes() <= before + 16


def test_a_call_ends_when_its_slowest_output_is_there():
    slow = Slow(64)
    with contextlib.closing(Watch()) as watch:
        with watch.calling("call", (0, 1), step=1) as event:
            event.watch({"fast": on_device(1, 2), "slow": slow})
        # A call on other devices is seen later: the watch waits for this one.
        with watch.calling("next", (2,), step=1) as event:
            event.watch(on_device(2, 2))
        assert not watch.timeline.take()
        slow.done.set()
        watch.wait()
        assert [event.name for event in watch.timeline.take()] == ["call", "next"]


def test_what_went_wrong_in_a_call_is_raised():
    broken = Slow(4, error="out of paper")
    with contextlib.closing(Watch()) as watch:
        with watch.calling("call", (0,), step=1) as event:
            event.watch(broken)
        broken.done.set()
        with pytest.raises(RuntimeError, match="out of paper"):
            watch.wait()
