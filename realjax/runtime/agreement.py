"""What several processes settle among themselves, so that all of them go the same way.

    decide(find)     process 0 finds it out, and all get what it found, or its error
    together(act)    all do it, each its part; where it fails in one, it fails in all
    gather(act)      the same, and all get what each has found

They wait for each other on the host, as `cluster` does, and no device takes part. With
one process these are calls of the functions.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax

from realjax.runtime import cluster

TIMEOUT_SECONDS = 3600.0
"""How long to wait for a process, which may be writing a large model."""

# Of the agreements made in this process. All processes make them in the same order.
_NUMBERS = itertools.count()

# What an error of another process may be here: classes made of one text.
_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
)


class Agreement:
    """One matter; every process makes it and calls the same methods in one order.

    What is found must be what `cluster.gather` can send. Threads that settle different
    things need agreements of their own, made before the threads start.

    Args:
        about: what it is about; part of the keys of the exchanges.
        errors: more classes of errors that another process may raise here too, each
            made of its text. Others become a `ClusterError`.
        timeout_seconds: how long to wait for another process.
    """

    def __init__(
        self,
        about: str,
        *,
        errors: tuple[type[Exception], ...] = (),
        timeout_seconds: float = TIMEOUT_SECONDS,
    ):
        self._key = f"agreement/{next(_NUMBERS)}/{about}"
        self._exchanges = itertools.count()
        self._timeout_seconds = timeout_seconds
        self._errors = {error.__name__: error for error in (*_ERRORS, *errors)}

    def decide[T](self, find: Callable[[], T]) -> T:
        """Return what process 0 finds; only there `find` is called.

        Raises:
            Exception: what `find` raised there, if it is one of the known errors.
            ClusterError: what it raised, otherwise.
        """
        found = self._outcomes(find if jax.process_index() == 0 else lambda: None)
        if "error" in found[0]:
            kind, text = found[0]["error"]
            if kind in self._errors:
                raise self._errors[kind](text)  # It is as true here as there.
            raise cluster.ClusterError(f"Process 0 failed: {kind}: {text}")
        return found[0]["value"]

    def gather[T](self, act: Callable[[], T]) -> list[T]:
        """Act in every process; return what each found, in their order.

        Raises:
            Exception: what `act` raised here; else what the first other process raised,
                if it is one of the known errors, with the process before its text.
            ClusterError: what the first other process raised, otherwise.
        """
        found = self._outcomes(act)
        for process, outcome in enumerate(found):
            if "error" in outcome:
                kind, text = outcome["error"]
                if kind in self._errors:
                    raise self._errors[kind](f"Process {process}: {text}")
                raise cluster.ClusterError(f"Process {process} failed: {kind}: {text}")
        return [outcome["value"] for outcome in found]

    def together[T](self, act: Callable[[], T]) -> T:
        """Act in every process; return what this one found, once all have succeeded.

        Raises:
            Exception: as `gather` does.
        """
        found: list[T] = []
        self.gather(lambda: found.append(act()))
        return found[0]

    def _outcomes(self, act: Callable[[], Any]) -> list[dict[str, Any]]:
        if jax.process_count() == 1:
            return [{"value": act()}]
        own: Exception | None = None
        try:
            outcome = {"value": act()}
        except Exception as error:
            own, outcome = error, {"error": [type(error).__name__, str(error)]}
        found = cluster.gather(
            f"{self._key}/{next(self._exchanges)}",
            outcome,
            timeout_seconds=self._timeout_seconds,
        )
        if own is not None:
            raise own
        return found
