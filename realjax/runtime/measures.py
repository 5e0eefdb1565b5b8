"""Numbers and texts that are read off a step: metrics, completions."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from realjax.core.arrays import Bool, Int
from realjax.core.timing import Event
from realjax.data.tokenizer import Tokenizer
from realjax.rl.masking import Mean

Metrics = dict[str, list[Any]]
"""Means still on the device, or numbers of the host, by metric name."""


def completion_texts(
    tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray
) -> tuple[list[str], list[str]]:
    """Text of each prompt and each completion, without special tokens.

    Args:
        tokenizer: decodes.
        tokens: [B, T].
        mask: [B, T], true on completions, which begin where prompts end.
    """
    prompts, completions = [], []
    for row, is_completion in zip(tokens, mask, strict=True):
        first = int(np.argmax(is_completion)) if is_completion.any() else len(row)
        prompts.append(tokenizer.decode(row[:first].tolist()))
        completions.append(tokenizer.decode(row[is_completion].tolist()))
    return prompts, completions


def completion_metrics(
    lengths: Int[np.ndarray, "B"],
    prompt_lengths: Int[np.ndarray, "B"],
    is_truncated: Bool[np.ndarray, "B"],
) -> Metrics:
    """Lengths and ends of a rollout's completions; rows of padding do not count."""
    real = prompt_lengths > 0
    completions = (lengths - prompt_lengths)[real]
    return {
        "completions/mean_length": [float(completions.mean())],
        "completions/min_length": [float(completions.min())],
        "completions/max_length": [float(completions.max())],
        "completions/clipped_ratio": [float(is_truncated[real].mean())],
        "prompts/mean_length": [float(prompt_lengths[real].mean())],
        "val/num_eos_tokens": [float((~is_truncated[real]).sum())],
    }


def call_seconds(events: Iterable[Event]) -> dict[str, float]:
    """Seconds of each call, all its portions together."""
    seconds: dict[str, float] = {}
    for event in events:
        if event.kind in ("call", "host"):
            name = f"timing_s/{event.name}"
            seconds[name] = seconds.get(name, 0.0) + event.seconds
    return seconds


def to_numbers(metrics: Metrics) -> dict[str, float]:
    """Metrics as floats: Means of several minibatches become one mean. Waits."""
    numbers = {}
    for name, parts in metrics.items():
        total = weight = 0.0
        for part in parts:
            is_mean = isinstance(part, Mean)
            total += float(part.total if is_mean else part)
            weight += float(part.weight if is_mean else 1.0)
        summed = name.split("/")[0] in ("skipped", "nonfinite")
        numbers[name] = total if summed else total / weight if weight else 0.0
    return numbers
