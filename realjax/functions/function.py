"""What can be asked of a role, and which batch keys it reads and writes.

    Generate    sample completions of prompts                     policy
    Infer       log-probabilities, values or scores of sequences  any role
    Train       optimizer steps on a loss                         a trained role
    Follow      a step towards another role's parameters          a role that follows
    Transform   arithmetic on the batch alone                     no role
    Score       Python functions of the text                      no role

These are descriptions: frozen and without arrays. `generate.py`, `infer.py` and
`train.py` turn one into a compiled program for one allocation; reallocation does what
`Follow` asks.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from realjax.functions.score import RewardFunction
from realjax.rl.sampling import Sampling, kept_width

Output = Literal["logprobs", "top_logprobs", "values", "scores"]

LANGUAGE_OUTPUTS: tuple[Output, ...] = ("logprobs", "top_logprobs")
"""What is read off a language head; the others are read off a scalar one."""

LARGE_VOCABULARY = 1 << 20


def is_filtered(sampling: Sampling) -> bool:
    """Whether the sampler may leave tokens out and so records the set it kept."""
    return kept_width(sampling, LARGE_VOCABULARY) is not None


INFERRED: Mapping[Output, tuple[str, ...]] = {
    "logprobs": ("logprobs",),
    "top_logprobs": ("top_logprobs", "top_ids"),
    "values": ("values", "bootstrap_values"),
    "scores": ("scores",),
}
"""What `Infer` writes for each output.

