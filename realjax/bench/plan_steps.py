"""Steps of PPO on any plan, of new models on made prompts: to be timed.

    setting = Setting()
    space = space_of(setting, Cluster.detect(), coefficients)
    with running(setting, space.execution_plan(plan)) as steps:
        steps.run()                             # seconds

All completions have the same length, so that every step has the same work.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from realjax.algorithms import ppo
from realjax.core.batch import Batch
from realjax.data.tokenizer import Tokenizer
from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan
from realjax.dataflow.schedule import home_places, resting_on_host
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import Role, RoleConfig
from realjax.models import transformer
from realjax.models.config import ModelConfig
from realjax.parallel.sharding import padded_for
from realjax.planner.cluster import Cluster
from realjax.planner.cost import Coefficients
from realjax.planner.memory import Work
from realjax.planner.space import Lengths, Space, make_space
from realjax.planner.strategies import Rules
from realjax.rl import Sampling, ScoreShaping
from realjax.runtime.executor import Executor
from realjax.runtime.measures import to_numbers
from realjax.runtime.parameters import ParameterStore

MICROBATCH_TOKENS = 2048
WARM_UP_STEPS = 2
"""Steps that compile."""

RULES = Rules(offloads=False)
"""A CPU's devices are its host, and nothing is won by waiting there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A step of PPO with four models of one size.

    Attributes:
        width, num_layers: of the models; heads have 32 each.
        num_prompts: of a step.
        prompt_tokens, new_tokens: of every sequence.
        minibatches: optimizer steps.
    """

    width: int = 256
    num_layers: int = 5
    num_prompts: int = 16
    prompt_tokens: int = 32
    new_tokens: int = 32
    minibatches: int = 2

    @property
    def num_tokens(self) -> int:
        """Of a sequence."""
        return self.prompt_tokens + self.new_tokens

    @property
    def model(self) -> ModelConfig:
        """Of the policy, without padding: 5.5 million parameters by default."""
        heads = self.width // 32
        return ModelConfig(
            vocab_size=512,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=32,
            mlp_width=4 * self.width,
        )

    @property
    def graph(self) -> DataflowGraph:
        """PPO's six calls, and the advantages."""
        sampling = Sampling(
            min_new_tokens=self.new_tokens, max_new_tokens=self.new_tokens
        )
        return ppo.graph(
            ppo.PPO(
                sampling=sampling,
                minibatches=self.minibatches,
                score=ScoreShaping(truncated="keep"),
            )
        )

    def __str__(self) -> str:
        """As in "5 x 256, 16 x 32 + 32 tokens, 2 minibatches"."""
        return (
            f"{self.num_layers} x {self.width}, {self.num_prompts} x"
            f" {self.prompt_tokens} + {self.new_tokens} tokens,"
            f" {self.minibatches} minibatches"
        )


def roles_of(setting: Setting, plan: ExecutionPlan | None = None) -> dict[str, Role]:
    """Return the four roles; padded for a plan if there is one."""
    graph, roles = setting.graph, {}
    for name in graph.roles:
        head = "scalar" if name in ("reward", "critic") else "language"
        model = dataclasses.replace(setting.model, head=head)
        if plan is not None:
            own = [n for n, call in graph.calls.items() if call.role == name]
            model = padded_for(model, [plan.calls[n].allocation for n in own])
        roles[name] = Role(
            name=name,
            config=RoleConfig(optimizer=OptimizerConfig(learning_rate=1e-5)),
            model=model,
            eos_ids=(1,),
            dtype="float32",
            is_trained=name in graph.trained_roles,
        )
    return roles


def space_of(setting: Setting, cluster: Cluster, coefficients: Coefficients) -> Space:
    """List the plans of a setting."""
    return make_space(
        setting.graph,
        roles_of(setting),
        Work(
            num_rows=setting.num_prompts,
            width=setting.num_tokens,
            prompt_width=setting.prompt_tokens,
        ),
        Lengths(
            prompt_tokens=setting.prompt_tokens,
            new_tokens=setting.new_tokens,
            most_new_tokens=setting.new_tokens,
        ),
        cluster,
        coefficients,
        microbatch_tokens=MICROBATCH_TOKENS,
        rules=RULES,
    )


class Steps:
    """Steps of one plan, timed."""

    def __init__(self, setting: Setting, executor: Executor):
        """Runs nothing yet; the first steps will compile."""
        self._setting, self._executor = setting, executor
        self._num_steps = 0

    def run(self) -> float:
        """Run a step; returns its seconds.

        What is timed is what a trainer's step is: a pass of the executor, and reading
        its metrics.
        """
        self._num_steps += 1
        batch = _prompts(self._setting, self._num_steps)
        begin = time.perf_counter()
        found, _ = self._executor.run(batch, step=self._num_steps)
        to_numbers(found)
        self._executor.watch.wait()
        return time.perf_counter() - begin

    def call_seconds(self) -> Mapping[str, float]:
        """Return the median seconds of calls and copies, but for those that compiled.

        Copies have names as "policy to d2@0-1 float32".
        """
        return self._executor.watch.timeline.medians(skip_steps=WARM_UP_STEPS)


@contextlib.contextmanager
def running(setting: Setting, plan: ExecutionPlan) -> Iterator[Steps]:
    """Prepare a run of a plan, and end it.

    Args:
        setting: models and batch.
        plan: of its graph.
    """
    executor = _executor(setting, plan)
    with contextlib.closing(executor):
        yield Steps(setting, executor)


def _executor(setting: Setting, plan: ExecutionPlan) -> Executor:
    graph = plan.graph
    roles = roles_of(setting, plan)
    models = {name: role.model for name, role in roles.items()}
    dtypes = {name: role.dtype for name, role in roles.items()}
    homes = home_places(graph, plan, dtypes)
    store = ParameterStore(models, homes, resting_on_host(graph, plan))
    executor = Executor(
        graph,
        plan,
        roles,
        store,
        tokenizer=_tokenizer(),
        optimizer_steps=dict.fromkeys(graph.calls, 1000),
        seed=0,
        width=setting.num_tokens,
    )
    for index, (name, model) in enumerate(models.items()):
        init = functools.partial(transformer.init_parameters, model)
        place = store.shardings(name, homes[name])
        store.set_initial(
            name, jax.jit(init, out_shardings=place)(jax.random.key(index))
        )
    for role in graph.trained_roles:
        program = executor.programs.train_program(role)
        store.set_train_state(role, program.init_optimizer(store.at_home(role)))
    store.rest()
    return executor


@functools.cache
def _tokenizer() -> Tokenizer:
    """Return one that an executor must have; no call of PPO's six reads text."""
    return Tokenizer.train(["a good day"], vocab_size=260)


def _prompts(setting: Setting, step: int) -> Batch:
    shape = (setting.num_prompts, setting.prompt_tokens)
    tokens = np.random.default_rng(step).integers(2, 512, shape).astype(np.int32)
    lengths = np.full(len(tokens), setting.prompt_tokens, np.int32)
    return Batch.create({"prompts": tokens}, lengths=lengths, ids=range(len(tokens)))
