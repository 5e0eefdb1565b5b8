"""Tests of `realjax/bench/published_steps.py` and `published_sweep.py`."""

import dataclasses
import functools
import json

import pytest

from realjax.bench import published_steps as bench
from realjax.bench import published_sweep
from realjax.bench.published_steps import Predictor, PublishedStep
from realjax.planner.heuristic import templates

SMALL = PublishedStep(policy=7, critic=7, new_tokens=384, gpus=8)


@functools.cache
def coefficients():
    return bench.load_coefficients()


@functools.cache
def errors():
    return bench.fitted(bench.read_rows())


def test_steps_of_reals_heuristic_plan_are_predicted_without_having_seen_them():
    found = errors()["errors_of_steps_left_out"]
    assert len(found["of_each"]) == 15
    assert found["mean"] < 0.08
    assert found["worst"] < 0.20


def test_sizes_of_models_are_predicted_from_others():
    found = errors()["errors_of_sizes_left_out"]
    assert found["mean"] < 0.08
    assert found["worst"] < 0.20


def test_the_stored_coefficients_are_those_of_the_command():
    stored = dataclasses.asdict(coefficients())
    assert errors()["coefficients"] == pytest.approx(stored, rel=1e-3)
    # No device is faster than its data sheet.
    rates = ("products", "memory", "link", "network", "host")
    assert min(stored[name] for name in rates) >= 1


def test_a_step_has_the_paper_s_tokens_unless_it_says_otherwise():
    assert PublishedStep(policy=7, critic=7, new_tokens=896).batch == 128
    assert PublishedStep(policy=7, critic=7, batch=100).batch == 100
    with pytest.raises(ValueError, match=r"8 billion parameters; give one of 7, 13"):
        PublishedStep(policy=8, critic=7)
    with pytest.raises(ValueError, match=r"12 GPUs, and nodes of 8"):
        PublishedStep(policy=7, critic=7, gpus=12)


def test_the_command_predicts_any_row(capsys):
    arguments = "--policy=34 --critic=7 --new_tokens=128 --batch=512 --gpus=32"
    assert bench.main([*arguments.split(), "--plan=template"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["allocation"] == "t8s4@0-31"
    assert found["seconds"] == pytest.approx(34.03, rel=0.2)  # As the paper has it.


def test_simulated_the_template_takes_its_calls_one_after_another():
    space = bench.reals_space(SMALL, coefficients())
    sequential, _ = templates(space)
    assert sequential.is_fitting
    strategies = {place.strategy for place in space.chosen(sequential.plan).values()}
    assert strategies == {"t8"}
    seconds = Predictor(SMALL, coefficients()).template()["seconds"]
    assert sequential.seconds == pytest.approx(seconds, rel=0.02)


@pytest.mark.slow
def test_a_searched_plan_is_no_slower_than_the_others():
    row = published_sweep.row_of(Predictor(SMALL, coefficients(), moves=256))
    assert row["searched"]["seconds"] <= row["symmetric"]["seconds"]
    assert row["searched"]["seconds"] <= 0.95 * row["template"]["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "critic", "gpus"),
    [(13, 7, 16), (7, 34, 32), (34, 34, 64), (70, 7, 64), (70, 70, 128)],
)
def test_nor_is_one_of_larger_models(policy, critic, gpus):
    step = PublishedStep(policy=policy, critic=critic, gpus=gpus)
    row = published_sweep.row_of(Predictor(step, coefficients()))
    seconds = {plan: row[plan]["seconds"] for plan in bench.PLANS}
    assert seconds["searched"] <= min(seconds["symmetric"], seconds["template"])


def a_row(policy, critic, searched):
    step = PublishedStep(policy=policy, critic=critic)
    found = {"does_not_fit": "70 GiB"}
    if searched:
        ours, reals = {"seconds": searched}, {"seconds": searched + 1}
        found = ours | {"options": "ours", "of_ours": ours, "of_reals": reals}
    return dataclasses.asdict(step) | {
        "template": {"seconds": 40.0},
        "symmetric": {"seconds": 30.0},
        "searched": found,
    }


@pytest.mark.slow
def test_a_sweep_says_where_a_searched_plan_is_slower():
    rows = [a_row(7, 7, 20.0), a_row(7, 13, 32.0), a_row(13, 7, None)]
    found = published_sweep.summary(rows)
    assert (found["num_steps"], found["num_fitting"]) == (3, 2)
    assert found["mean_gain_over_template"] == pytest.approx((0.5 + 0.2) / 2)
    assert found["least_gain_over_template"] == pytest.approx(0.2)
    assert found["num_best_of_our_options"] == 2
    assert found["num_our_options_slower_than_template"] == 0
    assert found["slower_than"]["template"] == []
    assert found["slower_than"]["symmetric"] == [{"policy": 7, "critic": 13, "gpus": 8}]
    drawn = published_sweep.picture(rows)
    for words in ("50 %", "20 %", "–", "8 GPUs", "13B"):
        assert f">{words}</text>" in drawn
