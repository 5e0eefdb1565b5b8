"""Everything that decides a run, as a config script gives it."""

import dataclasses
import importlib.util
from collections.abc import Collection
from typing import Any

from realjax.core.config import check_least, suggest
from realjax.data.datasets import DataConfig
from realjax.functions.role import RoleConfig
from realjax.functions.score import RewardFunction
from realjax.parallel.allocation import Allocation
from realjax.rl.sampling import Sampling
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.profile import profiled_steps

PLAN_MODES = ("search", "heuristic", "symmetric")
"""Ways to find a plan."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When the held-out data is measured, and how.

    With a judge or a verifier, held-out prompts are completed for evaluation alone,
    whatever the algorithm: see `trials`.

    Attributes:
        every_steps: 0 means only where the next two say.
        at_start, at_end: before the first step; after the last.
        num_samples: completions shown in the log and the report.
        rewards: Python functions that score held-out completions besides, to be
            reported only; where there are some.
        judge: role with a scalar head, which says whether a completion of the policy is
            better than one of `against`, for "eval/win_rate"; "" measures none. It may
            be the reward model that is trained against, or another one.
        against: role that the policy is compared with.
        verifier: Python function that says whether a completion is right, for
            "eval/pass@k"; None measures none.
        pass_score: least score of the verifier that is right.
        pass_at: each k; at most `completions_per_prompt`.
        completions_per_prompt: drawn of each held-out prompt, for those two.
        sampling: how they are drawn; None is as in training, or where that draws none
            the defaults of `Sampling`.
        allocation: of the calls that do so; "" is where training has calls like them.
    """

    every_steps: int = 0
    at_start: bool = True
    at_end: bool = True
    num_samples: int = 8
    rewards: tuple[RewardFunction, ...] = ()
    judge: str = ""
    against: str = "reference"
    verifier: RewardFunction | None = None
    pass_score: float = 1.0
    pass_at: tuple[int, ...] = (1,)
    completions_per_prompt: int = 1
    sampling: Sampling | None = None
    allocation: str = ""

    def __post_init__(self):
        """Refuses counts that mean nothing."""
        check_least(self, 0, "every_steps", "num_samples")
        check_least(self, 1, "completions_per_prompt")
        most = self.completions_per_prompt
        if wrong := [k for k in self.pass_at if not 1 <= k <= most]:
            raise ValueError(
                f"pass_at has {wrong[0]}, and completions_per_prompt is {most}: each k"
                " must be from 1 to that. Draw more of each prompt."
            )

    @property
    def has_trials(self) -> bool:
        """Whether held-out prompts are completed for evaluation alone."""
        return bool(self.judge) or self.verifier is not None

    @property
    def functions(self) -> tuple[RewardFunction, ...]:
        """All Python functions, each once."""
        return (*self.other_rewards, *((self.verifier,) if self.verifier else ()))

    @property
    def other_rewards(self) -> tuple[RewardFunction, ...]:
        """The rewards without the verifier, which may be one of them."""
        return tuple(reward for reward in self.rewards if reward != self.verifier)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run.

    Attributes:
        algorithm: "sft", "reward_model", "ppo", or the dotted name of a user's module.
        hp: its hyperparameters.
        roles: by name.
        data: training and held-out files.
        steps: of the run; 0 takes them from `epochs`.
        epochs: passes over the training data.
        seed: of initial weights, data order, sampling and minibatches.
        plan: how the allocations of calls are found: "search", "heuristic",
            "symmetric", a strategy for all calls as in "d4t2", or the plan.json of a
            run; "" is by hand where an allocation is given, and else "search" where
            there is more than one device. See `runtime.given_plans`.
        expected_new_tokens: mean of a completion, for the search; 0 is the longest.
        allocation: of every call not named in `allocations`; "" leaves it to `plan`, or
            is data parallel over all devices where `allocations` has others.
        allocations: by call, as in `allocations.rollout = "t4@0-3"`.
        allocations_devices: how many devices `allocations` is written for; with fewer
            it is left aside.
        rows: by call: packed rows of a microbatch, or completions decoded at the same
            time.
        pages: by call that generates: of its pool of keys and values; 0 is enough for
            any completions, or what `memory_gib` leaves free.
        kv_dtype: by call that generates: of that pool; "" is the model's.
        weights: by call that generates or infers: of the matrices in its copy of the
            parameters, "int8" or "float8_e4m3fn"; "" is the role's.
        microbatch_tokens: where `rows` does not say; 0 is 2048, or on GPU 16384 times
            the data shards.
        memory_gib: of a device, which the plan must fit; 0 asks the device, and where
            it does not know (a CPU) anything fits.
        check_links: whether copies between the devices that the plan joins are checked
            by checksums before the first step.
        check_moves: whether every reallocation is; for debugging, it waits each time.
        evaluation: when held-out data is measured.
        checkpoint: when and how much is saved.
        benchmark_steps: stop after so many steps and print medians per call.
        profile_steps: "3:5" traces steps 3 and 4.
        max_nonfinite: stop after so many updates skipped for a non-finite gradient.
        tensorboard: whether to write its event files.
        wandb_project: Weights & Biases project, when the package is installed.
    """

    algorithm: str = ""
    hp: dict[str, Any] = dataclasses.field(default_factory=dict)
    roles: dict[str, RoleConfig] = dataclasses.field(default_factory=dict)
    data: DataConfig = DataConfig()
    steps: int = 0
    epochs: int = 1
    seed: int = 0
    plan: str = ""
    expected_new_tokens: float = 0.0
    allocation: str = ""
    allocations: dict[str, str] = dataclasses.field(default_factory=dict)
    allocations_devices: int = 0
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    pages: dict[str, int] = dataclasses.field(default_factory=dict)
    kv_dtype: dict[str, str] = dataclasses.field(default_factory=dict)
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    microbatch_tokens: int = 0
    memory_gib: float = 0.0
    check_links: bool = True
    check_moves: bool = False
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every_minutes=15.0)
    benchmark_steps: int = 0
    profile_steps: str = ""
    max_nonfinite: int = 10
    tensorboard: bool = True
    wandb_project: str = ""

    def __post_init__(self):
        """Refuses counts that mean nothing, and a package that is not there."""
        names = ("steps", "seed", "allocations_devices", "microbatch_tokens")
        check_least(self, 0, *names, "benchmark_steps", "max_nonfinite", "memory_gib")
        check_least(self, 0, "expected_new_tokens")
        check_plan(self.plan, self.allocation)
        check_least(self, 1, "epochs")
        profiled_steps(self.profile_steps)
        for field in ("rows", "pages"):
            for name, count in getattr(self, field).items():
                if count < 0:
                    raise ValueError(
                        f"{field}.{name} is {count}; it must be at least 0."
                    )
        if self.wandb_project and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"wandb_project is {self.wandb_project!r} and the package `wandb` is "
                "not installed: `pip install wandb`, or leave the project empty."
            )

    def without_calls(self, names: Collection[str]) -> "RunConfig":
        """Return the config without what it says of some calls.

        Args:
            names: of the calls.
        """
        fields = ("allocations", "rows", "pages", "kv_dtype", "weights")
        said = {field: getattr(self, field).items() for field in fields}
        left = {f: {k: v for k, v in x if k not in names} for f, x in said.items()}
        return dataclasses.replace(self, **left)


def check_plan(text: str, allocation: str) -> None:
    """Refuses a text of `config.plan` that says nothing, or another thing twice.

    Raises:
        ValueError: naming what can be written.
    """
    if not text or text.endswith(".json"):
        pass
    elif text not in PLAN_MODES:
        strategy = text.removeprefix("symmetric:")
        try:
            Allocation.parse(strategy)
        except ValueError as error:
            raise ValueError(
                f"plan is {text!r}, which is none of {', '.join(PLAN_MODES)}, no"
                " strategy for all calls, as in d4t2, and no .json file."
                f" {suggest(text, PLAN_MODES)} ({error})"
            ) from error
    if text and allocation:
        raise ValueError(
            f"plan is {text!r} and allocation is {allocation!r}: both say where every"
            " call runs. Leave one of them out."
        )
