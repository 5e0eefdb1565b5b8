"""What is learned by each algorithm and each of its variants, and how well it must be.

A line of the table is one experiment: an algorithm, its options, a task, and the bar
that what it learns must reach on held-out data. All begin with a policy that imitates
good and bad answers alike (`Task`), but for those that say otherwise.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from realjax.data.reviews import write_reviews
from realjax.data.sorting import write_sorting
from realjax.functions.score import RewardFunction

SCORE = "eval/scores_mean"
RULE = "eval/rule_mean"
ACCURACY = "eval/accuracy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Data of one kind, a rule that scores it, and a model that learns it.

    Attributes:
        name: of the task.
        write: makes its files in a folder: "tokenizer", and {sft,pairs,labels,prompts}_
            {train,valid}.jsonl.
        rule: "module:function" that scores completions.
        best_score: the rule's maximum.
        max_new_tokens: of a completion.
        imitation_steps: of the policy that all begin with.
    """

    name: str
    write: Callable[[pathlib.Path], pathlib.Path]
    rule: str
    best_score: float
    max_new_tokens: int
    imitation_steps: int

    @property
    def rewards(self) -> tuple[RewardFunction, ...]:
        """The rule as what scores rollouts."""
        return (RewardFunction(fn=self.rule, name="rule"),)


SORTING = Task(
    name="sorting",
    write=write_sorting,
    rule="realjax.data.sorting:score_all",
    best_score=1.0,
    max_new_tokens=6,
    imitation_steps=200,
)
REVIEWS = Task(
    name="reviews",
    write=write_reviews,
    rule="realjax.data.verifiers:positive_review",
    best_score=1.0,
    max_new_tokens=32,
    imitation_steps=100,
)
TASKS = {task.name: task for task in (SORTING, REVIEWS)}

MODEL = {
    "width": 96,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 16,
    "mlp_width": 288,
    "max_positions": 256,
}
"""0.36 million parameters with the vocabulary of the sorting task."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One experiment.

    Attributes:
        name: of the line.
        algorithm: a module of `realjax.algorithms`.
        hp: its options, beside the rule and the sampling where it samples.
        task: what is learned.
        data: the file, without "_train.jsonl"; its kind is `kind`.
        samples: whether it learns from its own completions.
        learning_rate: of the trained roles.
        steps: optimizer steps, or rollouts.
        batch_size: records of a step.
        held_out: the file, without "_valid.jsonl"; "" is `data`.
        begins_new: roles that begin with new parameters instead of the policy's.
        begins_right: roles that begin with a policy that imitates right answers alone.
        measure: the held-out metric.
        bar: that it must reach.
        is_lower_better: whether it must come down to the bar.
    """

    name: str
    algorithm: str
    hp: dict[str, Any] = dataclasses.field(default_factory=dict)
    task: Task = SORTING
    data: str = "prompts"
    held_out: str = ""
    samples: bool = True
    learning_rate: float = 1e-3
    steps: int = 150
    batch_size: int = 16
    begins_new: tuple[str, ...] = ()
    begins_right: tuple[str, ...] = ()
    measure: str = SCORE
    bar: float = 0.9
    is_lower_better: bool = False

    @property
    def kind(self) -> str:
        """How its data is read."""
        kinds = {"sft": "prompt_answer", "right": "prompt_answer"}
        return kinds.get(self.data, self.data)

    def imitated(self, roles: Iterable[str]) -> dict[str, str]:
        """Return the file whose imitation each role begins with; new ones have none."""
        others = [name for name in roles if name not in self.begins_new]
        return {n: "right" if n in self.begins_right else "sft" for n in others}

    def is_reached(self, value: float) -> bool:
        """Tell whether a held-out measurement is good enough."""
        return value <= self.bar if self.is_lower_better else value >= self.bar


def _scored(name: str, algorithm: str = "", *, group: int = 8, **changes: Any) -> Line:
    """A line that learns from the rule's scores of its own completions."""
    hp = {"completions_per_prompt": group} | changes.pop("hp", {})
    return Line(name=name, algorithm=algorithm or name, hp=hp, **changes)


