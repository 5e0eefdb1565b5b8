"""The smallest algorithm that samples and learns, and its runs of a moment.

    rollout ─▶ advantages ─▶ train_policy

A completion is good as far as its tokens are even. Two programs compile; nothing else
is in the way of seeing what is sampled with which parameters, and when.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from realjax import rl
from realjax.core.batch import Batch
from realjax.dataflow import DataflowGraph, call
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import home_places, resting_on_host
from realjax.functions import Generate, Train, Transform
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import Role, RoleConfig
from realjax.models.transformer import abstract_parameters
from realjax.rl import Mean, Sampling
from realjax.runtime.executor import Executor
from realjax.runtime.parameters import ParameterStore
from realjax.testing import tiny_model, tiny_tokenizer

SIZE, PROMPT_WIDTH = 8, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Even:
    """Hyperparameters."""

    staleness: int = 0
    completions_per_prompt: int = 2
    new_tokens: int = 8


def advantages(batch):
    """How much more of a completion is even than of the others."""
    mask = batch["completion_mask"]
    even = jnp.where(mask, batch["tokens"] % 2 == 0, False).sum(1)
    scores = even / jnp.maximum(mask.sum(1), 1)
    is_there = mask.any(1)
    mean = Mean.over(scores, is_there)
    found = jnp.where(mask, (scores - mean.value())[:, None], 0.0)
    return {"advantages": found}, {"objective/scores": mean}


def loss(logprobs, batch):
    """Importance-weighted REINFORCE."""
    mask, old_logprobs = batch["completion_mask"], batch["old_logprobs"]
    ratio = jnp.exp(logprobs - old_logprobs)
    metrics = rl.importance.gap(logprobs, old_logprobs, mask)
    return Mean.over(-ratio * batch["advantages"], mask), metrics


def graph(hp: Even) -> DataflowGraph:
    """Three calls."""
    generate = Generate(
        sampling=Sampling(max_new_tokens=hp.new_tokens),
        completions_per_prompt=hp.completions_per_prompt,
    )
    estimate = Transform(
        fn=advantages, reads=("tokens", "completion_mask"), writes=("advantages",)
    )
    reads = ("tokens", "completion_mask", "old_logprobs", "advantages")
    return DataflowGraph(
        rollout=call("policy", generate, staleness=hp.staleness),
        advantages=call(None, estimate),
        train_policy=call("policy", Train(loss=loss, reads=reads)),
    )


ALGORITHM = types.SimpleNamespace(graph=graph, HYPERPARAMETERS=Even)


def drawn_parameters(config):
    """Weights drawn without compiling anything, the same in every process."""
    generator = np.random.default_rng(0)

    def draw(leaf):
        return generator.normal(0, 0.2, leaf.shape).astype(np.float32)

    is_leaf = lambda node: hasattr(node, "axes")
    return jax.tree.map(draw, abstract_parameters(config), is_leaf=is_leaf)


def make_executor(
    found: DataflowGraph, *, rollout: str, train: str, new_tokens: int = 8, **sizes
) -> Executor:
    """An executor of a graph, its policy trained at a large rate.

    Args:
        found: the graph; its roles begin with one trunk.
        rollout: the allocation of that call.
        train: that of the others.
        new_tokens: of its sampling.
        sizes: of the model, where it is not the smallest.
    """
    plan = make_plan(
        found,
        num_devices=len(jax.devices()),
        allocation=train,
        allocations={"rollout": rollout},
    )
    optimizer = OptimizerConfig(learning_rate=3e-2, schedule="constant")
    roles = {
        name: Role(
            name=name,
            config=RoleConfig(optimizer=optimizer),
            model=tiny_model(
                head="scalar" if name == "reward" else "language",
                **{"num_layers": 1} | sizes,
            ),
            eos_ids=(1,),
            dtype="float32",
            is_trained=name in found.trained_roles,
        )
        for name in found.roles
    }
    homes = home_places(found, plan, dict.fromkeys(roles, "float32"))
    models = {name: role.model for name, role in roles.items()}
    store = ParameterStore(models, homes, resting_on_host(found, plan))
    executor = Executor(
        found,
        plan,
        roles,
        store,
        tokenizer=tiny_tokenizer(),
        optimizer_steps={"train_policy": 40},
        seed=0,
        width=PROMPT_WIDTH + new_tokens,
    )
    placed = lambda x, sharding: jax.make_array_from_callback(
        x.shape, sharding, lambda index: x[index], dtype=x.dtype
    )
    for name, model in models.items():
        shardings = store.shardings(name, homes[name])
        drawn = jax.tree.map(placed, drawn_parameters(model), shardings)
        store.set_initial(name, drawn)
    program = executor.programs.train_program("policy")
    store.set_train_state("policy", program.init_optimizer(store.at_home("policy")))
    return executor


def prompts_of(step: int) -> Batch:
    """Prompts of a step; other steps have others."""
    generator = np.random.default_rng(step)
    lengths = generator.integers(1, PROMPT_WIDTH + 1, SIZE).astype(np.int32)
    tokens = generator.integers(5, 64, (SIZE, PROMPT_WIDTH)).astype(np.int32)
    tokens[np.arange(PROMPT_WIDTH) >= lengths[:, None]] = 0
    first = SIZE * step
    ids = range(first, first + SIZE)
    return Batch.create({"prompts": tokens}, lengths=lengths, ids=ids)


def run_steps(executor: Executor, num_steps: int, after_step=lambda buffer: None):
    """Runs steps as a trainer does, the last one without a next.

    Returns the metrics of each step, as they come.
    """
    found = []
    for step in range(1, num_steps + 1):
        has_next = bool(executor.graph.stale_calls) and step < num_steps
        ahead = prompts_of(step + 1) if has_next else None
        metrics, buffer = executor.run(prompts_of(step), step=step, ahead=ahead)
        executor.watch.wait()
        found.append(metrics)
        after_step(buffer)
    return found
