"""What a plan expected of every call, beside what was measured.

predicted_s/rollout    of the plan, the same in every step
timing_s/rollout       of the step
"""

import collections
import math
import statistics
from collections.abc import Mapping

import numpy as np

from realjax.runtime.plan_choice import Chosen

PREDICTED, MEASURED = "predicted_s/", "timing_s/"

MOST_APART = 0.25
"""Of the predicted seconds: a call that takes more or less than that is told."""

_LEAST_STEPS, _MOST_STEPS = 3, 50
_ADVICE = (
    "Measure this machine with `python -m realjax.cli.profile`; the next plan is made"
    " with what it finds."
)


class Predictions:
    """Compares measured steps with a plan; says once of a call that they part.

    Args:
        chosen: the plan.
        warm_up_steps: first steps that compile and do not count.
    """

    def __init__(self, chosen: Chosen, *, warm_up_steps: int):
        self._predicted = dict(chosen.call_seconds)
        self._is_measured = chosen.is_measured
        self._num_unseen = warm_up_steps
        self._seconds: dict[str, collections.deque[float]] = {
            name: collections.deque(maxlen=_MOST_STEPS) for name in self._predicted
        }
        self._told: set[str] = set()

    @property
    def numbers(self) -> dict[str, float]:
        """Metrics of any step."""
        return {f"{PREDICTED}{name}": s for name, s in self._predicted.items()}

    def observe(self, numbers: Mapping[str, float]) -> list[str]:
        """Take a step's metrics; return what is to be told now.

        Args:
            numbers: of the step, the same in all processes.
        """
        self._num_unseen -= 1
        if self._num_unseen >= 0:
            return []
        parted = {}
        for name, seconds in self._seconds.items():
            if f"{MEASURED}{name}" in numbers:
                seconds.append(numbers[f"{MEASURED}{name}"])
            if name not in self._told and len(seconds) >= _LEAST_STEPS:
                median = statistics.median(seconds)
                if _is_apart(self._predicted[name], median):
                    parted[name] = (self._predicted[name], median)
        self._told |= parted.keys()
        if not parted:
            return []
        if self._is_measured:
            return [f"{_told(name, *both)} {_ADVICE}" for name, both in parted.items()]
        # Of a machine that nobody measured, one word is enough.
        self._told |= self._predicted.keys()
        worst = max(parted, key=lambda name: _ratio(*parted[name]))
        return [
            f"{len(parted)} of {len(self._predicted)} calls take other times than the"
            f" plan expected, which knows no measured figures of this machine:"
            f" {_told(worst, *parted[worst])} {_ADVICE}"
        ]


def compared(
    columns: Mapping[str, np.ndarray], *, warm_up_steps: int
) -> list[tuple[str, float, float]]:
    """Return each call with its predicted and its median measured seconds.

    Args:
        columns: metrics of a run, aligned by step.
        warm_up_steps: first steps that do not count, where there are more.
    """
    rows = []
    for name, predicted in columns.items():
        call = name.removeprefix(PREDICTED)
        measured = columns.get(f"{MEASURED}{call}")
        if not name.startswith(PREDICTED) or measured is None:
            continue
        known = measured[np.isfinite(measured)]
        known = known[warm_up_steps:] if len(known) > warm_up_steps else known
        expected = predicted[np.isfinite(predicted)]
        if len(known) and len(expected):
            rows.append((call, float(expected[-1]), float(np.median(known))))
    return rows


def _is_apart(predicted: float, measured: float) -> bool:
    return abs(measured - predicted) > MOST_APART * predicted


def _ratio(predicted: float, measured: float) -> float:
    return abs(math.log(max(measured, 1e-9) / max(predicted, 1e-9)))


def _told(name: str, predicted: float, measured: float) -> str:
    return (
        f"call {name!r} takes {measured:.3g} s, and the plan expected"
        f" {predicted:.3g} s."
    )