def _preferred(name: str, algorithm: str = "dpo", **changes: Any) -> Line:
    """A line that learns from given pairs."""
    fields: dict[str, Any] = {
        "data": "pairs",
        "samples": False,
        "batch_size": 32,
        "measure": ACCURACY,
        "learning_rate": 3e-4,
        "steps": 100,
    }
    return Line(name=name, algorithm=algorithm, **fields | changes)


DAPO = {
    "clip_higher": 0.28,
    "mean_over": "tokens",
    "kl_coef": 0.0,
    "overlong_margin": 1,
    "filters_truncated": True,
    "oversampling": 2,
}

# The score of what all begin with is a baseline that needs no group.
REINFORCE = {"kl_coef": 0.0, "score": {"bias": 0.6}}

SIMPO = {
    "has_reference": False,
    "is_per_token": True,
    "beta": 2.0,
    "target_margin": 0.5,
}

# Without a reference the policy that all begin with prefers right answers already.
FROM_NOTHING: dict[str, Any] = {
    "begins_new": ("policy",),
    "steps": 300,
    "learning_rate": 1e-3,
}

LINES = (
    Line(
        name="sft",
        algorithm="sft",
        data="right",
        samples=False,
        batch_size=64,
        steps=400,
        learning_rate=3e-3,
        begins_new=("policy",),
        measure="eval/ppl",
        bar=1.1,
        is_lower_better=True,
    ),
    _preferred("reward_model", "reward_model", begins_new=("reward",), steps=300),
    _preferred("dpo"),
    _preferred("dpo_ipo", hp={"kind": "ipo"}),
    _preferred("dpo_hinge", hp={"kind": "hinge"}),
    _preferred("dpo_robust", hp={"kind": "robust", "label_smoothing": 0.1}),
    _preferred("dpo_smoothed", hp={"label_smoothing": 0.1}),
    _preferred("dpo_per_token", hp={"is_per_token": True}),
    _preferred("simpo", hp=SIMPO, **FROM_NOTHING),
    _preferred("orpo", "orpo", **FROM_NOTHING),
    _preferred("kto", "kto", data="labels", batch_size=64, steps=300),
    _scored("online_dpo", "online_dpo", learning_rate=3e-4),
    Line(
        name="distillation",
        algorithm="distillation",
        data="sft",
        held_out="right",
        samples=False,
        batch_size=64,
        steps=200,
        begins_right=("teacher",),
        measure="eval/nll",
        bar=0.1,
        is_lower_better=True,
    ),
    Line(
        name="distillation_on_policy",
        algorithm="distillation",
        hp={"is_on_policy": True},
        batch_size=64,
        steps=150,
        begins_right=("teacher",),
        measure=RULE,
    ),
    _scored("grpo"),
    _scored(
        "dr_grpo", "grpo", hp={"scales_advantages": False, "mean_over": "constant"}
    ),
    _scored("dapo", "grpo", hp=DAPO),
    _scored("gspo", "grpo", hp={"ratio": "sequence", "kl_coef": 0.0}),
    _scored("grpo_kl_in_reward", "grpo", hp={"kl_in": "reward", "kl_estimator": "k1"}),
    _scored("grpo_k2", "grpo", hp={"kl_estimator": "k2"}),
    _scored("grpo_capped", "grpo", hp={"importance_cap": 2.0, "minibatches": 2}),
    _scored("reinforce", "grpo", group=1, batch_size=128, hp=REINFORCE),
    _scored("rloo", group=4, batch_size=32),
    _scored("reinforce_pp", group=1, batch_size=128),
    _scored("reinforce_pp_baseline", "reinforce_pp"),
    _scored("remax", group=1, batch_size=128),
    _scored("raft", batch_size=32, learning_rate=5e-4),
    _scored("ppo", group=1, batch_size=128, hp={"minibatches": 2}),
    _preferred("dpo_reviews", task=REVIEWS),
    _scored("raft_reviews", "raft", task=REVIEWS, batch_size=32, learning_rate=5e-4),
    _scored("ppo_reviews", "ppo", group=1, batch_size=64, task=REVIEWS),
)
BY_NAME = {line.name: line for line in LINES}
