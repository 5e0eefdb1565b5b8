"""Win rates and pass@k: what they are, that they change nothing, where they run."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest

import realjax
from realjax.core.config import to_dataclass
from realjax.data.loader import evaluation_batches
from realjax.dataflow.plan import make_plan
from realjax.functions.score import RewardFunction
from realjax.runtime.console import Console
from realjax.runtime.run import make_graph, prepare
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.runtime.trainer import Trainer
from realjax.runtime.trial_plans import trial_graphs, trial_plan
from tests.runtime.small_world import (
    make_world,
    ppo_config,
    refusal,
    sft_config,
    train,
)

# Passes every other completion, by its length, and writes down what it saw.
VERIFIER = """
import json, pathlib

def odd(prompts, completions, **columns):
    scores = [float(len(text) % 2) for text in completions]
    with pathlib.Path(__file__).with_suffix(".seen").open("a") as file:
        for row in zip(prompts, completions, scores):
            print(json.dumps(row), file=file)
    return scores
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def verifier(folder):
    path = folder / "verifier.py"
    path.write_text(VERIFIER)
    return path


def seen(path):
    """What the verifier saw, in the order in which it did."""
    return [json.loads(line) for line in path.with_suffix(".seen").open()]


def measured(metrics, name):
    values = metrics[name]
    return values[np.isfinite(values)]


# -- PPO, which samples anyway -------------------------------------------------------


@pytest.fixture(scope="module")
def ppo(world, tmp_path_factory):
    """A run whose own reward model judges, before and after two steps."""
    config = ppo_config(world)
    config.data.held_out = 5
    config.data.valid_batch_size = 2
    config.roles.policy.optimizer.learning_rate = 0.01
    config.evaluation.judge = "reward"
    path = verifier(tmp_path_factory.mktemp("verifier"))
    config.evaluation.verifier = f"{path}:odd"
    result = train(config, tmp_path_factory.mktemp("ppo") / "run")
    return result.metrics, path


@pytest.mark.slow
def test_a_policy_that_is_its_reference_wins_half(ppo):
    metrics, _ = ppo
    win_rate = measured(metrics, "eval/win_rate")
    assert len(win_rate) == 2 and win_rate[0] == 0.5
    # Both draw with the same keys: every completion is the other's.
    assert measured(metrics, "eval/win_rate_standard_error")[0] == 0
    policy, reference = (
        measured(metrics, f"eval/judge/{role}_mean") for role in ("policy", "reference")
    )
    assert policy[0] == reference[0] == reference[1] and policy[1] != policy[0]


@pytest.mark.slow
def test_a_judge_that_is_the_reward_says_what_the_step_s_own_evaluation_says(ppo):
    metrics, _ = ppo
    np.testing.assert_allclose(
        measured(metrics, "eval/judge/policy_mean"),
        measured(metrics, "eval/scores_mean"),
        rtol=1e-6,
    )


@pytest.mark.slow
def test_pass_at_one_is_the_share_that_the_verifier_lets_pass(ppo):
    metrics, path = ppo
    scores = np.array([score for _, _, score in seen(path)]).reshape(2, 5)
    np.testing.assert_allclose(measured(metrics, "eval/pass@1"), scores.mean(axis=1))
    errors = scores.std(axis=1, ddof=1) / np.sqrt(5)
    found = measured(metrics, "eval/pass@1_standard_error")
    np.testing.assert_allclose(found, errors)
    assert measured(metrics, "eval/rewards/odd/failures").tolist() == [0, 0]


# -- SFT, which samples never --------------------------------------------------------


