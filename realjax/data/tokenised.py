"""Records as tokens, within the limits of their lengths."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from realjax.data.records import Example
from realjax.data.tokenizer import Tokenizer

__all__ = ["OVERLONG", "Record", "keep", "tokenise"]

_logger = logging.getLogger(__name__)

OVERLONG = ("filter", "refuse", "truncate")
"""What can happen to records that are too long; see `datasets.DataConfig`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A tokenised record that was kept; `is_desirable` is a label's, or None."""

    index: int
    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    is_truncated: tuple[bool, ...]
    texts: tuple[str, ...]
    columns: dict[str, Any]
    is_desirable: bool | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest sample."""
        return len(self.prompt) + max((len(c) for c in self.completions), default=0)


def tokenise(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Record]:
    """Encodes prompts and completions, and ends the completions."""
    texts = [text for each in examples for text in (each.prompt, *each.completions)]
    encoded = iter(tokenizer.encode_batch(texts))
    # One name for all rows: a field that a record lacks is `None` there.
    extras = dict.fromkeys(name for each in examples for name in each.extras)
    records = []
    for example in examples:
        prompt = np.array(next(encoded), np.int32)
        completions = [next(encoded) for _ in example.completions]
        ended = [_end(ids, tokenizer, is_chat=example.is_chat) for ids in completions]
        columns = {name: example.extras.get(name) for name in extras}
        records.append(
            Record(
                index=example.index,
                prompt=prompt,
                completions=tuple(np.array(ids, np.int32) for ids in ended),
                is_truncated=(False,) * len(ended),
                texts=example.texts,
                columns={**columns, "prompt": example.prompt},
                is_desirable=example.is_desirable,
            )
        )
    return records


def _end(ids: list[int], tokenizer: Tokenizer, *, is_chat: bool) -> list[int]:
    """Ends a completion; chat templates write the end, and often a newline after it."""
    if is_chat:
        ends = [t for t, token in enumerate(ids) if token in tokenizer.eos_ids]
        if ends:
            return ids[: ends[-1] + 1]
    return [*ids, tokenizer.eos_id]


def keep(
    records: Sequence[Record], path: str, *, name: str, limit: int, overlong: str
) -> tuple[Record, ...]:
    """Applies a length limit; says what it leaves out or cuts.

    Args:
        records: of the file.
        path: of the file, for messages.
        name: of the limit, for messages.
        limit: most tokens of a sample.
        overlong: one of `OVERLONG`.

    Raises:
        ValueError: none is short enough, or one is too long and `overlong` refuses it.
    """
    longer = [record for record in records if record.length > limit]
    if longer and overlong == "refuse":
        raise ValueError(
            f"{path}: {len(longer)} of {len(records)} records are longer than {name}="
            f"{limit}; record {longer[0].index} has {longer[0].length} tokens. Raise "
            f"`{name}`, or set `overlong` to 'filter' or 'truncate'."
        )
    cut = overlong == "truncate"
    kept = tuple(k for record in records if (k := _shorten(record, limit, cut=cut)))
    if not kept:
        shortest = min(
            len(r.prompt) + min((len(c) for c in r.completions), default=0)
            for r in records
        )
        what = "record" if any(r.completions for r in records) else "prompt"
        raise ValueError(
            f"{path}: every {what} is longer than {name}={limit}: the shortest has "
            f"{shortest} tokens. Raise `{name}`."
        )
    if longer:
        num_completions = sum(len(record.completions) for record in records)
        num_kept = sum(len(record.completions) for record in kept)
        _logger.warning(
            "%s: %d of %d records are longer than %s=%d. Left out: %d records, with "
            "%d completions; cut, and so without an end-of-sequence token: %d.",
            *(path, len(longer), len(records), name, limit),
            *(len(records) - len(kept), num_completions - num_kept),
            sum(any(record.is_truncated) for record in kept),
        )
    return kept


def _shorten(record: Record, limit: int, *, cut: bool) -> Record | None:
    """The record within the limit: whole, cut, of fewer pairs, or None."""
    if record.length <= limit:
        return record
    room = limit - len(record.prompt)
    if room < 1 or not record.completions:
        return None
    if cut:
        return dataclasses.replace(
            record,
            completions=tuple(ids[:room] for ids in record.completions),
            is_truncated=tuple(len(ids) > room for ids in record.completions),
        )
    fits = [len(ids) <= room for ids in record.completions]
    size = 2 if len(fits) > 1 else 1
    keep = [
        i
        for start in range(0, len(fits), size)
        if all(fits[start : start + size])
        for i in range(start, start + size)
    ]
    if not keep:
        return None
    return dataclasses.replace(
        record,
        completions=tuple(record.completions[i] for i in keep),
        is_truncated=tuple(record.is_truncated[i] for i in keep),
        texts=tuple(record.texts[i] for i in keep),
    )


def with_mismatches(
    records: Sequence[Record], *, seed: int, limit: int
) -> tuple[Record, ...]:
    """Gives every record another one's completion beside its own, after its prompt.

    Whose that is, the seed alone decides: the next record with another prompt, in a
    random order of all of them. It is cut where it would exceed the limit.

    Args:
        records: with one completion each.
        seed: of the order.
        limit: most tokens of a sample.

    Raises:
        ValueError: all records have the same prompt.
    """
    size = len(records)
    if all(np.array_equal(r.prompt, records[0].prompt) for r in records):
        raise ValueError(
            f"The {size} records have the same prompt. The kind 'labels' needs at least"
            " two prompts: each is also paired with a completion of another one."
        )
    order = np.random.default_rng([seed, size]).permutation(size).tolist()
    found = list(records)
    for place, number in enumerate(order):
        record = records[number]
        following = (records[order[(place + step) % size]] for step in range(1, size))
        other = next(
            r for r in following if not np.array_equal(r.prompt, record.prompt)
        )
        room = max(limit - len(record.prompt), 1)
        completions = (record.completions[0], other.completions[0][:room])
        found[number] = dataclasses.replace(record, completions=completions)
    return tuple(found)