logprobs [B, T] is about token t; top_logprobs and top_ids [B, T, K] are of the tokens
that would have been likeliest there; values [B, T] that of the state before token t;
bootstrap_values [B] that of the state after the last token; scores [B] the scalar
head's output at the last token.
"""

GENERATED = ("tokens", "completion_mask", "old_logprobs", "is_truncated")
"""What `Generate` always writes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """A function of a role's parameters and a batch.

    Attributes:
        reads: batch keys it needs. A key that no call writes comes from the data set.
        writes: batch keys it adds.
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delivery:
    """When groups of a rollout, the completions of a prompt, are handed on.

    Attributes:
        portions: parts of the batch that calls which follow on other devices take one
            after the other, as their groups end.
        token_budget: tokens after which sampling stops for a step. Groups that have
            not ended go on in the next step, with the parameters of then, and keep the
            log-probabilities they have. The batch has the groups that ended, the oldest
            first, and empty rows where they are too few. 0 samples all to their end.
        num_carried: the most groups that go on so; sampling does not stop before.
    """

    portions: int = 1
    token_budget: int = 0
    num_carried: int = 0

    def __post_init__(self):
        """Refuses counts that contradict each other."""
        if self.portions < 1:
            raise ValueError(f"portions is {self.portions}; there is at least 1.")
        if self.token_budget < 0 or bool(self.token_budget) != bool(self.num_carried):
            raise ValueError(
                f"token_budget is {self.token_budget} and num_carried is"
                f" {self.num_carried}; both are above 0, so that what has not ended can"
                " go on in the next step, or both are 0."
            )
        if self.token_budget and self.portions > 1:
            raise ValueError(
                f"There is a token_budget and portions is {self.portions}. Which groups"
                " a step has is known only when its budget is spent: set portions to 1."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Function):
    """Samples completions; the batch then holds one row per completion.

    Writes tokens [B, T] (prompt, then completion), completion_mask [B, T] (the
    end-of-sequence token included), old_logprobs [B, T], is_truncated [B] (no
    end-of-sequence token within the limit) and, when the sampler filters, kept: the
    token ids it chose among, which every later log-probability is normalised over.

    Attributes:
        sampling: how tokens are drawn.
        completions_per_prompt: rows of a prompt, a group.
        delivery: when its groups are handed on.
    """

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    completions_per_prompt: int = 1
    delivery: Delivery = dataclasses.field(default_factory=Delivery)
    reads: tuple[str, ...] = ("prompts",)
    writes: tuple[str, ...] = dataclasses.field(init=False)

    def __post_init__(self):
        """Fills `writes` from the sampling; refuses what cannot be trained on."""
        if self.completions_per_prompt < 1:
            raise ValueError(
                f"completions_per_prompt is {self.completions_per_prompt}; each prompt "
                "needs at least 1."
            )
        sampling = self.sampling
        if not sampling.is_recomputable:
            raise ValueError(
                f"repetition_penalty is {sampling.repetition_penalty} and"
                f" presence_penalty is {sampling.presence_penalty}: penalties change"
                " the distribution by what a row holds so far, and the trainer could"
                " not find its log-probabilities again. Generate for training with 1"
                " and 0; `realjax.sample` takes penalties."
            )
        kept = ("kept",) if is_filtered(sampling) else ()
        object.__setattr__(self, "writes", (*GENERATED, *kept))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infer(Function):
    """A forward pass without gradient.

    Attributes:
        output: what to compute; see `INFERRED`.
        temperature: divides the logits, as in the sampler, for "logprobs".
        num_top: K, tokens of "top_logprobs".
        is_as_trained: whether numbers are those that a training call of the role would
            find: with the masters, and where no allocation is given, where it trains.
    """

    output: Output = "logprobs"
    temperature: float = 1.0
    num_top: int = 0
    is_as_trained: bool = False
    reads: tuple[str, ...] = ("tokens",)

    def __post_init__(self):
        """Fills `writes` from the output, also in `dataclasses.replace(output=…)`."""
        if not self.writes or self.writes in INFERRED.values():
            object.__setattr__(self, "writes", INFERRED[self.output])
        if (self.output == "top_logprobs") != (self.num_top > 0):
            raise ValueError(
                f"num_top is {self.num_top} and the output is {self.output!r}. It is at"
                " least 1 for 'top_logprobs', and 0 for others."
            )

    def shapes(self, size: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what it writes.

        Args:
            size: B, sequences.
            width: T, tokens of a sequence.
        """
        of_tokens = {
            "logprobs": (size, width),
            "values": (size, width),
            "top_logprobs": (size, width, self.num_top),
            "top_ids": (size, width, self.num_top),
        }
        return {name: of_tokens.get(name, (size,)) for name in INFERRED[self.output]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Function):
    """Optimizer steps on `loss`: one for each minibatch of each epoch.

    Attributes:
        loss: `loss(output, batch) -> (Mean, {name: Mean})`. `output` is what `Infer`
            would give ([M, T], or [M] for scores), `batch` the keys of `reads`, with
            "entropy" [M, T] added for "logprobs". For "top_logprobs" it is [M, T, K] of
            the tokens that the batch has as "top_ids", and "logprobs" are added, too.
            Rows of padding hold zeros, so every mean needs a mask from the batch.
        output: what the loss is a function of.
        minibatches: optimizer steps per epoch over the step's batch.
        epochs: passes over the step's batch.
        shuffle: whether minibatches are drawn at random, or follow the batch's order.
        unit: adjacent rows that belong together (2 for a pair).
        only: a key of `reads`, a mask [B, T]: rows without any token of it take no part
            and are in no minibatch. Needs the mask on the host; "" takes all rows.
        temperature: divides the logits, as in the sampler, for "logprobs".
        loss_name: the metric that reports the loss.
        skip: of a minibatch's mean metrics; where it holds, the update does not happen
            at all (neither parameters nor moments change).
    """

    loss: Callable[..., Any]
    output: Output = "logprobs"
    minibatches: int = 1
    epochs: int = 1
    shuffle: bool = False
    unit: int = 1
    only: str = ""
    temperature: float = 1.0
    loss_name: str = "loss"
    skip: Callable[[Mapping[str, Any]], Any] | None = None

    def __post_init__(self):
        """Refuses counts below one, and a mask that is not read."""
        if self.only and self.only not in self.reads:
            raise ValueError(
                f"only is {self.only!r}, which is not among the keys that are read:"
                f" {', '.join(self.reads)}. Add it."
            )
        for name in ("minibatches", "epochs", "unit"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 1."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Follow(Function):
    """An exponential moving average of another role's parameters, once a step.

    p ← weight · source + (1 − weight) · p, in float32, after the source was trained.
    A head that the source does not have stays as it is.

    Attributes:
        source: the role that is followed.
        weight: of its parameters; 1 copies them.
    """

    source: str
    weight: float

    def __post_init__(self):
        """Refuses a weight that is no weight."""
        if not 0 < self.weight <= 1:
            raise ValueError(
                f"weight is {self.weight}; following a role takes one above 0 and at "
                "most 1 (1 copies it, 0.001 is a slow average)."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform(Function):
    """Arithmetic on the batch alone.

    Attributes:
        fn: `fn(batch) -> (outputs, {name: Mean})`; with a state,
            `fn(state, batch) -> (state, outputs, {name: Mean})`.
        state: makes the initial state, which the runtime keeps and saves.
    """

    fn: Callable[..., Any]
    state: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score(Function):
    """Scores completions by Python functions of their text, in worker processes.

    Attributes:
        rewards: the functions; the score is the weighted sum.
        num_workers: processes.
    """

    rewards: tuple[RewardFunction, ...]
    num_workers: int = 1
    reads: tuple[str, ...] = ("tokens", "completion_mask")
    writes: tuple[str, ...] = ("scores",)
