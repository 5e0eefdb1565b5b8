"""What algorithms share that sample completions, score them, and learn from them.

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Rollouts):                   # its fields, and those of Rollouts
    beta: float = 0.1

hp.generate()           the call's function that samples
hp.reward()             the role and the function that score
hp.infer()              log-probabilities as the sampler and the trainer have them
hp.train(loss, reads)   optimizer steps on a loss of these
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from realjax.core.config import check_least
from realjax.functions.function import (
    Delivery,
    Function,
    Generate,
    Infer,
    Score,
    Train,
    is_filtered,
)
from realjax.functions.score import RewardFunction
from realjax.rl.rewards import ScoreShaping
from realjax.rl.sampling import Sampling

SAMPLED = ("completion_mask", "is_truncated", "old_logprobs", "scores")
"""What advantages are made of: a rollout and its scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Hyperparameters of sampling, scoring and optimizer steps.

    Attributes:
        sampling: how completions are drawn.
        completions_per_prompt: the group of a prompt.
        rewards: Python functions of the text; empty means the reward role's scores.
        reward_workers: processes that run them.
        score: scaling, bias and clipping of scores; what truncated completions get.
        importance_cap: most of the weight of a token for the gap between sampler and
            trainer, see `rl.importance`; 0 corrects nothing.
        staleness: 1 trains in step k+1 on the rollout that step k's policy began with,
            while the next one is sampled; 0 is strictly on-policy.
        minibatches, epochs, shuffle: optimizer steps per rollout and their order; all
            but the first learn from what an older policy sampled.
        delivery: of the rollout, in portions or up to a budget of tokens.
    """

    sampling: Sampling = Sampling(max_new_tokens=256)
    completions_per_prompt: int = 1
    rewards: tuple[RewardFunction, ...] = ()
    reward_workers: int = 1
    score: ScoreShaping = ScoreShaping(truncated="keep")
    importance_cap: float = 0.0
    staleness: int = 0
    minibatches: int = 1
    epochs: int = 1
    shuffle: bool = False
    delivery: Delivery = Delivery()

    def __post_init__(self):
        """Refuses counts that are none, and caps that leave nothing."""
        check_least(self, 1, "completions_per_prompt", "reward_workers")
        check_least(self, 0, "staleness")
        if self.importance_cap and not self.importance_cap >= 1:
            raise ValueError(
                f"importance_cap is {self.importance_cap}; it must be at least 1 (2 is"
                " a common one), or 0 for no correction."
            )

    @property
    def scored(self) -> tuple[str, ...]:
        """Keys of what is scored: the set that the sampler kept is one, if it does."""
        return ("tokens", "kept") if is_filtered(self.sampling) else ("tokens",)

    def generate(self, **changes: Any) -> Generate:
        """Return what samples; `changes` are other sampling, as `greedy=True`."""
        return Generate(
            sampling=dataclasses.replace(self.sampling, **changes),
            completions_per_prompt=self.completions_per_prompt,
            delivery=self.delivery,
        )

    def reward(self) -> tuple[str | None, Function]:
        """Return the role that scores completions, or None, and its function."""
        if self.rewards:
            return None, Score(rewards=self.rewards, num_workers=self.reward_workers)
        return "reward", Infer(output="scores")

    def infer(self, **options: Any) -> Infer:
        """Return what gives the log-probabilities of the completions."""
        temperature = self.sampling.temperature
        return Infer(reads=self.scored, temperature=temperature, **options)

    def train(
        self, loss: Callable[..., Any], reads: Sequence[str], **options: Any
    ) -> Train:
        """Return what trains the policy.

        Args:
            loss: see `Train`.
            reads: keys that it reads, beside `scored`.
            **options: other fields of `Train`.
        """
        fields: dict[str, Any] = {"loss_name": "loss/policy_avg"}
        return Train(
            loss=loss,
            reads=(*self.scored, *reads),
            temperature=self.sampling.temperature,
            **fields | self.steps() | options,
        )

    def steps(self) -> dict[str, Any]:
        """Return the fields of `Train` that say how often and in which order."""
        names = ("minibatches", "epochs", "shuffle")
        return {name: getattr(self, name) for name in names}
