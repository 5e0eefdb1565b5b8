"""Drawing tokens, and the sets they are drawn from.

    logits - penalties -> / temperature -> top-k -> top-p of what is left -> min-p
           -> one draw, renormalised

The set of tokens kept travels with the sample, so the trainer and the reference score
the token in the distribution it was drawn from. Sets are small: ids where top-k bounds
them, one bit per token otherwise (see `pallas_kernels.linear_logprob`), nothing where
nothing is filtered. An empty set is the whole vocabulary.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import sampling as kernels
from pallas_kernels.linear_logprob import is_kept, kept_logits
from pallas_kernels.sampling import LARGEST_ID_SET, Draw, Form
from realjax.core.arrays import Array, Bool, Float, Int, Key, UInt

__all__ = [
    "Draw",
    "History",
    "Sampling",
    "bad_word_tokens",
    "is_kept",
    "kept_width",
    "normalizer",
    "sample",
]

Kept = Int[Array, "*dims C"] | UInt[Array, "*dims C"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_k: int = 0
    """Most likely tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities add up to it."""
    min_p: float = 0.0
    """Of what top-k and top-p leave, keep the tokens of at least this share of the
    highest probability; 0 keeps all."""
    union: bool = False
    """ReaL's rule: top-p of the distribution before top-k, and what either removes is
    removed. Otherwise, as elsewhere, top-p of the tokens that top-k kept."""
    greedy: bool = False
    """Always the most likely token, scored in the unfiltered distribution at
    temperature 1."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the completion so far are divided by it where
    positive, else multiplied; 1 changes nothing (Keskar et al. 2019, section 4.1)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the completion so far, as in OpenAI's
    API; 0 changes nothing."""
    bad_words: Sequence[Sequence[int]] = ()
    """Ids of words that are never completed: the last id of one is forbidden after its
    others, a single id always. Kept as tuples."""
    min_new_tokens: int = 0
    """End-of-sequence tokens are forbidden before as many."""
    max_new_tokens: int = 256

    def __post_init__(self):
        _check_filters(self)
        _check_penalties(self)
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens is"
                f" {self.max_new_tokens}; they must be in order, and not negative."
            )
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens is 0; there is nothing to sample.")
        object.__setattr__(self, "bad_words", _words(self.bad_words))
        if self.temperature == 0 or self.greedy:
            # The trainer scores greedy tokens at the temperature it finds here.
            object.__setattr__(self, "greedy", True)
            object.__setattr__(self, "temperature", 1.0)

    @property
    def needs_history(self) -> bool:
        """Whether penalties look at the tokens so far: `sample` needs a `History`."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0

    @property
    def is_recomputable(self) -> bool:
        """Whether temperature and kept sets say all about the distributions.

        Then the trainer finds the log-probabilities of the draws again. Penalties
        change the logits of the kept tokens themselves, which no set records.
        """
        return not self.needs_history

    @property
    def num_recent_tokens(self) -> int:
        """How many of the last tokens `bad_word_tokens` looks at."""
        return max(map(len, self.bad_words), default=1) - 1


class History(NamedTuple):
    """The tokens that rows have so far; None where no penalty asks for it."""

    in_prompt_or_completion: Bool[Array, "B V"] | None = None
    in_completion: Bool[Array, "B V"] | None = None


def kept_width(sampling: Sampling, vocab_size: int) -> tuple[Form, int] | None:
    """Return the form of the sets `sample` records, and the width of one.

    Returns:
        None where nothing is ever filtered; ("ids", C) for int32 ids padded with -1;
        ("bits", ceil(vocab_size / 32)) for uint32 words.
    """
    top_k = _top_k(sampling, vocab_size)
    if 0 < top_k <= LARGEST_ID_SET:
        return "ids", top_k
    if top_k or _has_top_p(sampling) or _has_min_p(sampling) or _forbids(sampling):
        return "bits", -(-vocab_size // 32)
    return None


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    sampling: Sampling,
    *,
    forbidden: Bool[Array, "B V"] | None = None,
    history: History | None = None,
) -> Draw:
    """Draw one token per row.

    A row's token depends on its own logits, history and key only. Ties of probability
    are kept and chosen by the lower id.

    Args:
        logits: of the next token.
        keys: one per row.
        sampling: penalties, temperature and filters.
        forbidden: tokens of probability 0: end-of-sequence tokens before
            `min_new_tokens`, and `bad_word_tokens`. Each row needs another one.
        history: the tokens so far, for the penalties.

    Raises:
        ValueError: tokens are forbidden and no kept tokens recorded, or a penalty lacks
            its history.
    """
    form = kept_width(sampling, logits.shape[-1])
    logits = _penalized(logits.astype(jnp.float32), sampling, history or History())
    if forbidden is not None and form is None:
        raise ValueError(
            "Tokens are forbidden, but min_new_tokens is 0 and there are no bad_words,"
            " so no kept tokens are recorded: set min_new_tokens or bad_words."
        )
    kept = None if form is None else form[0]
    if sampling.greedy:
        return kernels.greedy(logits, forbidden=forbidden, kept=kept)
    return kernels.sample(
        logits,
        jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        union=sampling.union,
        forbidden=forbidden,
        kept=kept,
    )


