"""A batch of sequences: named arrays whose rows belong to data ids.

    ids      7  7  9 -1      which record each row came from; -1 is a padding row
    samples  0  1  0  0      which completion of that record
    lengths  5  4  6  0      tokens in the row
    arrays   tokens [B, T], completion_mask [B, T], scores [B], kept [B, T, C], ...
    columns  prompt, answer, ...      text and other host values, one per row

Sequences start at token 0 and are padded at their end. All arrays with a token
dimension have the same `T`; only `prompts` [B, P] has a width of its own. An array of
`None` is declared and absent, so a batch can travel as metadata only.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.partition import balanced_partition

__all__ = ["Batch", "balanced_partition"]

AnyArray = np.ndarray | jax.Array

_PROMPTS = "prompts"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows of named arrays, checked when made; every method returns a new batch."""

    ids: np.ndarray
    """Data id of each row, int64 [B]; -1 marks a padding row."""
    samples: np.ndarray
    """Sample index within the id, int32 [B]; (id, sample) is unique but for padding."""
    lengths: np.ndarray
    """Tokens in each row, int32 [B]; 0 for padding rows."""
    arrays: Mapping[str, AnyArray | None]
    """Arrays of leading dimension B, on the host or on devices."""
    columns: Mapping[str, list]
    """Host values, one per row; `None` on padding rows."""

    def __post_init__(self):
        """Normalises dtypes, then refuses anything inconsistent by its name."""
        for name, dtype in (("ids", np.int64), ("samples", np.int32)):
            object.__setattr__(self, name, _integers(name, getattr(self, name), dtype))
        object.__setattr__(self, "lengths", _integers("lengths", self.lengths))
        object.__setattr__(self, "arrays", dict(self.arrays))
        object.__setattr__(self, "columns", dict(self.columns))
        _check_rows(self)
        _check_arrays(self)

    @classmethod
    def create(
        cls,
        arrays: Mapping[str, AnyArray | None],
        *,
        ids: Sequence[int] | np.ndarray | None = None,
        samples: Sequence[int] | np.ndarray | None = None,
        lengths: Sequence[int] | np.ndarray | None = None,
        columns: Mapping[str, list] | None = None,
    ) -> "Batch":
        """Makes a batch, filling what is not given.

        `ids` count from 0, `samples` count the rows of each id, and `lengths` are the
        full width of the arrays (0 for padding rows, or where no array has tokens).
        """
        columns = columns or {}
        size = _infer_size(arrays, ids, lengths, columns)
        ids = np.arange(size) if ids is None else _integers("ids", ids, np.int64)
        if samples is None:
            samples = _occurrences(ids)
        if lengths is None:
            width = _token_width(arrays) or 0
            lengths = np.where(ids < 0, 0, width).astype(np.int32)
        return cls(
            ids=ids,
            samples=np.asarray(samples),
            lengths=np.asarray(lengths),
            arrays=arrays,
            columns=columns,
        )

    @property
    def size(self) -> int:
        """Number of rows, padding rows included."""
        return self.ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding left out."""
        return int(self.lengths.sum())

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the arrays, absent ones included."""
        return tuple(self.arrays)

    def __getitem__(self, key: str) -> Any:
        """Returns the array of that name, `None` if it is declared and absent."""
        self._require_keys([key])
        return self.arrays[key]

    def select(self, indices: Sequence[int] | np.ndarray) -> "Batch":
        """Takes rows by position, in the order given."""
        indices = _integers("indices", indices, np.int64)
        if indices.size and not (0 <= indices.min() and indices.max() < self.size):
            raise IndexError(
                f"Rows {indices.min()}..{indices.max()} were asked of a batch of "
                f"{self.size} rows. Give positions from 0 to {self.size - 1}."
            )

        def take(x: AnyArray) -> AnyArray:
            return x[indices] if isinstance(x, np.ndarray) else jnp.take(x, indices, 0)

        return self._map_rows(
            take, lambda values: [values[i] for i in indices], self._rows(indices)
        )

    def restrict(self, keys: Iterable[str]) -> "Batch":
        """Keeps only the arrays named; columns stay."""
        keys = tuple(keys)
        self._require_keys(keys)
        return self._replace_arrays({key: self.arrays[key] for key in keys})

    def with_arrays(self, **arrays: AnyArray | None) -> "Batch":
        """Adds arrays, or replaces those of the same name."""
        return self._replace_arrays({**self.arrays, **arrays})

    def without_arrays(self) -> "Batch":
        """Keeps names and metadata: every array becomes declared and absent."""
        return self._replace_arrays(dict.fromkeys(self.arrays))

    def rename(self, names: Mapping[str, str]) -> "Batch":
        """Renames arrays, `{old: new}`; a new name must not be taken."""
        self._require_keys(names)
        renamed = [names.get(key, key) for key in self.arrays]
        twice = sorted({name for name in renamed if renamed.count(name) > 1})
        if twice:
            raise ValueError(
                f"Renaming {dict(names)} gives two arrays the names {twice}. Keys: "
                f"{list(self.arrays)}. Rename the other one too, or restrict first."
            )
        return self._replace_arrays(
            dict(zip(renamed, self.arrays.values(), strict=True))
        )

    def pad_to(self, size: int) -> "Batch":
        """Appends padding rows: zeros, id -1, length 0, columns `None`."""
        extra = size - self.size
        if extra < 0:
            raise ValueError(
                f"A batch of {self.size} rows cannot be padded to {size}. "
                "Ask for at least its size, or `select` rows first."
            )
        if extra == 0:
            return self

        def pad(x: AnyArray) -> AnyArray:
            module = np if isinstance(x, np.ndarray) else jnp
            zeros = module.zeros((extra, *x.shape[1:]), x.dtype)
            return module.concatenate([x, zeros])

        rows = {
            "ids": np.concatenate([self.ids, np.full(extra, -1)]),
            "samples": np.concatenate([self.samples, np.zeros(extra, np.int32)]),
            "lengths": np.concatenate([self.lengths, np.zeros(extra, np.int32)]),
        }
        return self._map_rows(pad, lambda values: values + [None] * extra, rows)

    def split(
        self, num_parts: int, *, unit: int = 1, min_size: int = 1
    ) -> list["Batch"]:
        """Cuts into contiguous parts of nearly equal token counts.

        Args:
            num_parts: How many parts.
            unit: Rows that stay together: 2 keeps the rows of a pair in one part.
            min_size: The fewest units a part may have.
        """
        if unit < 1 or self.size % unit:
            raise ValueError(
                f"{self.size} rows do not divide into units of {unit}. "
                "Pad the batch to a multiple of `unit`."
            )
        weights = self.lengths.reshape(-1, unit).sum(axis=1)
        parts = balanced_partition(weights, num_parts, min_size=min_size)
        return [self._slice(start * unit, stop * unit) for start, stop in parts]

    @staticmethod
    def concatenate(batches: Sequence["Batch"]) -> "Batch":
        """Puts batches of the same keys and columns below one another."""
        if not batches:
            raise ValueError("There is no batch to concatenate. Give at least one.")
        first = batches[0]
        for position, batch in enumerate(batches):
            for what in ("arrays", "columns"):
                found, needed = set(getattr(batch, what)), set(getattr(first, what))
                if found != needed:
                    raise ValueError(
                        f"Batch {position} has the {what} {sorted(found)}, the first "
                        f"one {sorted(needed)}. `restrict` them to the same names."
                    )
        return Batch(
            ids=np.concatenate([batch.ids for batch in batches]),
            samples=np.concatenate([batch.samples for batch in batches]),
            lengths=np.concatenate([batch.lengths for batch in batches]),
            arrays={
                key: _concatenate_arrays(key, [batch.arrays[key] for batch in batches])
                for key in first.arrays
            },
            columns={
                name: [value for batch in batches for value in batch.columns[name]]
                for name in first.columns
            },
        )

    def merge(self, other: "Batch") -> "Batch":
        """Joins the arrays and columns of two batches with the same rows.

        Where both have a name, `other` wins unless it is absent there. A sequence only
        grows (a prompt becomes prompt and completion), so the longer length stands.
        """
        for name in ("ids", "samples"):
            found, needed = getattr(other, name), getattr(self, name)
            if not np.array_equal(found, needed):
                raise ValueError(
                    f"Batches of different rows cannot merge: {name} "
                    f"{_brief(found)} and {_brief(needed)}. `select` one into the "
                    "order of the other."
                )
        present = {key: x for key, x in other.arrays.items() if x is not None}
        return Batch(
            ids=self.ids,
            samples=self.samples,
            lengths=np.maximum(self.lengths, other.lengths),
            arrays={**other.arrays, **self.arrays, **present},
            columns={**self.columns, **other.columns},
        )

    def _slice(self, start: int, stop: int) -> "Batch":
        window = slice(start, stop)
        return self._map_rows(
            lambda x: x[window], lambda values: values[window], self._rows(window)
        )

    def _rows(self, index: slice | np.ndarray) -> dict[str, np.ndarray]:
        return {
            "ids": self.ids[index],
            "samples": self.samples[index],
            "lengths": self.lengths[index],
        }

    def _map_rows(self, array_fn, column_fn, rows: dict[str, np.ndarray]) -> "Batch":
        return Batch(
            **rows,
            arrays={
                key: None if x is None else array_fn(x)
                for key, x in self.arrays.items()
            },
            columns={name: column_fn(list(v)) for name, v in self.columns.items()},
        )

    def _replace_arrays(self, arrays: Mapping[str, AnyArray | None]) -> "Batch":
        return dataclasses.replace(self, arrays=arrays)

    def _require_keys(self, keys: Iterable[str]):
        for key in keys:
            if key in self.arrays:
                continue
            near = difflib.get_close_matches(key, self.arrays, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            if key in self.columns:
                hint = f" It is a column: read `batch.columns[{key!r}]`."
            raise KeyError(
                f"This batch has no array {key!r}.{hint} Keys: {list(self.arrays)}."
            )


def _integers(name: str, values: Any, dtype: type = np.int32) -> np.ndarray:
    values = np.asarray(values)
    if values.size == 0:
        values = values.astype(dtype)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"`{name}` has shape {values.shape} and dtype {values.dtype}. "
            "It must be one list of integers."
        )
    return values.astype(dtype)


