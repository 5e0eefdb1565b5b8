"""What a draw is made from, and what comes out of it.

    logits -> / temperature -> top-k -> top-p of what is left -> min-p -> one draw

A row's tokens are ordered by weight, the exponential of the logit below the row's
highest, and equal ones by id, the lower id first. Top-k and top-p keep a beginning of
that order.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt

from pallas_kernels._dispatch import Device

Form = Literal["ids", "bits"]
Kept = Int[Array, "B C"] | UInt[Array, "B W"]

# Sets of more ids than this are kept as bits.
LARGEST_ID_SET = 256
# A draw picks a block of this many tokens first, then one of its tokens.
BLOCK_SIZE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """Which tokens may be drawn.

    Attributes:
        temperature: logits are divided by it.
        top_k: most likely tokens to keep; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities add up to it.
        min_p: of what top-k and top-p leave, keep the tokens of at least this share of
            the highest probability; 0 keeps all.
        union: top-p is of the distribution before top-k, and what either removes is
            removed. Otherwise, top-p of the tokens that top-k kept.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    union: bool = False

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; it must be positive. The most"
                " likely token is `greedy`'s."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1].")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be in [0, 1].")

    def of(self, vocab_size: int) -> "Filters":
        """Return the same filters, with a top-k that keeps all said as 0."""
        return dataclasses.replace(
            self, top_k=0 if self.top_k >= vocab_size else self.top_k
        )

    @property
    def is_empty(self) -> bool:
        """Whether they remove nothing."""
        return not self.top_k and self.top_p == 1 and self.min_p == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the choice of an implementation looks at.

    Attributes:
        shape: of the logits, [B, V].
        dtype: of the logits.
        device: that draws.
        filters: as said by `Filters.of`.
        kept: the form in which the kept tokens are wanted; None does without.
    """

    shape: tuple[int, ...]
    dtype: DTypeLike
    device: Device
    filters: Filters = Filters()
    kept: Form | None = None

    @property
    def is_small_set(self) -> bool:
        """Whether the tokens kept are taken out of the vocabulary before the draw."""
        return 0 < self.filters.top_k <= LARGEST_ID_SET and self.kept != "bits"


class Draw(NamedTuple):
    """One token per row, and the distribution it was drawn from.

    Attributes:
        tokens: their ids.
        logprobs: of the tokens in that distribution. Greedy tokens count as drawn from
            the unfiltered one.
        entropy: of that distribution, in nats.
        kept: the tokens it is over: int32 ids padded with -1, or uint32 words with bit
            v % 32 of word v // 32 for token v, or None. An empty set is the whole
            vocabulary.
    """

    tokens: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    entropy: Float[Array, " B"]
    kept: Kept | None
