"""Data sets: records of a file, tokenised once, given out as batches.

    kind            arrays of a batch                               rows a record
    prompt_answer   tokens, completion_mask [B, T], is_truncated    1
    pairs           the same and pair_weights [B]; better and       2 * max_pairs
                    worse completions in turn
    labels          those of prompt_answer, is_desirable [B], and   1
                    mismatched_tokens [B, T] of mismatched_lengths
                    [B]: each prompt with another's completion
    prompts         prompts [B, P]                                  1

The tokens of a sample are those of its prompt, those of its completion, and one
end-of-sequence token, so that a prompt is always a prefix, whatever the encoding would
merge at the seam. A completion that was cut has no such token and is marked.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from realjax.core.batch import Batch
from realjax.data.records import KINDS, load_records, read_examples
from realjax.data.tokenised import OVERLONG, Record, keep, tokenise, with_mismatches
from realjax.data.tokenizer import Tokenizer

__all__ = ["DataConfig", "Dataset", "load_dataset", "load_records"]

_WIDTH_MULTIPLE = 8

MISMATCHED = "mismatched_"
"""What the keys of mismatched completions begin with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Files and how they are read.

    Attributes:
        path: Training records, .jsonl or .json.
        valid_path: Held-out records; empty for none, or for `held_out` of `path`.
        held_out: Last records of `path` that are held out, without a `valid_path`.
        kind: "prompt_answer", "pairs", "labels" or "prompts".
        max_length: Most tokens of prompt, completion and end together.
        max_prompt_length: Most tokens of a prompt, for the kind "prompts".
        overlong: What happens to longer records: "filter" leaves them out, "refuse" is
            an error, "truncate" cuts completions (never prompts: a record whose prompt
            leaves no room is left out).
        max_pairs: Most pairs of one prompt in a batch, drawn anew each epoch.
        batch_size: Records of a training batch.
        valid_batch_size: Records of a held-out batch; 0 means `batch_size`.
        valid_limit: Held-out records to use; 0 means all.
        shuffle: Whether training records are permuted, each epoch differently.
        length_buckets: Widths that prompt batches may have; none means one width, that
            of the longest prompt.
    """

    path: str = ""
    valid_path: str = ""
    held_out: int = 0
    kind: str = ""
    max_length: int = 1024
    max_prompt_length: int = 256
    overlong: str = "filter"
    max_pairs: int = 2
    batch_size: int = 256
    valid_batch_size: int = 0
    valid_limit: int = 0
    shuffle: bool = True
    length_buckets: tuple[int, ...] = ()

    def __post_init__(self):
        """Refuses values that no file could be read with."""
        if self.kind not in ("", *KINDS):
            raise ValueError(
                f"`kind` is {self.kind!r}. Needed is one of {list(KINDS)}."
            )
        if self.overlong not in OVERLONG:
            raise ValueError(
                f"`overlong` is {self.overlong!r}. Needed is one of {list(OVERLONG)}."
            )
        for name in ("max_length", "max_prompt_length", "max_pairs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}. It must be at least 1."
                )
        for name in ("valid_batch_size", "valid_limit", "held_out"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}. It must be at least 0."
                )
        if any(width < 1 for width in self.length_buckets):
            raise ValueError(
                f"`length_buckets` is {self.length_buckets}. Widths are at least 1."
            )


class Dataset:
    """Tokenised records; see the module for the batches they give.

    Attributes:
        kind: "prompt_answer", "pairs", "labels" or "prompts".
        prompt_width: Width that holds every prompt (the widest bucket in use).
        row_width: T, the same for all batches; `prompt_width` for prompts.
        rows_per_record: Rows that a record takes in a batch.
        num_left_out: Records of the file that were too long.
        num_rows_read: Rows whose tokens were put into a batch so far.
    """

    def __init__(
        self,
        records: Sequence[Record],
        config: DataConfig,
        *,
        pad_id: int,
        seed: int,
        num_left_out: int = 0,
    ):
        if not records:
            raise ValueError("A data set needs at least one record.")
        self.kind = config.kind
        self.num_left_out = num_left_out
        self.num_rows_read = 0
        self.rows_per_record = 2 * config.max_pairs if self.kind == "pairs" else 1
        if self.kind == "labels":
            records = with_mismatches(records, seed=seed, limit=config.max_length)
        self._records = tuple(records)
        self._pad_id, self._seed = pad_id, seed
        self._max_pairs = config.max_pairs
        self._stored: dict[str, np.ndarray] = {}
        longest_prompt = max(len(record.prompt) for record in records)
        self._buckets = tuple(sorted(set(config.length_buckets))) or (
            _round_up(longest_prompt),
        )
        if self.kind == "prompts":
            self.prompt_width = self._bucket(longest_prompt)
            self.row_width = self.prompt_width
        else:
            self.prompt_width = _round_up(longest_prompt)
            self.row_width = _round_up(max(record.length for record in records))

    @property
    def length_buckets(self) -> tuple[int, ...]:
        """Widths that its batches of prompts may have."""
        return self._buckets

    @property
    def numbers(self) -> frozenset[int]:
        """Numbers of its records in the file, counted from 0."""
        return frozenset(record.index for record in self._records)

    @functools.cached_property
    def mean_length(self) -> float:
        """Tokens of a row in the mean: of a prompt, or of a prompt and a completion."""
        lengths = [
            len(record.prompt) + len(completion)
            for record in self._records
            for completion in (record.completions or ((),))
        ]
        return float(np.mean(lengths))

    @functools.cached_property
    def _first_tokens(self) -> dict[tuple[int, int], int]:
        """Number of each completion's first token, among those of all completions."""
        first, found = 0, {}
        for record in self._records:
            for which, completion in enumerate(record.completions):
                found[record.index, which] = first
                first += len(completion)
        return found

    @property
    def num_completions(self) -> int:
        """Completions of all records; of labels, the mismatched ones too."""
        return sum(len(record.completions) for record in self._records)

    def completion_batches(
        self, size: int, rows: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """Every completion of every record once, `size` at a time, in order.

        Args:
            size: Rows of a batch; the last one is padded.
            rows: As in `batch`.
        """
        sides = [
            (r, which) for r in self._records for which in range(len(r.completions))
        ]
        for start in range(0, len(sides), size):
            arrays, lengths = self._rows(sides[start : start + size], rows)
            ids = range(start, start + len(lengths))
            yield Batch.create(arrays, ids=ids, lengths=lengths).pad_to(size)

    def stored_keys(self, key: str) -> tuple[str, ...]:
        """Names under which `store` adds to the batches."""
        return (key, MISMATCHED + key) if self.kind == "labels" else (key,)

    def store(self, key: str, values: np.ndarray) -> None:
        """Adds a number per completion token to all batches, as [B, T].

        Args:
            key: Its name in a batch; of a mismatched completion, after "mismatched_".
            values: Of the tokens of all completions, in the order of
                `completion_batches`; [N] float32.

        Raises:
            ValueError: There are more or fewer tokens.
        """
        size = sum(len(c) for record in self._records for c in record.completions)
        if values.shape != (size,):
            raise ValueError(
                f"{key!r} has the shape {values.shape}, and the completions have {size}"
                " tokens in all. Make it anew from this data set."
            )
        self._stored[key] = values

    def __len__(self) -> int:
        """Number of records kept."""
        return len(self._records)

    def batch(
        self,
        indices: Sequence[int] | np.ndarray,
        epoch: int | Sequence[int] | np.ndarray = 0,
        *,
        rows: np.ndarray | None = None,
    ) -> Batch:
        """Makes a batch of records.

        A record given twice gets further sample indices. `ids` are the numbers of the
        records in the file, whether or not others were left out.

        Args:
            indices: Which of the records kept.
            epoch: Of all or of each; pairs are drawn from (seed, epoch, id).
            rows: Whether the tokens of each row are needed, by its place in the batch;
                the others are padding, of the right length. None needs all.
        """
        records = [self._records[int(index)] for index in indices]
        epochs = np.broadcast_to(epoch, len(records)).tolist()
        if self.kind == "prompts":
            return self._prompt_batch(records, rows)
        if self.kind == "prompt_answer":
            return self._sample_batch([(record, 0) for record in records], rows)
        if self.kind == "labels":
            return self._label_batch(records, rows)
        sides, weights = [], []
        for record, each_epoch in zip(records, epochs, strict=True):
            pairs = self._draw_pairs(record, each_epoch)
            sides += [(record, 2 * pair + side) for pair in pairs for side in (0, 1)]
            weights += [1 / len(pairs)] * (2 * len(pairs))
        batch = self._sample_batch(sides, rows)
        batch = batch.with_arrays(pair_weights=np.array(weights, np.float32))
        return batch.pad_to(self.rows_per_record * len(records))

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        settings = [self.kind, self._seed, self._max_pairs, list(self._buckets)]
        digest.update(json.dumps([*settings, self.row_width]).encode())
        for record in self._records:
            for tokens in (record.prompt, *record.completions):
                digest.update(len(tokens).to_bytes(8, "little"))
                digest.update(tokens.tobytes())
            of_record = [record.index, record.columns]
            if record.is_desirable is not None:
                of_record.append(record.is_desirable)
            digest.update(json.dumps(of_record).encode())
        return digest.hexdigest()

    def completions_fingerprint(self) -> str:
        """A hash of the tokens of all completions, with their prompts."""
        digest = hashlib.sha256()
        for record in self._records:
            digest.update(len(record.completions).to_bytes(8, "little"))
            for tokens in (record.prompt, *record.completions):
                digest.update(len(tokens).to_bytes(8, "little"))
                digest.update(tokens.tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """A hash of everything that decides the batches."""
        return self._fingerprint

    def _bucket(self, length: int) -> int:
        for width in self._buckets:
            if width >= length:
                return width
        raise ValueError(
            f"The longest prompt has {length} tokens, the widest of `length_buckets` "
            f"{list(self._buckets)} is {self._buckets[-1]}. Add a wider one, or lower "
            "`max_prompt_length`."
        )

    def _draw_pairs(self, record: Record, epoch: int) -> list[int]:
        num_pairs = len(record.completions) // 2
        if num_pairs <= self._max_pairs:
            return list(range(num_pairs))
        rng = np.random.default_rng([self._seed, epoch, record.index])
        return rng.permutation(num_pairs)[: self._max_pairs].tolist()

    def _needed(self, num_rows: int, rows: np.ndarray | None) -> list[int]:
        """Rows of a batch to be filled; counts them."""
        needed = np.arange(num_rows)
        if rows is not None:
            needed = np.flatnonzero(rows[:num_rows])
        self.num_rows_read += len(needed)
        return needed.tolist()

    def _prompt_batch(
        self, records: list[Record], rows: np.ndarray | None = None
    ) -> Batch:
        lengths = np.array([len(record.prompt) for record in records], np.int32)
        width = self._bucket(int(lengths.max(initial=0)))
        prompts = np.full((len(records), width), self._pad_id, np.int32)
        for row in self._needed(len(records), rows):
            prompts[row, : lengths[row]] = records[row].prompt
        return Batch.create(
            {"prompts": prompts},
            ids=[record.index for record in records],
            lengths=lengths,
            columns=_columns(records),
        )

    def _label_batch(
        self, records: list[Record], rows: np.ndarray | None = None
    ) -> Batch:
        """Batch of labelled completions, with the mismatched ones beside them."""
        batch = self._sample_batch([(record, 0) for record in records], rows)
        others, lengths = self._rows([(record, 1) for record in records], rows)
        del others["completion_mask"]
        return batch.with_arrays(
            is_desirable=np.array([r.is_desirable for r in records], bool),
            mismatched_lengths=lengths,
            **{MISMATCHED + key: value for key, value in others.items()},
        )

    def _rows(
        self, sides: list[tuple[Record, int]], rows: np.ndarray | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Tokens, completion masks and what is stored [B, T], and lengths [B]."""
        shape = (len(sides), self.row_width)
        tokens = np.full(shape, self._pad_id, np.int32)
        mask = np.zeros(shape, bool)
        stored = {key: np.zeros(shape, np.float32) for key in self._stored}
        lengths = np.array(
            [len(r.prompt) + len(r.completions[which]) for r, which in sides], np.int32
        )
        for row in self._needed(len(sides), rows):
            record, which = sides[row]
            start, stop = len(record.prompt), lengths[row]
            tokens[row, :start] = record.prompt
            tokens[row, start:stop] = record.completions[which]
            mask[row, start:stop] = True
            for key, values in self._stored.items():
                first = self._first_tokens[record.index, which]
                stored[key][row, start:stop] = values[first : first + stop - start]
        return {"tokens": tokens, "completion_mask": mask, **stored}, lengths

    def _sample_batch(
        self, sides: list[tuple[Record, int]], rows: np.ndarray | None = None
    ) -> Batch:
        """Batch of `(record, which completion)`, one a row."""
        arrays, lengths = self._rows(sides, rows)
        records = [record for record, _ in sides]
        columns = _columns(records)
        if self.kind == "pairs":
            for side, name in enumerate(("chosen", "rejected")):
                columns[name] = [
                    r.texts[which - which % 2 + side] for r, which in sides
                ]
        else:
            columns["answer"] = [record.texts[0] for record in records]
        truncated = [record.is_truncated[which] for record, which in sides]
        return Batch.create(
            arrays | {"is_truncated": np.array(truncated, bool)},
            ids=[record.index for record in records],
            lengths=lengths,
            columns=columns,
        )


def load_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    seed: int = 0,
    only: Collection[int] | None = None,
) -> Dataset:
    """Reads, tokenises and checks the records of a file.

    Args:
        config: Files and limits.
        tokenizer: Of the models that will read the tokens.
        split: "train" or "valid".
        seed: Of the pairs drawn.
        only: Numbers of the records in the file that may be used, as `Dataset.numbers`
            of another kind has them; nothing else is then cut off.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A record is malformed, or none is short enough.
    """
    is_cut = config.held_out > 0 and not config.valid_path
    paths = {
        "train": config.path,
        "valid": config.path if is_cut else config.valid_path,
    }
    if split not in paths:
        raise ValueError(f"`split` is {split!r}. Needed is one of {list(paths)}.")
    field = "path" if split == "train" else "valid_path"
    if not paths[split]:
        raise ValueError(f"`data.{field}` is empty. Set it to a .jsonl or .json file.")
    if not config.kind:
        raise ValueError(f"`data.kind` is empty. Set it to one of {list(KINDS)}.")
    path = paths[split]
    objects = load_records(path)
    try:
        examples = read_examples(objects, config.kind, tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if only is not None:
        examples = [example for example in examples if example.index in only]
    records = tokenise(examples, tokenizer)
    name = "max_prompt_length" if config.kind == "prompts" else "max_length"
    limit = getattr(config, name)
    kept = keep(records, path, name=name, limit=limit, overlong=config.overlong)
    num_left_out = len(records) - len(kept)
    if is_cut and only is None:
        if len(kept) <= config.held_out:
            raise ValueError(
                f"{path} has {len(kept)} records that fit, and `held_out` is "
                f"{config.held_out}. Hold out fewer, or give more records."
            )
        size = len(kept) - config.held_out
        kept = kept[:size] if split == "train" else kept[size:]
    if split == "valid" and config.valid_limit:
        kept = kept[: config.valid_limit]
    return Dataset(
        kept, config, pad_id=tokenizer.pad_id, seed=seed, num_left_out=num_left_out
    )


def _columns(records: Sequence[Record]) -> dict[str, list]:
    names = records[0].columns if records else ()
    return {name: [record.columns[name] for record in records] for name in names}


def _round_up(length: int) -> int:
    return -(-length // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
