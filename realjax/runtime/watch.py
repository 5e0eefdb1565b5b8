"""When each call began and ended, observed without holding up dispatch.

A thread waits for the outputs of every call in the order they were issued. A call
began when it was issued, or when the last call before it that shares a device ended,
whichever was later. Offloads and reloads are not calls: they go beside them, and begin
when they are issued; another thread waits for those.

Observing keeps no memory: what has been dropped or given away is not waited for. Of
each output only the smallest array is held, so that there is something to time.
"""

import concurrent.futures
import contextlib
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from realjax.core.timing import Timeline


class Outputs:
    """What a call has made, for the watch to wait for."""

    def __init__(self):
        """Nothing yet."""
        self._held: list[Any] = []
        self._seen: list[weakref.ref] = []

    def watch(self, tree: Any) -> None:
        """Adds arrays; a copy may be released or trained while the watch is behind."""
        leaves = jax.tree.leaves(tree)
        self._seen += [weakref.ref(leaf) for leaf in leaves]
        if leaves:
            self._held.append(min(leaves, key=lambda leaf: leaf.nbytes))

    def wait(self) -> None:
        """Waits for those that are still there; then nothing is held any more."""
        for seen in self._seen:
            leaf = seen()
            if leaf is None or leaf.is_deleted():
                continue
            try:
                leaf.block_until_ready()
            except RuntimeError:
                # A train step may have taken the array just now.
                if not leaf.is_deleted():
                    raise
        self._held.clear()


class Watch:
    """Fills a timeline from the side.

    Attributes:
        timeline: what has been observed; complete after `wait`.
    """

    def __init__(self, timeline: Timeline | None = None):
        """Starts the threads."""
        self.timeline = timeline or Timeline()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "watch")
        self._beside = concurrent.futures.ThreadPoolExecutor(1, "watch-offload")
        self._pending: list[concurrent.futures.Future] = []
        self._free: dict[int, float] = {}

    @contextlib.contextmanager
    def calling(
        self, name: str, devices: Iterable[int] = (), *, step: int, kind: str = "call"
    ) -> Iterator[Outputs]:
        """Observes a call; give what it makes to the object this yields.

        Args:
            name: of the call.
            devices: that it runs on; none for work of the host.
            step: of the run.
            kind: "call", "realloc", "offload" or "host".
        """
        begin, outputs = time.perf_counter(), Outputs()
        yield outputs
        issued = time.perf_counter()
        thread = self._beside if kind == "offload" else self._thread
        self._pending.append(
            thread.submit(
                self._observe, name, tuple(devices), begin, issued, outputs, step, kind
            )
        )

    def _observe(self, name, devices, begin, issued, outputs, step, kind) -> None:
        outputs.wait()
        end = time.perf_counter() if devices else issued
        start = begin
        if kind != "offload":
            start = max([begin, *(self._free.get(device, 0.0) for device in devices)])
            for device in devices:
                self._free[device] = end
        self.timeline.add(name, min(start, end), end, devices, kind, step=step)

    def wait(self) -> None:
        """Waits for everything issued; raises what went wrong."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def close(self) -> None:
        """Ends the threads."""
        self._beside.shutdown(wait=True, cancel_futures=True)
        self._thread.shutdown(wait=True, cancel_futures=True)
