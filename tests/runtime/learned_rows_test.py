"""Tests of `Train.only`: rows that nothing is learned from are in no minibatch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.dataflow import DataflowGraph, call
from realjax.functions import Generate, Train, Transform
from realjax.rl import Mean, Sampling
from tests.runtime.small_rollouts import make_executor, prompts_of


def selection(batch, *, keeps):
    """Of every group of so many completions the first is learned from, or of none."""
    mask = batch["completion_mask"]
    is_kept = (jnp.arange(len(mask)) % keeps == 0) if keeps else jnp.zeros(len(mask))
    return {"learned_mask": mask & (is_kept > 0)[:, None]}, {}


def loss(logprobs, batch):
    return Mean.over(-logprobs, batch["learned_mask"]), {}


def graph(*, keeps, only, minibatches=1):
    generate = Generate(sampling=Sampling(max_new_tokens=8), completions_per_prompt=2)
    select = Transform(
        fn=functools.partial(selection, keeps=keeps),
        reads=("completion_mask",),
        writes=("learned_mask",),
    )
    train = Train(
        loss=loss,
        reads=("tokens", "learned_mask"),
        only="learned_mask" if only else "",
        minibatches=minibatches,
    )
    return DataflowGraph(
        rollout=call("policy", generate),
        selection=call(None, select),
        train_policy=call("policy", train),
    )


def after_a_step(found):
    """Parameters before and after, and the metrics."""
    executor = make_executor(found, rollout="d1@1", train="d2@0-1")
    try:
        before = jax.device_get(executor.store.at_home("policy"))
        metrics, _ = executor.run(prompts_of(1), step=1)
        after = jax.device_get(executor.store.at_home("policy"))
    finally:
        executor.close()
    return before, after, metrics


def test_what_is_learned_is_the_same_with_and_without_the_other_rows():
    _, all_rows, _ = after_a_step(graph(keeps=2, only=False))
    before, some_rows, _ = after_a_step(graph(keeps=2, only=True))
    for one, other, start in zip(
        *map(jax.tree.leaves, (all_rows, some_rows, before)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert np.abs(one - start).max() > 0


def test_minibatches_divide_what_is_learned():
    _, _, metrics = after_a_step(graph(keeps=8, only=True, minibatches=2))
    weights = [float(mean.weight) for mean in metrics["loss"]]
    assert len(weights) == 2  # Of 16 rows two are kept: one in each.
    assert min(weights) > 0


def test_where_nothing_is_learned_nothing_changes():
    before, after, metrics = after_a_step(graph(keeps=0, only=True))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert "loss" not in metrics


def test_the_mask_must_be_among_what_is_read():
    train = graph(keeps=2, only=True).calls["train_policy"].function
    with pytest.raises(ValueError, match="only is 'mask', which is not among the keys"):
        dataclasses.replace(train, only="mask")
