"""Graphs, models and machines drawn at random, of shapes that no algorithm here has.

rollout0 ─┬─▶ judge0 ─┐                several policies, judges, references, critics
rollout1 ─┼─▶ values0 ─┼─▶ mix0 ─▶ train_policy0      rules on text, followers,
          └─▶ own1 ────┘    └──▶ mix1 ─▶ train_critic0     arithmetic of any fan-in
"""

import dataclasses
import functools
import pathlib
import types

import jax.numpy as jnp
import numpy as np

from realjax.data.datasets import DataConfig
from realjax.dataflow.graph import DataflowGraph, call, following
from realjax.functions import Follow, Generate, Infer, Score, Train, Transform
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.functions.score import RewardFunction
from realjax.rl.masking import Mean
from realjax.rl.sampling import Sampling
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.run_config import EvaluationConfig, RunConfig

NEW_TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nothing:
    """Hyperparameters of an algorithm that has none."""


def mixed(batch, *, keys, written, mask):
    """Add up what has a number a token and what has one a sequence."""
    shape, total = batch[mask].shape, 0.0
    for key in keys:
        value = batch[key].astype(jnp.float32)
        if value.ndim == 1:
            value = jnp.broadcast_to(value[:, None], shape)
        total += jnp.tanh(jnp.where(batch[mask], value, 0.0))
    return {written: jnp.where(batch[mask], total, 0.0)}, {}


def loss(output, batch, *, keys, mask):
    """Something with a gradient: weighted log-probabilities, or a squared error."""
    target = jnp.zeros(batch[mask].shape)
    for key in keys:
        target += batch[key]
    if output.ndim == 1:  # A score of each sequence.
        counts = batch[mask].any(axis=1)
        return Mean.over((output - target.mean(axis=1)) ** 2, counts), {}
    return Mean.over((output - target) ** 2, batch[mask]), {}


class _Draw:
    """Draws the calls of one graph, those that others read first."""

    def __init__(self, rng: np.random.Generator, is_small: bool):
        self.rng, self.calls = rng, {}
        self.is_small = is_small
        self.texts: list[dict[str, str]] = []  # Renames of a rollout's keys.
        self.numbers: list[list[str]] = []  # Keys about each of them.
        self.trained: list[str] = []

    def upto(self, most: int) -> int:
        return int(self.rng.integers(0, most + 1))

    def graph(self) -> DataflowGraph:
        num_policies = 1 + self.upto(1)
        if self.rng.random() < 0.75:
            self.generates(num_policies)
        else:
            self.texts, self.numbers = [{}], [[]]
        for index in range(self.upto(1 if self.is_small else 2)):
            self.infers(f"judge{index}", "scores")
        for index in range(self.upto(1)):
            self.infers(f"reference{index}", "logprobs")
        for index in range(self.upto(1 if self.is_small else 2)):
            self.infers(f"critic{index}", "values")
        for index in range(num_policies):
            if self.rng.random() < 0.3:
                self.infers(f"policy{index}", "logprobs", self.rng.random() < 0.5)
        if self.calls and "rollout0" in self.calls and self.rng.random() < 0.3:
            rule = RewardFunction(fn="realjax.data.verifiers:positive_review")
            self.writes(
                "rule", call(None, Score(rewards=(rule,)), **self.texts[0]), 0, "scores"
            )
        for index in range(self.upto(2)):
            self.mixes(f"mix{index}")
        for index in range(num_policies):
            self.trains(f"policy{index}", "logprobs")
        for name in [n for n in self.calls if n.startswith(("critic", "judge"))]:
            if self.rng.random() < 0.6:
                output = "values" if name.startswith("critic") else "scores"
                self.trains(name, output)
        if "reference0" in self.calls and self.rng.random() < 0.5:
            self.calls |= following("reference0", source="policy0", weight=0.1)
        return DataflowGraph(**self.calls)

    def generates(self, num_policies: int) -> None:
        count = num_policies if self.rng.random() < 0.5 else 1
        group = 1 if count > 1 else 1 + self.upto(1)
        top_k = int(self.rng.choice([0, 20])) if count == 1 else 0
        for index in range(count):
            function = Generate(
                sampling=Sampling(max_new_tokens=NEW_TOKENS, top_k=top_k),
                completions_per_prompt=group,
            )
            renames = {key: f"{key}{index}" for key in function.writes} if index else {}
            self.calls[f"rollout{index}"] = call(f"policy{index}", function, **renames)
            self.texts.append(
                {k: v for k, v in renames.items() if k in ("tokens", "completion_mask")}
            )
            self.numbers.append([renames.get("old_logprobs", "old_logprobs")])

    def of(self, text: int, key: str) -> str:
        return self.texts[text].get(key, key)

    def text(self) -> int:
        return int(self.rng.integers(len(self.texts)))

    def infers(self, role: str, output, is_as_trained: bool = False) -> None:
        text = self.text()
        function = Infer(output=output, is_as_trained=is_as_trained)
        renames = {key: f"{key}_{role}" for key in function.writes}
        renames["tokens"] = self.of(text, "tokens")
        name = f"own_{role}" if role.startswith("policy") else role
        self.calls[name] = call(role, function, **renames)
        self.numbers[text].append(renames[function.writes[0]])

    def writes(self, name: str, node, text: int, key: str) -> None:
        self.calls[name] = node
        self.numbers[text].append(node.key(key))

    def some(self, text: int) -> list[str]:
        """Some of what is known of a text, at least one key if there is any."""
        known = self.numbers[text]
        count = int(self.rng.integers(min(1, len(known)), len(known) + 1))
        return sorted(self.rng.choice(known, count, replace=False).tolist())

    def mixes(self, name: str) -> None:
        text = self.text()
        keys, mask = self.some(text), self.of(text, "completion_mask")
        fn = functools.partial(mixed, keys=keys, written=name, mask=mask)
        reads = (*keys, mask)
        self.writes(
            name, call(None, Transform(fn=fn, reads=reads, writes=(name,))), text, name
        )

    def trains(self, role: str, output) -> None:
        text = self.text()
        # A loss reads one number a token: mixtures and what models gave for tokens.
        keys = [k for k in self.some(text) if not k.startswith("scores")]
        mask = self.of(text, "completion_mask")
        function = Train(
            loss=functools.partial(loss, keys=keys, mask=mask),
            output=output,
            reads=("tokens", mask, *keys),
            minibatches=1 + self.upto(1),
            loss_name=f"loss/{role}",
        )
        self.calls[f"train_{role}"] = call(
            role, function, tokens=self.of(text, "tokens")
        )


