"""Tests of `realjax/runtime/predictions.py`."""

import numpy as np
import pytest

from realjax.algorithms import sft
from realjax.dataflow.plan import make_plan
from realjax.runtime.plan_choice import Chosen
from realjax.runtime.predictions import Predictions, compared


def predictions(is_measured, **seconds):
    plan = make_plan(sft.graph(sft.SFT()), num_devices=1)
    chosen = Chosen(
        plan=plan, origin="search", call_seconds=seconds, is_measured=is_measured
    )
    return Predictions(chosen, warm_up_steps=2)


def told(found, steps, **seconds):
    numbers = {f"timing_s/{name}": value for name, value in seconds.items()}
    return [text for _ in range(steps) for text in found.observe(numbers)]


def test_a_call_that_parts_from_its_prediction_is_told_once():
    found = predictions(True, rollout=1.0, reward=1.0)
    assert found.numbers == {"predicted_s/rollout": 1.0, "predicted_s/reward": 1.0}
    # The first two steps compile, and one or two are no median.
    assert told(found, 4, rollout=9.0, reward=1.2) == []
    (text,) = told(found, 1, rollout=1.3, reward=1.2)
    assert "'rollout' takes 9 s, and the plan expected 1 s" in text
    assert "realjax.cli.profile" in text
    assert told(found, 9, rollout=9.0, reward=1.2) == []
    (text,) = told(found, 60, rollout=9.0, reward=0.7)
    assert "'reward' takes 0.7 s" in text


def test_a_machine_that_was_not_measured_is_told_once_for_all_calls():
    found = predictions(False, rollout=1.0, reward=1.0, value=1.0)
    (text,) = told(found, 30, rollout=9.0, reward=0.5, value=1.1)
    assert "2 of 3 calls" in text
    assert "'rollout' takes 9 s" in text
    assert told(found, 60, rollout=1.0, reward=1.0, value=8.0) == []


def test_predictions_stand_beside_medians_of_later_steps():
    nan = np.nan
    columns = {
        "predicted_s/a": np.array([nan, 2.0, 2.0, 2.0, 2.0, 2.0]),
        "timing_s/a": np.array([nan, 60.0, 50.0, 1.0, 2.0, 3.0]),
        "predicted_s/b": np.array([nan, 2.0, nan, nan, nan, nan]),
        "loss": np.zeros(6),
    }
    assert compared(columns, warm_up_steps=2) == [("a", 2.0, pytest.approx(2.0))]