def judged_sft(world, path):
    """Two more roles, of which no step knows; four completions of each prompt."""
    config = sft_config(world)
    config.steps = 2
    config.allocation = "d2@2-3"
    config.data.held_out = 3
    config.roles.policy.tokenizer, config.roles.policy.model = "", {}
    config.roles.policy.path = str(world / "policy")
    for role, folder in {"reference": "policy", "reward": "reward"}.items():
        config.roles[role] = config.roles.policy.copy_and_resolve_references()
        config.roles[role].path = str(world / folder)
    with config.evaluation.ignore_type():
        config.evaluation.judge = "reward"
        config.evaluation.verifier = f"{path}:odd"
        config.evaluation.rewards = (f"{path}:odd",)  # The same one: taken once.
        config.evaluation.completions_per_prompt = 4
        config.evaluation.pass_at = (1, 2, 4)
        config.evaluation.sampling = {"max_new_tokens": 8}
    return config


@pytest.fixture(scope="module")
def sft(world, tmp_path_factory):
    path = verifier(tmp_path_factory.mktemp("verifier"))
    workdir = tmp_path_factory.mktemp("sft")
    with_trials = train(judged_sft(world, path), workdir / "with")
    config = judged_sft(world, path)
    with config.evaluation.ignore_type():
        config.evaluation.judge, config.evaluation.verifier = "", None
        config.evaluation.rewards = ()
    return with_trials, train(config, workdir / "without"), path


def test_trials_change_nothing_of_a_run(sft):
    found, wanted, _ = sft
    for name, values in wanted.metrics.items():
        if not name.startswith(("perf/", "timing_s/")):
            np.testing.assert_array_equal(found.metrics[name], values, err_msg=name)
    assert found.roles.keys() == wanted.roles.keys() == {"policy"}
    found, wanted = (one.roles["policy"].parameters for one in (found, wanted))
    np.testing.assert_array_equal(found["embedding"], wanted["embedding"])


def test_an_algorithm_that_samples_nothing_has_trials_too(sft):
    found, wanted, _ = sft
    new = {name for name in found.metrics if name not in wanted.metrics}
    assert new == {
        "eval/win_rate",
        "eval/win_rate_standard_error",
        "eval/judge/policy_mean",
        "eval/judge/policy_standard_error",
        "eval/judge/reference_mean",
        "eval/judge/reference_standard_error",
        *(f"eval/pass@{k}{end}" for k in (1, 2, 4) for end in ("", "_standard_error")),
        "eval/odd_mean",
        "eval/odd_standard_error",
        "eval/rewards/odd/failures",
    }
    for name in ("win_rate", "pass@4"):
        assert len(measured(found.metrics, f"eval/{name}")) == 2
    # Before training the policy is the reference, and draws what that draws.
    assert found.metrics["eval/win_rate"][0] == 0.5


def test_pass_at_k_counts_prompts_of_which_a_completion_passes(sft):
    found, _, path = sft
    rows = seen(path)
    assert len(rows) == 2 * 3 * 4  # Twice measured, prompts, completions of each.
    passed = np.array([score for _, _, score in rows]).reshape(2, 3, 4) > 0
    prompts = [prompt for prompt, _, _ in rows]
    assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, 24, 4))
    metrics = found.metrics
    any_passed = passed.any(axis=2).mean(axis=1)
    np.testing.assert_allclose(measured(metrics, "eval/pass@4"), any_passed)
    np.testing.assert_allclose(
        measured(metrics, "eval/pass@1"), passed.mean(axis=(1, 2))
    )
    # Of two of four: 1 - C(4 - c, 2) / 6.
    failed = 4 - passed.sum(axis=2)
    wanted = 1 - failed * (failed - 1) / 2 / 6
    np.testing.assert_allclose(measured(metrics, "eval/pass@2"), wanted.mean(axis=1))


@pytest.mark.slow
def test_trials_elsewhere_find_the_same(sft, world, tmp_path):
    found, _, _ = sft
    config = judged_sft(world, verifier(tmp_path))
    with config.evaluation.ignore_type():
        config.evaluation.allocation = "t2@4-5"
    elsewhere = train(config, tmp_path / "run").metrics
    for name, values in found.metrics.items():
        if name.startswith("eval/"):
            np.testing.assert_allclose(
                elsewhere[name], values, rtol=1e-4, atol=1e-5, err_msg=name
            )