def draw_model(rng: np.random.Generator, is_small: bool) -> dict:
    """Sizes of a model: dense or of experts, its key and value heads fewer, tied."""
    heads = int(rng.choice([2, 4]))
    sizes = {
        "num_layers": 1 if is_small else int(rng.integers(1, 4)),
        "width": int(rng.choice([16, 32])),
        "num_heads": heads,
        "num_kv_heads": int(rng.choice([1, 2, heads])),
        "head_dim": 8,
        "mlp_width": int(rng.choice([32, 48, 64])),
        "max_positions": 256,
        "tie_embeddings": bool(rng.random() < 0.3),
    }
    if rng.random() < 0.3:
        sizes["moe"] = {"num_experts": 4, "top_k": 2}
    return sizes


def draw(seed: int, folder: pathlib.Path, *, is_small: bool = False):
    """Return an algorithm, the config of a run of it, and a number of devices.

    Args:
        seed: of all draws.
        folder: with `tokenizer`, `prompts.jsonl` and `answers.jsonl`.
        is_small: fewer calls, of one layer.
    """
    rng = np.random.default_rng(seed)
    graph = _Draw(rng, is_small).graph()
    generates = any(isinstance(c.function, Generate) for c in graph.calls.values())
    roles = {}
    for name in graph.roles:
        model = draw_model(rng, is_small)
        optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant")
        roles[name] = RoleConfig(
            tokenizer=str(folder / "tokenizer"), model=model, optimizer=optimizer
        )
    for node in graph.calls.values():
        if isinstance(node.function, Follow):  # It needs its source's sizes.
            source = roles[node.function.source]
            assert node.role is not None
            roles[node.role] = dataclasses.replace(roles[node.role], model=source.model)
    kind = "prompts" if generates else "answers"
    config = RunConfig(
        algorithm="one of its own",
        plan="search",
        roles=roles,
        data=DataConfig(
            path=str(folder / f"{kind}.jsonl"),
            kind="prompts" if generates else "prompt_answer",
            max_length=64,
            max_prompt_length=32,
            batch_size=int(rng.choice([4, 6, 8])),
        ),
        steps=2,
        seed=seed,
        memory_gib=1.0,
        tensorboard=False,
        evaluation=EvaluationConfig(at_start=False, at_end=False),
        checkpoint=CheckpointConfig(export=False),
    )
    algorithm = types.SimpleNamespace(graph=lambda hp: graph, HYPERPARAMETERS=Nothing)
    return algorithm, config, int(rng.integers(1, 9))
