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
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.profile import profiled_steps

PLAN_MODES = ("search", "heuristic", "symmetric")
"""Ways to find a plan."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When the held-out data is measured.

    Attributes:
        every_steps: 0 means only where the next two say.
        at_start, at_end: before the first step; after the last.
        num_samples: completions shown in the log and the report.
        rewards: Python functions that score held-out completions besides, to be
            reported only.
    """

    every_steps: int = 0
    at_start: bool = True
    at_end: bool = True
    num_samples: int = 8
    rewards: tuple[RewardFunction, ...] = ()

    def __post_init__(self):
        """Refuses counts below 0."""
        check_least(self, 0, "every_steps", "num_samples")


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
