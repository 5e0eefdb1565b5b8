"""Evaluation: the run's own graph over held-out data, with nothing updated.

Completions are drawn with the same keys every time, so that numbers before and after
training differ by the parameters alone. What takes completions that the graph does not
make, win rates and pass@k, is measured by `trials`.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from realjax.data.loader import evaluation_batches
from realjax.functions.function import Generate
from realjax.functions.score import RewardWorkers
from realjax.rl.masking import Mean
from realjax.runtime.console import Console
from realjax.runtime.executor import Executor
from realjax.runtime.measures import to_numbers
from realjax.runtime.run import Run
from realjax.runtime.trials import Trials, samples_of, with_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured.

    Attributes:
        numbers: metrics under "eval/", means over the whole held-out data.
        samples: prompt, completion and score of the first few completions.
    """

    numbers: dict[str, float]
    samples: list[dict[str, Any]]


def evaluate(
    run: Run,
    executor: Executor,
    console: Console,
    when: str,
    trials: Trials | None = None,
) -> Evaluation:
    """Measures every batch of the held-out data.

    Args:
        run: whose held-out data it is.
        executor: holds the parameters.
        console: shows progress.
        when: a word for the progress bar.
        trials: of the run, which keep what they compiled; made anew where the run has
            some and None are given.
    """
    assert run.valid_data is not None
    config, rewards = run.config, run.config.evaluation.other_rewards
    size = config.data.valid_batch_size or config.data.batch_size
    rows = executor.calls.rows_here(size * run.valid_data.rows_per_record)
    batches = list(evaluation_batches(run.valid_data, size, rows))
    totals: dict[str, list[Any]] = {}
    scores: dict[str, list[np.ndarray]] = {}
    samples: list[dict[str, Any]] = []
    failed: dict[str, float] = {}
    workers = RewardWorkers(rewards) if rewards and _generates(run) else None
    with (
        workers or contextlib.nullcontext(),
        console.progress(f"evaluation {when}", len(batches)) as advance,
    ):
        for index, batch in enumerate(batches):
            metrics, buffer = executor.run(batch, step=index, training=False)
            real = np.flatnonzero(batch.ids >= 0)
            for name, parts in metrics.items():
                totals.setdefault(name, []).extend(
                    part if isinstance(part, Mean) else _mean(part, len(real))
                    for part in parts
                )
            found = {}
            if "scores" in buffer:
                scored = executor.calls.fetch(buffer, "scores")["scores"]
                found["scores"] = scored[buffer.ids >= 0]
            texts = executor.calls.texts(buffer) if _generates(run) else None
            if workers is not None and texts is not None:
                found |= workers.score_each(*texts)
            for name, values in found.items():
                scores.setdefault(name, []).append(values)
            if texts is not None and len(samples) < config.evaluation.num_samples:
                samples += samples_of(texts, found.get("scores"))
            advance()
        if workers is not None:
            failures = workers.num_failures.items()
            failed = {f"eval/rewards/{n}/failures": float(c) for n, c in failures}
    skipped = ("learning_rate", "grad_norm", "skipped", "nonfinite")
    numbers = {
        f"eval/{name}": value
        for name, value in executor.calls.merged(to_numbers(totals)).items()
        if not name.startswith(skipped)
    }
    for name, parts in scores.items():
        numbers |= with_error(f"eval/{name}_mean", np.concatenate(parts))
    if run.trials:
        found, first = (trials or Trials(run, executor)).measure(console, when)
        numbers, samples = numbers | found, samples or first
    return Evaluation(
        numbers=numbers | failed, samples=samples[: config.evaluation.num_samples]
    )


def show_change(columns: Mapping[str, np.ndarray], console: Console) -> None:
    """Shows what evaluation found first and last, side by side.

    Args:
        columns: metrics of a run, aligned by step.
        console: where.
    """
    rows = []
    for name, values in columns.items():
        measured = values[np.isfinite(values)]
        shown = ("loss", "ppl", "accuracy", "scores", "_mean", "_error", "kl")
        is_shown = name.endswith((*shown, "win_rate")) or "pass@" in name
        if name.startswith("eval/") and len(measured) > 1 and is_shown:
            rows.append((name.removeprefix("eval/"), measured[0], measured[-1]))
    if rows:
        console.table("held-out data", ("", "first", "last"), rows)


def _generates(run: Run) -> bool:
    return any(isinstance(c.function, Generate) for c in run.graph.calls.values())


def _mean(value: float, weight: int) -> Mean:
    return Mean(jnp.float32(value * weight), jnp.float32(weight))
