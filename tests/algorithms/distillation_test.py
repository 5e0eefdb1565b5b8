"""Tests of `realjax/algorithms/distillation.py`."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import distillation
from realjax.core.config import to_dataclass
from realjax.rl import Sampling
from tests.algorithms.oracles import as_arrays, check, ragged

NUM_TOP, V = 3, 6


def completions():
    """Log-probabilities of a teacher's likeliest tokens, and a student's of these."""
    mask, generator = ragged(3, num_padding=1), np.random.default_rng(0)
    logits = generator.normal(size=(2, *mask.shape, V))
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    ids = np.argsort(-logprobs[1], axis=-1)[..., :NUM_TOP]
    student, teacher = (np.take_along_axis(x, ids, axis=-1) for x in logprobs)
    batch = {
        "completion_mask": mask,
        "teacher_logprobs": teacher,
        "logprobs": -generator.exponential(size=mask.shape),
        "entropy": generator.exponential(size=mask.shape),
    }
    return student, batch


def oracle(student, batch, *, hp):
    """The mean KL(teacher ‖ student) over completion tokens, by loops."""
    each = []
    for row, place in zip(*np.nonzero(batch["completion_mask"]), strict=True):
        p, q = (np.exp(x[row, place]) for x in (batch["teacher_logprobs"], student))
        if hp.rest == "bucket":
            p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        else:
            p, q = p / p.sum(), q / q.sum()
        each.append(sum(p * np.log(p / q)))
    return np.mean(each)


@pytest.mark.parametrize("rest", ["bucket", "left_out"])
def test_loss_and_gradient_are_those_of_the_formula(rest):
    hp, (student, batch) = distillation.Distillation(rest=rest), completions()
    bound = functools.partial(distillation.loss, hp=hp)
    check(bound, functools.partial(oracle, hp=hp), student, batch)


def test_metrics_are_means_over_completion_tokens():
    student, batch = completions()
    arrays, mask = as_arrays(batch), batch["completion_mask"]
    hp = distillation.Distillation()
    _, metrics = distillation.loss(jnp.float32(student), arrays, hp=hp)
    covered = np.exp(batch["teacher_logprobs"]).sum(axis=-1)[mask].mean()
    np.testing.assert_allclose(metrics["teacher/covered"].value(), covered, rtol=1e-5)
    nll = -batch["logprobs"][mask].mean()
    np.testing.assert_allclose(metrics["nll"].value(), nll, rtol=1e-5)


def test_the_rollout_is_there_where_it_is_on_policy():
    off = distillation.graph(distillation.Distillation())
    assert off.inputs == ("tokens", "completion_mask")
    sampling = Sampling(max_new_tokens=8, top_k=4)
    hp = distillation.Distillation(is_on_policy=True, sampling=sampling)
    on = distillation.graph(hp)
    assert on.inputs == ("prompts",)
    # What the sampler left out, teacher and policy may find likely.
    assert "kept" not in on.calls["train_policy"].reads


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_top": 0}, "num_top is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"importance_cap": 2.0}, "importance_cap"),
        ({"rest": "all"}, "rest"),
    ],
)
def test_what_is_no_distillation_is_refused(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        to_dataclass(distillation.Distillation, wrong, path="config.hp")