def test_a_judge_scores_what_it_is_shown(world, tmp_path):
    config = to_dataclass(RunConfig, _plain(judged_sft(world, verifier(tmp_path))))
    console = Console(file=io.StringIO())
    with contextlib.closing(Trainer(prepare(config), tmp_path / "run", console)) as one:
        trials = one._trials
        (batch,) = evaluation_batches(one.run.trials["reference"].data, 4)
        _, buffer = trials._executor("reference").run(batch, step=0, training=False)
        tokens, scores = buffer.host("tokens"), buffer.host("scores")
        lengths = buffer.lengths["tokens"]
    real = buffer.ids >= 0
    assert real.sum() == 3 * 4
    judge = realjax.load(world / "reward", "d1")
    wanted = judge.scores(tokens[real], lengths[real])
    np.testing.assert_allclose(scores[real], wanted, atol=1e-5)


# -- where they run, and what is refused ---------------------------------------------


def plan_of_trial(world, role, allocation="", **allocations):
    config = to_dataclass(RunConfig, _plain(ppo_config(world)))
    graph = make_graph(config)
    evaluation = EvaluationConfig(judge="gold", allocation=allocation)
    data = config.data.__class__(path="a.jsonl", held_out=1, kind="prompts")
    config = RunConfig(algorithm="ppo", evaluation=evaluation, data=data)
    training = make_plan(graph, num_devices=8, allocations=allocations)
    plan = trial_plan(trial_graphs(config, graph)[role], training, evaluation)
    return {name: str(one.allocation) for name, one in plan.calls.items()}


def _plain(config):
    values = config.to_dict()
    del values["paths"]
    return values


def test_a_trial_runs_where_calls_like_its_own_do(world):
    places = {"rollout": "t4@0-3", "reference": "f2@4-5", "reward": "d2@6-7"}
    assert plan_of_trial(world, "policy", **places) == {
        "rollout": "t4@0-3",
        "judge": "d2@6-7+offload",  # A judge that no step knows, as the reward model.
    }
    # The reference's own devices come before those of other rollouts.
    assert plan_of_trial(world, "reference", **places)["rollout"] == "f2@4-5"


def test_what_samples_over_stages_in_training_samples_over_fsdp(world):
    places = {"rollout": "d1@0", "reference": "s2d2@4-7"}
    assert plan_of_trial(world, "reference", **places)["rollout"] == "d2f2@4-7"


def test_an_allocation_may_be_given(world):
    found = plan_of_trial(world, "policy", "d2@0-1", rollout="t4@0-3")
    assert found == {"rollout": "d2@0-1", "judge": "d2@0-1+offload"}


def weights_of_trials(world, *, judge="gold", allocation="", **weights):
    """By the role that completes, what its rollout and its judge take."""
    config = to_dataclass(RunConfig, _plain(ppo_config(world)))
    graph = make_graph(config)
    evaluation = EvaluationConfig(judge=judge, allocation=allocation)
    data = dataclasses.replace(config.data, held_out=1)
    config = dataclasses.replace(config, evaluation=evaluation, data=data)
    training = make_plan(graph, num_devices=8, **weights)
    found = {}
    for role, one in trial_graphs(config, graph).items():
        calls = trial_plan(one, training, evaluation).calls
        found[role] = (calls["rollout"].weights, calls["judge"].weights)
    return found


def test_all_that_complete_take_the_weights_of_the_rollout(world):
    found = weights_of_trials(world, weights={"rollout": "int8"})
    assert found == {"policy": ("int8", ""), "reference": ("int8", "")}


def test_a_frozen_role_keeps_its_weights(world):
    own = {"reference": "int8", "reward": "float8_e4m3fn"}
    found = weights_of_trials(world, judge="reward", role_weights=own)
    assert found == {
        "policy": ("", "float8_e4m3fn"),
        "reference": ("int8", "float8_e4m3fn"),
    }


