"""Tests of `realjax/dataflow/graph.py` and the drawings, on the graphs we ship."""

import xml.etree.ElementTree as ElementTree

import pytest
from ml_collections import ConfigDict

from realjax.algorithms import ppo, reward_model, sft
from realjax.dataflow import DataflowGraph, call
from realjax.dataflow.draw import graph_svg, graph_text
from realjax.dataflow.plan import make_plan
from realjax.functions import Generate, Infer
from realjax.functions.score import RewardFunction
from realjax.rl.sampling import Sampling

REWARD = RewardFunction(fn="realjax.data.verifiers:positive_review")


def test_ppo_runs_its_three_inferences_together():
    assert ppo.graph(ppo.PPO()).levels() == [
        ["rollout"],
        ["reward", "reference", "value"],
        ["advantages"],
        ["train_policy", "train_critic"],
    ]


def test_ppo_has_the_six_model_function_calls_of_its_four_roles():
    graph = ppo.graph(ppo.PPO())
    roles = {name: node.role for name, node in graph.calls.items() if node.role}
    assert roles == {
        "rollout": "policy",
        "reward": "reward",
        "reference": "reference",
        "value": "critic",
        "train_policy": "policy",
        "train_critic": "critic",
    }
    assert graph.trained_roles == ("policy", "critic")
    assert graph.inputs == ("prompts",)


def test_a_reward_function_takes_the_place_of_the_reward_role():
    graph = ppo.graph(ppo.PPO(rewards=(REWARD,)))
    assert "reward" not in graph.roles
    assert graph.levels()[1] == ["reward", "reference", "value"]


def test_policy_reference_and_trainer_read_the_sampler_s_kept_set():
    graph = ppo.graph(ppo.PPO(sampling=Sampling(top_k=20, temperature=0.7)))
    for name in ("reference", "train_policy"):
        assert "kept" in graph.calls[name].reads
        assert graph.calls[name].function.temperature == 0.7
    plain = ppo.graph(ppo.PPO(sampling=Sampling()))
    assert all("kept" not in node.reads for node in plain.calls.values())


def test_fine_tuning_and_reward_modelling_are_one_call():
    assert sft.graph(sft.SFT()).levels() == [["train_policy"]]
    assert reward_model.graph(reward_model.RewardModel()).roles == ("reward",)


def test_two_writers_of_one_key_are_refused():
    node = call("reward", Infer(output="scores"))
    with pytest.raises(ValueError, match="'a' and 'b' write 'scores'"):
        DataflowGraph(a=node, b=node)


def test_renamed_keys_let_one_function_serve_two_calls():
    graph = DataflowGraph(
        a=call("reward", Infer(output="scores")),
        b=call("reward", Infer(output="scores"), scores="other_scores"),
    )
    assert graph.calls["b"].writes == ("other_scores",)


def test_a_rename_of_no_key_is_refused():
    with pytest.raises(ValueError, match="'score' is no key of this Infer"):
        call("reward", Infer(output="scores"), score="x")


def test_calls_that_wait_for_each_other_are_refused():
    with pytest.raises(ValueError, match="wait for one another"):
        DataflowGraph(
            a=call("policy", Infer(reads=("x",), writes=("y",))),
            b=call("policy", Infer(reads=("y",), writes=("x",))),
        )


def test_a_key_that_nobody_gives_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"'rollout' reads 'prompts'.*holds tokens"):
        DataflowGraph(rollout=call("policy", Generate())).require(("tokens",))


def test_the_svg_shows_every_call_and_its_allocation():
    graph = ppo.graph(ppo.PPO())
    plan = make_plan(graph, num_devices=8, allocations={"rollout": "d4t2"})
    root = ElementTree.fromstring(graph_svg(graph, plan))
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert set(graph.calls) <= words
    assert "d4t2@0-7" in words


def test_the_text_names_keys_and_allocations():
    graph = sft.graph(sft.SFT())
    plan = make_plan(graph, num_devices=4)
    line = graph_text(graph, plan)
    assert "train_policy" in line
    assert "d4@0-3" in line
    assert "completion_mask" in line


@pytest.mark.parametrize("algorithm", [sft, reward_model, ppo])
def test_every_call_can_be_named_by_a_flag(algorithm):
    # --config.allocations.values=… would read the method of that name.
    calls = algorithm.graph(algorithm.HYPERPARAMETERS()).calls
    assert [name for name in calls if hasattr(ConfigDict, name)] == []
