"""Graphs and sizes of models that the planner is tried on.

ppo_7_7      PPO's six calls, all models of 7B
ppo_34_7     policy and reference of 34B, critic and reward of 7B
ppo_7_34     the other way round
grpo_70      a policy and a reference of 70B, a reward model of 7B, eight completions
             of a prompt, no critic
remax_13     two calls that generate, one of them greedy completions for a baseline
rewards_N    PPO of 7B with as many reward models as make N calls
"""

import dataclasses
import re
from typing import Any

from realjax.algorithms import ppo
from realjax.dataflow.graph import DataflowGraph, call
from realjax.functions import Generate, Infer, Train, Transform
from realjax.functions.role import Role, RoleConfig
from realjax.models.families import llama
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Coefficients
from realjax.planner.memory import Work
from realjax.planner.space import Lengths, Space, make_space
from realjax.planner.strategies import Rules
from realjax.rl import Sampling

PROMPT_TOKENS, NEW_TOKENS = 128, 384
PROMPTS_PER_DEVICE = 8
MICROBATCH_TOKENS = 8192
"""Of a device, where the rules leave no choice."""

NAMES = ("ppo_7_7", "ppo_34_7", "ppo_7_34", "grpo_70", "remax_13")

_SIZES = {"7": "2-7b", "13": "2-13b", "34": "code-34b", "70": "2-70b"}
_SAMPLING = Sampling(max_new_tokens=NEW_TOKENS)
_MINIBATCHES = 4


def problem(
    name: str,
    cluster: str,
    *,
    num_prompts: int = 0,
    rules: Rules | None = None,
) -> Space:
    """List the plans of one of the problems above.

    Args:
        name: of the problem.
        cluster: a preset, as "8xh100".
        num_prompts: 0 takes `PROMPTS_PER_DEVICE` of each device.
        rules: which options are looked at; None is all.

    Raises:
        ValueError: there is no such problem.
    """
    graph, sizes = graph_of(name)
    roles = {}
    for role in graph.roles:
        is_scalar = role.startswith(("reward", "critic"))
        model = llama.size(_SIZES[sizes[is_scalar]])
        roles[role] = Role(
            name=role,
            # Where plans cannot choose: as ReaL has it.
            config=RoleConfig(remat="" if (rules or Rules()).varies else "block"),
            model=dataclasses.replace(
                model, head="scalar" if is_scalar else "language"
            ),
            eos_ids=(2,),
            dtype="bfloat16",
            is_trained=role in graph.trained_roles,
        )
    machine = Cluster.load(cluster)
    return make_space(
        graph,
        roles,
        Work(
            num_rows=num_prompts or PROMPTS_PER_DEVICE * machine.num_devices,
            width=PROMPT_TOKENS + NEW_TOKENS,
            prompt_width=PROMPT_TOKENS,
            device_kind=machine.device.kind,
        ),
        Lengths(
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
            most_new_tokens=NEW_TOKENS,
        ),
        machine,
        Coefficients(),
        microbatch_tokens=MICROBATCH_TOKENS * machine.num_devices,
        rules=rules,
    )


def graph_of(name: str) -> tuple[DataflowGraph, tuple[str, str]]:
    """Return a problem's graph, and sizes of its language and its scalar models."""
    match = re.fullmatch(r"ppo_(\d+)_(\d+)", name)
    if match and {match[1], match[2]} <= set(_SIZES):
        return _ppo(), (match[1], match[2])
    match = re.fullmatch(r"rewards_(\d+)", name)
    if match and int(match[1]) >= 6:
        return _ppo(num_rewards=int(match[1]) - 5), ("7", "7")
    match = re.fullmatch(r"(grpo|remax)_(\d+)", name)
    if match and match[2] in _SIZES:
        graph = _grpo() if match[1] == "grpo" else _remax()
        return graph, (match[2], "7")
    raise ValueError(
        f"There is no problem {name!r}. Write one of {', '.join(NAMES)} or rewards_N"
        f" with at least 6 calls; sizes are {', '.join(_SIZES)}."
    )


def _ppo(num_rewards: int = 1) -> DataflowGraph:
    graph = ppo.graph(ppo.PPO(sampling=_SAMPLING, minibatches=_MINIBATCHES))
    calls = dict(graph.calls)
    for index in range(1, num_rewards):
        more = call(f"reward{index}", Infer(output="scores"), scores=f"scores{index}")
        calls[f"reward{index}"] = more
    return DataflowGraph(**calls)


def _grpo() -> DataflowGraph:
    generate = Generate(sampling=_SAMPLING, completions_per_prompt=8)
    return DataflowGraph(
        rollout=call("policy", generate),
        reward=call("reward", Infer(output="scores")),
        reference=call("reference", Infer(), logprobs="ref_logprobs"),
        advantages=_advantages("scores"),
        train=_train(),
    )


def _remax() -> DataflowGraph:
    greedy = Generate(sampling=dataclasses.replace(_SAMPLING, temperature=0.0))
    renamed: dict[str, Any] = {key: f"greedy_{key}" for key in greedy.writes}
    scores = Infer(output="scores")
    return DataflowGraph(
        rollout=call("policy", Generate(sampling=_SAMPLING)),
        baseline=call("policy", greedy, **renamed),
        reward=call("reward", scores),
        reward_baseline=call(
            "reward", scores, tokens="greedy_tokens", scores="greedy_scores"
        ),
        reference=call("reference", Infer(), logprobs="ref_logprobs"),
        advantages=_advantages("scores", "greedy_scores"),
        train=_train(),
    )


def _advantages(*reads: str):
    return call(
        None,
        Transform(fn=_never, reads=(*reads, "ref_logprobs"), writes=("advantages",)),
    )


def _train():
    reads = ("tokens", "completion_mask", "old_logprobs", "advantages")
    return call("policy", Train(loss=_never, reads=reads, minibatches=_MINIBATCHES))


def _never(*arguments):
    """Stand for arithmetic."""
    raise AssertionError("Plans are made here, and none runs.")
