"""What the rollout bench measures: a model and its engines, and times in turn."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.bench.quick import spread
from realjax.bench.rollout_options import Options
from realjax.core.arrays import Array, Int, Key, PyTree
from realjax.functions.packed import ModelProgram
from realjax.models import heads, transformer
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.rl.sampling import Sampling
from realjax.rollout.engine import Engine
from realjax.rollout.settings import Settings
from realjax.runtime.console import Console

NO_EOS = (-1,)
"""Completions end by their limits, so that all sides do equal work."""

NEAR_TIE = 1e-3
"""Logits so close may change places where sums are rounded otherwise."""

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

Prompts = dict[str, np.ndarray]


class Subject:
    """A model with random parameters on one device.

    Attributes:
        options: of the bench.
        program: the model.
        parameters: drawn.
        console: for progress, on the standard error.
    """

    def __init__(self, options: Options):
        """Draws the parameters."""
        self.options = options
        self.mesh = make_mesh(Allocation.parse("d1"))
        self.program = ModelProgram(
            config=options.model,
            dtype=options.dtype,
            partition=partition_for(self.mesh),
        )
        self.console = Console(sys.stderr)
        self.parameters = _drawn(options)

    @property
    def key(self) -> Key[Array, ""]:
        """Of every rollout."""
        return jax.random.key(7)

    def engine(
        self,
        width: int,
        sampling: Sampling,
        *,
        eos_ids: tuple[int, ...] = NO_EOS,
        **settings: Any,
    ) -> Engine:
        """An engine for rows of so many tokens, which has compiled nothing yet."""
        chosen = {"slots": self.options.sizes.slots, **self.options.engine, **settings}
        return Engine(
            self.program,
            self.mesh,
            sampling,
            eos_ids=eos_ids,
            width=width,
            settings=Settings(**chosen),
        )

    def prompts(self, count: int, length: int, seed: int = 0) -> Prompts:
        """Random prompts of one length."""
        generator = np.random.default_rng(seed)
        shape = (count, length)
        return {
            "prompts": generator.integers(
                2, self.options.model.vocab_size, shape
            ).astype(np.int32),
            "lengths": np.full(count, length, np.int32),
            "ids": np.arange(count, dtype=np.uint32),
        }

    def interleaved(
        self, what: str, sides: Mapping[str, Callable[[], Any]]
    ) -> dict[str, list[float]]:
        """Seconds of each side, in turn, after one round that is not counted."""
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        total = (self.options.repetitions + 1) * len(sides)
        with self.console.progress(what, total, unit="runs") as advance:
            for _ in range(self.options.repetitions + 1):
                for name, side in sides.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(side())
                    seconds[name].append(time.perf_counter() - begin)
                    advance()
        return {name: found[1:] for name, found in seconds.items()}

    def check_tokens(
        self, what: str, found: Int[np.ndarray, "B T"], expected: Int[np.ndarray, "B T"]
    ) -> float:
        """Check that greedy rows are alike up to near ties; return the share alike.

        After the first token that differs a row is another; there, both must be as
        good as equal, by a pass over the whole row.

        Raises:
            RuntimeError: they are not.
        """
        places = np.argmax(found != expected, axis=1)
        rows = np.flatnonzero(np.any(found != expected, axis=1))
        for row in rows:
            place = int(places[row])
            logits = self._next_logits(expected[row], place)
            gap = abs(logits[found[row, place]] - logits[expected[row, place]])
            if gap > NEAR_TIE:
                raise RuntimeError(
                    f"{what}: row {row} has token {found[row, place]} at {place} and"
                    f" not {expected[row, place]}; their logits differ by {gap:.2g}."
                    " Its time says nothing."
                )
        return 1 - len(rows) / len(found)

    def _next_logits(self, tokens: Int[np.ndarray, " T"], place: int) -> np.ndarray:
        """Logits for the token at a place of a row, without a cache."""
        row = jnp.asarray(tokens)[None]
        positions = jnp.arange(row.shape[1], dtype=jnp.int32)[None]
        hidden = transformer.hidden_states(
            self.parameters,
            self.options.model,
            row,
            positions,
            jnp.ones_like(row),
            dtype=jnp.dtype(self.options.dtype),
        )
        chosen = hidden[:, place - 1]
        return np.asarray(heads.logits(self.parameters, self.options.model, chosen))[0]


def _drawn(options: Options) -> PyTree:
    """Random parameters, in the type that they are computed with."""

    @jax.jit
    def draw(key) -> PyTree:
        tree = transformer.init_parameters(options.model, key)
        return jax.tree.map(lambda x: x.astype(options.dtype), tree)

    return draw(jax.random.key(0))


def check_equal_rows(
    what: str, found: np.ndarray, expected: np.ndarray, least: float = 0.9
) -> float:
    """Check that most sampled rows are alike; return the share that is.

    A draw that falls on the border of two tokens may go either way where sums are
    rounded otherwise, and what follows is another row.

    Raises:
        RuntimeError: too few are.
    """
    alike = float(np.all(found == expected, axis=1).mean())
    if alike < least:
        raise RuntimeError(
            f"{what}: {alike:.0%} of the rows have the same tokens, and at least"
            f" {least:.0%} should. Its time says nothing."
        )
    return alike


def ratio(
    slow: Sequence[float], fast: Sequence[float], digits: int = 3
) -> dict[str, float]:
    """How many times the seconds of one side are those of the other, run by run."""
    pairs = zip(slow, fast, strict=True)
    return spread([one / other for one, other in pairs], digits=digits)


@dataclasses.dataclass
class Compiled:
    """Programs that were compiled."""

    count: int = 0


@contextlib.contextmanager
def compilations() -> Iterator[Compiled]:
    """Counts what is compiled in between, by whomever."""
    compiled = Compiled()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        compiled.count += event == COMPILE_EVENT

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
