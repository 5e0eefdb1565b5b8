"""Tests of `realjax/functions/rollouts.py`."""

import dataclasses

import pytest

from realjax.functions import Generate, Infer, RewardFunction, Rollouts, Score
from realjax.rl import Sampling


def test_all_log_probabilities_are_those_of_the_sampler():
    hp = Rollouts(sampling=Sampling(temperature=0.7, top_k=5), completions_per_prompt=3)
    train = hp.train(lambda output, batch: None, ("advantages",), only="advantages")
    assert hp.generate() == Generate(sampling=hp.sampling, completions_per_prompt=3)
    assert hp.generate(greedy=True).sampling.greedy
    for function in (hp.infer(), train):
        assert function.reads[:2] == ("tokens", "kept")
        assert function.temperature == 0.7
    assert train.only == "advantages"
    assert Rollouts(sampling=Sampling(top_k=0)).scored == ("tokens",)


def test_functions_of_the_text_take_the_place_of_the_reward_role():
    assert Rollouts().reward() == ("reward", Infer(output="scores"))
    rewards = (RewardFunction(fn="module:function"),)
    role, score = Rollouts(rewards=rewards, reward_workers=2).reward()
    assert role is None
    assert score == Score(rewards=rewards, num_workers=2)


def test_steps_are_those_of_the_hyperparameters():
    hp = Rollouts(minibatches=4, epochs=2, shuffle=True)
    assert hp.steps() == {"minibatches": 4, "epochs": 2, "shuffle": True}
    train = hp.train(lambda output, batch: None, (), epochs=1)
    assert (train.minibatches, train.epochs, train.shuffle) == (4, 1, True)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"completions_per_prompt": 0}, "completions_per_prompt is 0"),
        ({"reward_workers": 0}, "reward_workers is 0"),
        ({"staleness": -1}, "staleness is -1"),
        ({"importance_cap": 0.5}, r"importance_cap is 0\.5; it must be at least 1"),
    ],
)
def test_wrong_numbers_are_refused(changes, error):
    with pytest.raises(ValueError, match=error):
        dataclasses.replace(Rollouts(), **changes)