@pytest.mark.slow
def test_a_judge_in_8_bits_judges(world, tmp_path):
    config = ppo_config(world)
    config.data.held_out, config.steps = 3, 1
    config.evaluation.judge = "reward"
    config.roles.reward.weights = "int8"
    config.weights = {"rollout": "int8"}
    config.roles.reference.weights = "int8"
    metrics = train(config, tmp_path / "run").metrics
    assert metrics["eval/win_rate"][0] == 0.5
    np.testing.assert_allclose(
        measured(metrics, "eval/judge/policy_mean"),
        measured(metrics, "eval/scores_mean"),
        rtol=1e-6,
    )


@pytest.mark.slow
def test_the_base_of_a_trial_alone_is_dropped_after_it(world, tmp_path):
    config = judged_sft(world, verifier(tmp_path))
    with config.evaluation.ignore_type():
        config.evaluation.allocation = "t2@4-5"
    config.roles.policy.lora.rank = 2
    config = to_dataclass(RunConfig, _plain(config))
    console = Console(file=io.StringIO())
    with contextlib.closing(Trainer(prepare(config), tmp_path / "run", console)) as one:
        assert "policy" in one.executor.store.basing
        one.train()
        assert not one.executor.store._bases


def test_prompts_of_trials_are_held_out_records_alone(world, tmp_path):
    # As answers record 6 is too long, and as prompts record 7 is: by themselves, the
    # last two prompts would be 5 and 6.
    lines = [{"prompt": "the cat", "answer": " and ran"} for _ in range(8)]
    lines[6]["answer"] *= 73
    lines[7]["prompt"] *= 9
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = judged_sft(world, verifier(tmp_path))
    config.data.path, config.data.held_out = str(path), 2
    config.data.max_length, config.data.max_prompt_length = 72, 8
    run = prepare(to_dataclass(RunConfig, _plain(config)))
    assert run.valid_data.numbers == {5, 7}
    assert run.trials["policy"].data.numbers == {5}


def test_roles_of_trials_are_no_part_of_what_two_runs_share(world, tmp_path):
    config = judged_sft(world, verifier(tmp_path))
    values = _plain(config)
    run = prepare(to_dataclass(RunConfig, values))
    assert list(run.roles) == ["policy", "reward", "reference"]
    assert list(run.fingerprint()["models"]) == ["policy"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"judge": "reward", "against": "policy"}, "against is 'policy', the role"),
        ({"judge": "gold"}, "config.evaluation uses the role 'gold'"),
        ({"judge": "reference"}, "takes the role 'reference' for judge"),
        ({"verifier": "nowhere.py:f"}, "There is no file"),
        ({"verifier": "json:loads", "rewards": ("a.py:loads",)}, "named 'loads'"),
        ({"rewards": ({"fn": "json:loads", "name": "scores"},)}, "named 'scores'"),
        ({"judge": "reward", "allocation": "t8"}, "tensor=8 does not divide"),
    ],
)
def test_a_trial_that_cannot_be_is_refused(world, tmp_path, fields, text):
    config = ppo_config(world)
    config.data.held_out = 5
    with config.evaluation.ignore_type():
        for name, value in fields.items():
            config.evaluation[name] = value
    assert text in refusal(config, tmp_path / "run", world)


def test_a_trial_needs_held_out_data(world, tmp_path):
    config = ppo_config(world)
    config.evaluation.judge = "reward"
    assert "nothing is held out" in refusal(config, tmp_path / "run")


def test_an_algorithm_whose_roles_complete_nothing_has_no_trials(world):
    data = EvaluationConfig(verifier=RewardFunction(fn="a:b"))
    config = to_dataclass(
        RunConfig,
        {
            "algorithm": "reward_model",
            "evaluation": data,
            "data": {"path": "a.jsonl", "held_out": 1},
        },
    )
    with pytest.raises(
        ValueError, match=r"no role .* completes prompts \(it has reward"
    ):
        trial_graphs(config, make_graph(config))


@pytest.mark.parametrize("k", (0, 3))
def test_a_k_beyond_the_completions_is_refused(k):
    with pytest.raises(ValueError, match=rf"pass_at has {k}, and completions_per_prom"):
        EvaluationConfig(pass_at=(1, k), completions_per_prompt=2)
