"""What is asked of a model for each prompt, checked one by one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from realjax.data.tokenizer import Tokenizer
from realjax.runtime.model import Model, check_ids

Prompt = str | Sequence[int] | np.ndarray

NUM_SEEDS = 2**32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt.

    Attributes:
        place: in the list that was given.
        ids: its tokens.
        max_new_tokens, min_new_tokens: of each of its completions.
        data_id: what its draws depend on beside the key of the call.
        error: what is wrong with it; "" if nothing is.
    """

    place: int
    ids: tuple[int, ...] = ()
    max_new_tokens: int = 0
    min_new_tokens: int = 0
    data_id: int = 0
    error: str = ""

    @property
    def width(self) -> int:
        """Tokens of prompt and completion at most."""
        return len(self.ids) + self.max_new_tokens


def read_requests(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int],
    min_new_tokens: int | Sequence[int],
    seed: int | Sequence[int],
) -> list[Request]:
    """Check prompts and what goes with each.

    Args:
        model: that is to go on from them.
        prompts: texts, or lists of ids.
        max_new_tokens: of all, or of each.
        min_new_tokens: of all, or of each.
        seed: of each; where there is one for all, the place in the list takes its part.

    Returns:
        A request for each prompt; one that cannot be fulfilled has an `error`.

    Raises:
        ValueError: there are no prompts, texts without a tokenizer, or another number
            of limits or seeds.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is one text, {prompts!r:.60}. Give a list of them.")
    if len(prompts) == 0:
        raise ValueError("There are no prompts. Give at least one.")
    if model.tokenizer is None and any(isinstance(one, str) for one in prompts):
        raise ValueError(
            "The prompts are text and the model's folder has no tokenizer. "
            "Give lists of ids, or a folder with tokenizer.json."
        )
    places = range(len(prompts))
    seeds = places if isinstance(seed, int | np.integer) else seed
    requests = []
    for place, prompt, limit, least, own_seed in zip(
        places,
        prompts,
        _for_each("max_new_tokens", max_new_tokens, prompts),
        _for_each("min_new_tokens", min_new_tokens, prompts),
        _for_each("seed", seeds, prompts),
        strict=True,
    ):
        try:
            ids = _ids(model, prompt, f"Prompt {place}")
            _check_limit(model, least, len(ids), limit, f"Prompt {place}")
            if not (_is_whole(own_seed) and 0 <= own_seed < NUM_SEEDS):
                raise ValueError(
                    f"The seed of prompt {place} is {own_seed!r}. Give a whole number "
                    "from 0, less than 2**32."
                )
        except ValueError as error:
            requests.append(Request(place=place, error=str(error)))
        else:
            found = Request(
                place=place,
                ids=ids,
                max_new_tokens=int(limit),
                min_new_tokens=int(least),
                data_id=int(own_seed),
            )
            requests.append(found)
    return requests


def word_ids(
    tokenizer: Tokenizer | None, words: Sequence[str | Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Find the ids of words, each with and without a space before it.

    Other spellings of a word, by shorter tokens, are not among them.

    Args:
        tokenizer: needed for texts.
        words: texts, or ids, which stay as they are.

    Raises:
        ValueError: a text has no ids, or there is no tokenizer.
    """
    if isinstance(words, str):
        raise ValueError(f"bad_words is one text, {words!r:.60}. Give a list of them.")
    found: list[tuple[int, ...]] = []
    for word in words:
        if not isinstance(word, str):
            found.append(tuple(word))
            continue
        if tokenizer is None:
            raise ValueError(
                f"bad_words has the text {word!r} and the model's folder has no "
                "tokenizer. Give lists of ids, or a folder with tokenizer.json."
            )
        text = word.strip()
        if not text:
            raise ValueError(
                f"bad_words has the text {word!r}, which is no word. Give its ids."
            )
        # Some tokenizers put a space before every text. Behind a line break none is.
        line = tokenizer.encode("\n")
        inside = tokenizer.encode("\n" + text)
        found += [tuple(tokenizer.encode(text)), tuple(tokenizer.encode(" " + text))]
        if inside[: len(line)] == line:
            found.append(tuple(inside[len(line) :]))
    return tuple(dict.fromkeys(found))


def _for_each(name: str, values: Any, prompts: Sequence[Prompt]) -> Sequence[Any]:
    """A value for each prompt, from one for all or from as many."""
    if isinstance(values, int | np.integer):
        return [values] * len(prompts)
    if len(values) != len(prompts):
        raise ValueError(
            f"{name} has {len(values)} entries for {len(prompts)} prompts. Give one "
            "for all, or one for each."
        )
    return values


def _ids(model: Model, prompt: Any, what: str) -> tuple[int, ...]:
    if isinstance(prompt, str):
        assert model.tokenizer is not None
        prompt = model.tokenizer.encode(prompt)
    try:
        ids = np.asarray(prompt)
    except ValueError:  # Lists of unlike lengths.
        ids = np.zeros((0, 0))
    if ids.ndim == 1 and not len(ids):
        raise ValueError(f"{what} has no tokens. Give it at least one.")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{what} is {prompt!r:.60}, neither a text nor a list of ids.")
    check_ids(ids, model.config, what)
    return tuple(map(int, ids))


def _check_limit(model: Model, least: Any, length: int, limit: Any, what: str) -> None:
    if not _is_whole(least) or least < 0:
        raise ValueError(
            f"{what} has min_new_tokens {least!r}. Give a whole number from 0."
        )
    least = max(least, 1)
    if not _is_whole(limit) or limit < least:
        raise ValueError(
            f"{what} has max_new_tokens {limit!r}. Give a whole number of at least "
            f"{least}."
        )
    longest = model.config.longest_sequence(is_sampled=False)
    if length + limit > longest:
        raise ValueError(
            f"{what} has {length} tokens; with {limit} new ones that is "
            f"{length + limit}, and the model was made for {longest}. Shorten it or "
            "lower max_new_tokens."
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
