"""PPO with every call on its own allocation: the numbers, bytes and routes of it."""

import collections
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.algorithms import ppo
from realjax.core.batch import Batch
from realjax.dataflow import buffer as buffer_lib
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import home_places
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import Role, RoleConfig
from realjax.rl.sampling import Sampling
from realjax.runtime.executor import Executor, to_numbers
from realjax.runtime.parameters import ParameterStore
from realjax.testing import tiny_model, tiny_parameters, tiny_tokenizer

NUM_PROMPTS, PROMPT_WIDTH, NEW_TOKENS, WIDTH = 16, 8, 16, 24
EOS_IDS = (1, 2, 3, 4)

# Six calls on six allocations of 8 devices. The policy is trained cut by its width and
# generates cut by its heads; reward and reference share no device.
PLAN = {
    "rollout": "t4@0-3",
    "reward": "t2@6-7",
    "reference": "d2@4-5",
    "values": "f2@2,5",
    "advantages": "d4@1-4",
    "train_policy": "d2f4@0-7",
    "train_critic": "f2t2@4-7",
}
ONE_DEVICE = dict.fromkeys(PLAN, "d1@0")


def hyperparameters(**sampling):
    draws = {"temperature": 0.7, "top_k": 20, "top_p": 0.9} | sampling
    return ppo.PPO(
        sampling=Sampling(max_new_tokens=NEW_TOKENS, **draws),
        minibatches=4,
        truncated_score="keep",
    )


def parameters_of(config, seed):
    """A tiny Llama whose predictions are far from uniform."""
    parameters = tiny_parameters(config, seed)
    for head in {"head", "score"} & parameters.keys():
        parameters[head] = {"kernel": parameters[head]["kernel"] * 12}
    return parameters


def make_executor(hp, allocations, *, offload=(), learning_rate=2e-3):
    graph = ppo.graph(hp)
    plan = make_plan(
        graph, num_devices=8, allocations=allocations, microbatch_tokens=2 * WIDTH
    )
    optimizer = OptimizerConfig(learning_rate=learning_rate, epsilon=1e-5)
    roles = {}
    for name in graph.roles:
        head = "language" if name in ("policy", "reference") else "scalar"
        roles[name] = Role(
            name=name,
            config=RoleConfig(optimizer=optimizer, offload=name in offload),
            model=tiny_model(num_heads=8, num_kv_heads=4, head_dim=4, head=head),
            eos_ids=EOS_IDS,
            dtype="float32",
            is_trained=name in graph.trained_roles,
        )
    models = {name: role.model for name, role in roles.items()}
    homes = home_places(graph, plan, dict.fromkeys(roles, "float32"))
    store = ParameterStore(models, homes, offload)
    executor = Executor(
        graph,
        plan,
        roles,
        store,
        tokenizer=tiny_tokenizer(),
        optimizer_steps=dict.fromkeys(graph.calls, 40),
        seed=0,
        width=WIDTH,
    )
    for seed, (name, model) in enumerate(models.items()):
        store.set_initial(name, parameters_of(model, seed))
    for role in graph.trained_roles:
        program = executor.train_program(role)
        store.set_train_state(role, program.init_optimizer(store.at_home(role)))
    return executor


def prompts_of(step):
    """Sixteen prompts of 1 to 8 tokens, others in every step."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(1, PROMPT_WIDTH + 1, NUM_PROMPTS).astype(np.int32)
    tokens = rng.integers(5, 64, (NUM_PROMPTS, PROMPT_WIDTH)).astype(np.int32)
    tokens[np.arange(PROMPT_WIDTH) >= lengths[:, None]] = 0
    return Batch.create({"prompts": tokens}, lengths=lengths, ids=range(NUM_PROMPTS))
