"""Runs of options that change the graph, or where its keys come from."""

import io

import numpy as np
import pytest

import realjax
from realjax.core.metrics import read_metrics
from realjax.runtime.console import Console

pytestmark = pytest.mark.slow


def run(config, tmp_path):
    """Metrics of a run on made data, and what it said."""
    text = io.StringIO()
    result = realjax.train(config, tmp_path, console=Console(file=text, width=200))
    assert result.is_finished
    return read_metrics(tmp_path / "metrics.jsonl"), text.getvalue()


def test_a_policy_learns_from_a_teacher_what_it_sampled_itself(tmp_path):
    config = realjax.load_config("distillation.py:debug")
    config.hp.is_on_policy, config.hp.sampling.max_new_tokens = True, 16
    config.data.kind = "prompts"
    for name in ("path", "valid_path"):
        config.data[name] = config.data[name].replace("sft", "prompts")
    metrics, _ = run(config, tmp_path)
    assert (metrics["loss"][1:] > 0).all()
    assert np.isfinite(metrics["nll"][1:]).all()


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_reference_is_stored_in_a_run_of_many_devices(tmp_path, name):
    config = realjax.load_config(f"{name}.py:debug")
    config.hp.stores_reference = True
    metrics, text = run(config, tmp_path)
    assert text.count("stored ref_logprobs in") == 2
    assert len(list((tmp_path / "data").glob("*.stored-*.npz"))) == 2
    assert np.isfinite(metrics["loss"][1:]).all()


def test_online_pairs_are_the_best_and_worst_of_more_than_two(tmp_path):
    config = realjax.load_config("online_dpo.py:debug")
    assert config.hp.completions_per_prompt > 2
    metrics, _ = run(config, tmp_path)
    better = metrics["objective/chosen_scores"] - metrics["objective/rejected_scores"]
    assert (better[1:] > 0).all()
