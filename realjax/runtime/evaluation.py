"""Evaluation: the run's own graph over held-out data, with nothing updated.

Completions are drawn with the same keys every time, so that numbers before and after
training differ by the parameters alone.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from realjax.data.loader import evaluation_batches
from realjax.functions.function import Generate
from realjax.rl.masking import Mean
from realjax.runtime.console import Console
from realjax.runtime.executor import Executor, completion_texts, to_numbers
from realjax.runtime.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured.

    Attributes:
        numbers: metrics under "eval/", means over the whole held-out data.
        samples: prompt, completion and score of the first few completions.
    """

    numbers: dict[str, float]
    samples: list[dict[str, Any]]


def evaluate(run: Run, executor: Executor, console: Console, when: str) -> Evaluation:
    """Measures every batch of the held-out data.

    Args:
        run: whose held-out data it is.
        executor: holds the parameters.
        console: shows progress.
        when: a word for the progress bar.
    """
    assert run.valid_data is not None
    config = run.config.data
    size = config.valid_batch_size or config.batch_size
    batches = list(evaluation_batches(run.valid_data, size))
    totals: dict[str, list[Any]] = {}
    samples: list[dict[str, Any]] = []
    scores: list[np.ndarray] = []
    with console.progress(f"evaluation {when}", len(batches)) as advance:
        for index, batch in enumerate(batches):
            metrics, buffer = executor.run(batch, step=index, training=False)
            count = float(np.sum(batch.ids >= 0))
            for name, parts in metrics.items():
                totals.setdefault(name, []).extend(
                    part
                    if isinstance(part, Mean)
                    else Mean(jnp.float32(part * count), jnp.float32(count))
                    for part in parts
                )
            if len(samples) < run.config.evaluation.num_samples:
                samples += _samples(run, buffer)
            if "scores" in buffer:
                scores.append(buffer.host("scores")[buffer.ids >= 0])
            advance()
    numbers = to_numbers(totals)
    skip = ("learning_rate", "grad_norm", "skipped", "nonfinite")
    numbers = {
        f"eval/{name}": value
        for name, value in numbers.items()
        if not name.startswith(skip)
    }
    if scores:
        every = np.concatenate(scores)
        numbers["eval/scores_mean"] = float(every.mean())
        numbers["eval/scores_standard_error"] = float(
            every.std(ddof=1) / np.sqrt(len(every)) if len(every) > 1 else 0.0
        )
    return Evaluation(
        numbers=numbers, samples=samples[: run.config.evaluation.num_samples]
    )


def _samples(run: Run, buffer) -> list[dict[str, Any]]:
    """Texts and scores of a batch's completions, if it has any."""
    if not any(isinstance(c.function, Generate) for c in run.graph.calls.values()):
        return []
    rows = np.flatnonzero(buffer.ids >= 0)
    prompts, completions = completion_texts(
        run.tokenizer,
        buffer.host("tokens")[rows],
        buffer.host("completion_mask")[rows],
    )
    scores = buffer.host("scores")[rows] if "scores" in buffer else [None] * len(rows)
    return [
        {
            "prompt": prompt,
            "completion": completion,
            "score": None if score is None else float(score),
        }
        for prompt, completion, score in zip(prompts, completions, scores, strict=True)
    ]
