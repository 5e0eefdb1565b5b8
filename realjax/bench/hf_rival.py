"""Hugging Face `generate` on the same weights and prompts, in a process of its own.

It runs under an interpreter that has PyTorch and transformers, neither of which is part
of this project, by `tests/parity/serve_generate.py`. The process stays alive and
generates when it is asked to, so that both sides are measured in turn.
"""

import json
import pathlib
import subprocess
import tempfile
import time
from typing import Any

import jax
import numpy as np

from realjax.bench.quick import rates
from realjax.bench.rollout_sections import greedy_work
from realjax.bench.rollout_subject import Subject, ratio
from realjax.core.arrays import Int
from realjax.models import hf

SERVER = pathlib.Path(__file__).parents[2] / "tests" / "parity" / "serve_generate.py"
CACHES = ("dynamic", "static")
"""Forms of `generate`: its default, and with keys and values of a fixed size."""

QUIET_SECONDS = 0.3
"""After PyTorch's turn, until its threads do not spin any more."""


class Rival:
    """The process; generates greedily from prompts of one length."""

    def __init__(
        self,
        python: pathlib.Path,
        folder: pathlib.Path,
        prompts: Int[np.ndarray, "B P"],
        new_tokens: int,
        dtype: str,
    ):
        """Starts it, and waits until the model is loaded.

        Raises:
            FileNotFoundError: this is no checkout with tests.
            RuntimeError: it does not run.
        """
        if not SERVER.exists():
            raise FileNotFoundError(
                f"There is no {SERVER}. Run the bench from a checkout of the"
                " repository, or leave out --hf_python."
            )
        self.folder, self.python = folder, python
        np.save(folder / "prompts.npy", prompts)
        self._process = subprocess.Popen(
            [str(python), str(SERVER), str(folder), str(new_tokens), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._answer()

    def __call__(self, cache: str) -> float:
        """Generate with one form of cache; return the seconds that it took there."""
        assert self._process.stdin is not None
        self._process.stdin.write(cache + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def tokens(self, cache: str) -> Int[np.ndarray, "B T"]:
        """Prompts and completions of the last call with that cache."""
        return np.load(self.folder / f"{cache}.npy").astype(np.int32)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.python} {SERVER.name} ended with {self._process.wait()}; see"
                " above. It needs PyTorch and transformers."
            )
        return json.loads(line)

    def __enter__(self) -> "Rival":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process: it has no more to read."""
        self._process.communicate()


def beside_hf(subject: Subject) -> dict[str, Any]:
    """Greedy completions of equal length, of the engine and of `generate`."""
    options, sizes = subject.options, subject.options.sizes
    if options.hf_python is None:
        return {"left_out": "no --hf_python"}
    prompts, sampling, width = greedy_work(subject)
    engine = subject.engine(width, sampling)
    ours: list[float] = []
    seconds: dict[str, list[float]] = {cache: [] for cache in CACHES}

    def run():
        begin = time.perf_counter()
        found = engine(subject.parameters, prompts, subject.key).tokens
        jax.block_until_ready(found)
        return found, time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        hf.save(folder / "model", options.model, subject.parameters)
        with Rival(
            options.hf_python, folder, prompts["prompts"], sizes.equal, options.dtype
        ) as rival:
            expected, alike = np.asarray(run()[0]), {}
            for cache in CACHES:
                rival(cache)  # As ours, once to warm up.
                alike[cache] = subject.check_tokens(
                    f"generate with a {cache} cache", rival.tokens(cache), expected
                )
            total = options.repetitions * (1 + len(CACHES))
            with subject.console.progress("beside generate", total) as advance:
                for _ in range(options.repetitions):
                    ours.append(run()[1])
                    advance()
                    for cache in CACHES:
                        seconds[cache].append(rival(cache))
                        advance()
                    time.sleep(QUIET_SECONDS)
            versions = rival.versions
    useful = sizes.slots * sizes.equal
    best = min(CACHES, key=lambda cache: sorted(seconds[cache])[len(ours) // 2])
    return {
        **versions,
        "rows": sizes.slots,
        "prompt": sizes.prompt,
        "completion": sizes.equal,
        "rows_alike": alike,
        "tokens_per_second": {
            "engine": rates(useful, ours),
            **{cache: rates(useful, seconds[cache]) for cache in CACHES},
        },
        "best_cache": best,
        "times_generate": ratio(seconds[best], ours),
    }