def bad_word_tokens(
    recent: Int[Array, "B M"], sampling: Sampling, vocab_size: int
) -> Bool[Array, "B V"]:
    """Return which tokens would complete one of the `bad_words`.

    Args:
        recent: the tokens before the next one, of prompt and completion, the latest
            last; at least `num_recent_tokens` of them, -1 where there is none.
        sampling: has the words.
        vocab_size: V.

    Raises:
        ValueError: too few recent tokens, or a word has an id past the vocabulary.
    """
    words, num_recent = sampling.bad_words, sampling.num_recent_tokens
    if recent.shape[1] < num_recent:
        raise ValueError(
            f"There are {recent.shape[1]} recent tokens, but the longest of bad_words"
            f" has {num_recent + 1} ids: give the last {num_recent} tokens."
        )
    largest = max((max(word) for word in words), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"bad_words has the id {largest}, but the vocabulary has {vocab_size}"
            " tokens. Take the ids from the model's own tokenizer."
        )
    none = jnp.zeros((recent.shape[0], vocab_size), bool)
    if not words:
        return none
    # Right-aligned, with -1 in front of shorter words: it stands for any token.
    before = np.full((1, len(words), num_recent), -1, np.int32)
    for row, word in zip(before[0], words, strict=True):
        row[num_recent + 1 - len(word) :] = word[:-1]
    recent = recent[:, None, recent.shape[1] - num_recent :]
    completes = jnp.all((before < 0) | (recent == before), axis=-1)
    return none.at[:, np.array([word[-1] for word in words])].max(completes)


def normalizer(
    logits: Float[Array, "*dims V"], kept: Kept | None
) -> Float[Array, "*dims"]:
    """Return the log of the summed exponentials over the kept tokens.

    `logits - normalizer` are the log-probabilities `sample` draws from, where the
    logits are divided by the temperature already and there are no penalties.
    """
    return jax.nn.logsumexp(kept_logits(logits, kept), axis=-1)


def _check_filters(sampling: Sampling) -> None:
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(
            f"temperature is {sampling.temperature}; it must be positive, or 0 for"
            " greedy completions."
        )
    if sampling.top_k < 0:
        raise ValueError(
            f"top_k is {sampling.top_k}; it must be positive, or 0 to keep all tokens."
        )
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}; it must be in (0, 1].")
    if not 0 <= sampling.min_p <= 1:
        raise ValueError(
            f"min_p is {sampling.min_p}; it must be in [0, 1], and 0 keeps all tokens."
        )


def _check_penalties(sampling: Sampling) -> None:
    if not 0 < sampling.repetition_penalty < math.inf:
        raise ValueError(
            f"repetition_penalty is {sampling.repetition_penalty}; it must be positive,"
            " and 1 changes nothing."
        )
    if not math.isfinite(sampling.presence_penalty):
        raise ValueError(
            f"presence_penalty is {sampling.presence_penalty}; it must be finite, and 0"
            " changes nothing."
        )


def _words(words) -> tuple[tuple[int, ...], ...]:
    """Return words of token ids as tuples, from any sequences."""
    try:
        found = tuple(tuple(map(operator.index, word)) for word in words)
    except TypeError:
        raise TypeError(
            f"bad_words is {words!r}; it needs token ids for each word, as in"
            " ((5,), (7, 8))."
        ) from None
    for word in found:
        if not word or min(word) < 0:
            raise ValueError(
                f"bad_words has the word {word}; a word needs at least one token id,"
                " and ids are not negative."
            )
    return found


def _top_k(sampling: Sampling, vocab_size: int) -> int:
    """Return how many tokens top-k keeps; 0 where it removes none."""
    if sampling.greedy or sampling.top_k >= vocab_size:
        return 0
    return sampling.top_k


def _has_top_p(sampling: Sampling) -> bool:
    return not sampling.greedy and sampling.top_p < 1


def _has_min_p(sampling: Sampling) -> bool:
    return not sampling.greedy and sampling.min_p > 0


def _forbids(sampling: Sampling) -> bool:
    return sampling.min_new_tokens > 0 or bool(sampling.bad_words)


def _penalized(logits, sampling: Sampling, history: History):
    """Return the logits after the penalties; repetition comes first."""
    penalty = sampling.repetition_penalty
    if penalty != 1.0:
        seen = _history("repetition_penalty", history, "in_prompt_or_completion")
        less = jnp.where(logits > 0, logits * (1.0 / penalty), logits * penalty)
        logits = jnp.where(seen, less, logits)
    if sampling.presence_penalty != 0.0:
        seen = _history("presence_penalty", history, "in_completion")
        logits = jnp.where(seen, logits - sampling.presence_penalty, logits)
    return logits


def _history(penalty: str, history: History, name: str) -> Bool[Array, "B V"]:
    """Return the part of the history that a penalty is about."""
    seen = getattr(history, name)
    if seen is None:
        raise ValueError(
            f"There is a {penalty}, but history.{name} is missing: pass which tokens"
            " each row has so far."
        )
    return seen