def _occurrences(ids: np.ndarray) -> np.ndarray:
    """How often each id came before: [7, 9, 7, 7] -> [0, 0, 1, 2]."""
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    is_first = np.concatenate([[True], ranked[1:] != ranked[:-1]])[: len(ids)]
    positions = np.arange(len(ids))
    starts = np.maximum.accumulate(np.where(is_first, positions, 0))
    result = np.zeros(len(ids), np.int32)
    result[order] = positions - starts
    return result


def _token_width(arrays: Mapping[str, AnyArray | None]) -> int | None:
    """T of the arrays with tokens, else P of the prompts."""
    widths = {k: x.shape[1] for k, x in arrays.items() if x is not None and x.ndim > 1}
    prompts = widths.pop(_PROMPTS, None)
    return next(iter(widths.values()), prompts)


def _infer_size(arrays, ids, lengths, columns) -> int:
    for values in (ids, lengths, *arrays.values(), *columns.values()):
        if values is not None and np.ndim(values):
            return len(values)
    raise ValueError(
        "Nothing tells the number of rows. Give an array, ids, lengths or a column."
    )


def _check_rows(batch: Batch):
    size = batch.size
    for name in ("samples", "lengths"):
        if len(getattr(batch, name)) != size:
            raise ValueError(
                f"`{name}` has {len(getattr(batch, name))} entries for {size} ids. "
                "Give one per row."
            )
    for name, values in batch.columns.items():
        if not isinstance(values, list) or len(values) != size:
            raise ValueError(
                f"Column {name!r} is a {type(values).__name__} of {len(values)} for "
                f"{size} rows. Give a list with one value per row."
            )
    padding = batch.ids == -1
    if (batch.ids < -1).any() or (batch.lengths < 0).any():
        raise ValueError(
            f"ids start at {batch.ids.min()}, lengths at {batch.lengths.min()}. "
            "An id is at least 0 (or -1 on a padding row), a length at least 0."
        )
    if batch.lengths[padding].any():
        raise ValueError(
            f"`lengths` {_brief(batch.lengths)} gives tokens to padding rows (id -1). "
            "Their length is 0."
        )
    rows = np.stack([batch.ids, batch.samples], axis=1)[~padding]
    unique, counts = np.unique(rows, axis=0, return_counts=True)
    if len(unique) != len(rows):
        twice = tuple(unique[counts > 1][0].tolist())
        raise ValueError(
            f"(id, sample) {twice} appears more than once. Number the completions of "
            "an id with `samples`."
        )


def _check_arrays(batch: Batch):
    width_key, width = None, None
    for key, x in batch.arrays.items():
        if x is None:
            continue
        if not isinstance(x, np.ndarray | jax.Array):
            raise TypeError(
                f"Array {key!r} is a {type(x).__name__}. Give a numpy or jax array."
            )
        if x.ndim < 1 or x.shape[0] != batch.size:
            raise ValueError(
                f"Array {key!r} has shape {x.shape} in a batch of {batch.size} rows. "
                "Its first dimension is the row."
            )
        if _is_mask(key) and x.dtype != np.bool_:
            raise ValueError(f"Mask {key!r} has dtype {x.dtype}. A mask is bool.")
        if x.ndim > 1 and key != _PROMPTS:
            if width is not None and x.shape[1] != width:
                raise ValueError(
                    f"Array {key!r} has {x.shape[1]} tokens a row, {width_key!r} has "
                    f"{width}. All arrays but {_PROMPTS!r} share one width."
                )
            width_key, width = key, x.shape[1]
    _check_lengths(batch)


def _check_lengths(batch: Batch):
    width = _token_width(batch.arrays)
    if width is not None and batch.size and batch.lengths.max() > width:
        raise ValueError(
            f"`lengths` reaches {batch.lengths.max()}, but the arrays have {width} "
            "tokens a row. Give both of the same rollout."
        )
    for key, x in batch.arrays.items():
        # Masks on devices are not read: that would wait for them.
        if not (_is_mask(key) and isinstance(x, np.ndarray) and x.ndim == 2):
            continue
        outside = np.arange(x.shape[1]) >= batch.lengths[:, None]
        if (x & outside).any():
            row = int((x & outside).any(axis=1).argmax())
            raise ValueError(
                f"Mask {key!r} marks token {int(np.flatnonzero(x[row])[-1])} of row "
                f"{row}, which has {batch.lengths[row]} tokens. Set `lengths` too."
            )


def _is_mask(key: str) -> bool:
    return key == "mask" or key.endswith("_mask")


def _concatenate_arrays(key: str, values: list[AnyArray | None]) -> AnyArray | None:
    present = [x for x in values if x is not None]
    if not present:
        return None
    if len(present) < len(values):
        raise ValueError(
            f"Array {key!r} is absent in {len(values) - len(present)} of "
            f"{len(values)} batches. Have it in all or in none."
        )
    if len({x.shape[1:] for x in present}) > 1:
        raise ValueError(
            f"Array {key!r} has the shapes {[x.shape for x in present]}. "
            "Only the number of rows may differ."
        )
    on_host = all(isinstance(x, np.ndarray) for x in present)
    return np.concatenate(present) if on_host else jnp.concatenate(present)


def _brief(values: np.ndarray) -> str:
    return np.array2string(np.asarray(values), threshold=8, edgeitems=3)
