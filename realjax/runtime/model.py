"""One model on a mesh, for notebooks and scripts: logits, scores, sampling, saving."""

import functools
import pathlib
import types
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, Float, Int, PyTree
from realjax.core.config import check_choice
from realjax.data.tokenizer import Tokenizer
from realjax.functions.role import DTYPES
from realjax.models import heads, hf, lora_files, transformer
from realjax.models.config import ModelConfig
from realjax.models.lora import merged
from realjax.models.parameters import LORA, divide, join, split, without_adapters
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.parallel.sharding import (
    check_fit,
    padded_for,
    parameter_shardings,
    rows_sharding,
)
from realjax.rl import logprobs
from realjax.runtime.agreement import Agreement


class Model:
    """A model's config and its parameters on the devices of an allocation.

    Attributes:
        config: sizes and head.
        parameters: nested dict of arrays.
        allocation: devices and strategy.
        dtype: of matrix products.
        tokenizer: where the folder had one; needed for text only.
        role: what it was trained to be, where its folder says so.
        programs: compiled for sampling, by what they depend on.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: PyTree,
        *,
        allocation: Allocation,
        dtype: str = "float32",
        tokenizer: Tokenizer | None = None,
        role: str | None = None,
    ):
        """Holds what it is given; `load` reads a folder."""
        self.config, self.parameters = config, parameters
        self.allocation, self.dtype, self.tokenizer = allocation, dtype, tokenizer
        self.role, self.mesh = role, make_mesh(allocation)
        self.programs: dict[Hashable, Any] = {}

    def logits(
        self,
        tokens: Int[np.ndarray | Array, "B T"],
        segment_ids: Int[np.ndarray | Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Scores of the next token after every position.

        Args:
            tokens: [B, T] ids.
            segment_ids: [B, T]; 1, 2, … for the sequences packed in a row, 0 for
                padding. Without it a row is one sequence.

        Returns:
            [B, T, V] float32.

        Raises:
            ValueError: the model has a scalar head, or an id is not in its vocabulary.
        """
        if self.config.head != "language":
            raise ValueError(
                "The model has a scalar head (a reward model or critic) and no logits. "
                "Use `scores`, or load a language model."
            )
        tokens = np.asarray(tokens, np.int32)
        check_ids(tokens, self.config, "tokens")
        segments = np.ones_like(tokens) if segment_ids is None else segment_ids
        if np.shape(segments) != tokens.shape:
            raise ValueError(
                f"segment_ids has the shape {np.shape(segments)} and tokens "
                f"{tokens.shape}. Give one segment id for each token."
            )
        return self._logits(*self._rows(tokens, segments))[: len(tokens)]

    def scores(
        self,
        tokens: Int[np.ndarray | Array, "B T"],
        lengths: Sequence[int] | Int[np.ndarray | Array, " B"],
    ) -> Float[Array, " B"]:
        """The scalar head's output at the last token of every sequence.

        Args:
            tokens: [B, T] ids, sequences at the left.
            lengths: tokens of each sequence.

        Returns:
            [B] float32.

        Raises:
            ValueError: the model has a language head, an id is not in its vocabulary,
                or a length is not from 1 to T.
        """
        tokens, lengths, scalars, _ = self._head_outputs(tokens, lengths)
        return scalars[np.arange(len(tokens)), lengths - 1]

    def values(
        self,
        tokens: Int[np.ndarray | Array, "B T"],
        lengths: Sequence[int] | Int[np.ndarray | Array, " B"],
    ) -> Float[Array, "B T"]:
        """What a critic says: the value of the state before each token.

        Args:
            tokens: [B, T] ids, sequences at the left.
            lengths: tokens of each sequence.

        Returns:
            [B, T] float32; 0 at the first token, which is given, and past the length.

        Raises:
            ValueError: as `scores` does.
        """
        _, _, scalars, segments = self._head_outputs(tokens, lengths)
        return logprobs.token_values(scalars, jnp.asarray(segments))

    def _head_outputs(self, tokens, lengths):
        """Checked tokens and lengths, the scalar head's outputs, and segment ids."""
        if self.config.head != "scalar":
            raise ValueError(
                "The model has a language head and gives no scores. Use `logits`, or "
                "load a reward model or critic."
            )
        tokens, lengths = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
        check_ids(tokens, self.config, "tokens")
        is_length = (lengths >= 1) & (lengths <= tokens.shape[1])
        if len(lengths) != len(tokens) or not is_length.all():
            raise ValueError(
                f"lengths is {lengths.tolist()} for tokens of shape {tokens.shape}. "
                f"Give each row a length from 1 to {tokens.shape[1]}."
            )
        segments = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
        scalars = self._scalars(*self._rows(tokens, segments))[: len(tokens)]
        return tokens, lengths, scalars, segments

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes a Hugging Face folder, with the tokenizer if there is one.

        Adapters are merged into it. All processes of a run call this.
        """
        hf.save(
            folder,
            without_adapters(self.config),
            merged(self.parameters, self.config),
            tokenizer=self.tokenizer,
            role=self.role,
            agreement=Agreement("model"),
        )

    def save_adapters(self, folder: str | pathlib.Path, base: str = "") -> None:
        """Writes a folder of the adapters alone, in PEFT's layout.

        All processes of a run call this.

        Args:
            folder: to make or replace.
            base: name or folder of the model beside which they stand.

        Raises:
            ValueError: the model has none.
        """
        lora_files.save_adapters(
            folder,
            self.config,
            self.parameters,
            base=base,
            agreement=Agreement("adapters"),
        )

    def _rows(self, tokens, segment_ids):
        """Rows on the mesh, padded to a number that divides over it."""
        shards = self.allocation.num_row_shards
        segment_ids = np.asarray(segment_ids, np.int32)
        padding = ((0, -len(tokens) % shards), (0, 0))
        tokens, segment_ids = np.pad(tokens, padding), np.pad(segment_ids, padding)
        sharding = rows_sharding(self.mesh, len(tokens))
        positions = _positions(segment_ids)
        make = jax.make_array_from_callback
        return [self.parameters] + [
            make(x.shape, sharding, lambda index, x=x: x[index])
            for x in (tokens, positions, segment_ids)
        ]

    def _hidden(self, parameters, tokens, positions, segment_ids):
        return transformer.hidden_states(
            parameters,
            self.config,
            tokens,
            positions,
            segment_ids,
            dtype=jnp.dtype(self.dtype),
            partition=partition_for(self.mesh, options=self.allocation.options),
        )

    @functools.cached_property
    def _logits(self):
        return jax.jit(
            lambda parameters, *rows: heads.logits(
                parameters, self.config, self._hidden(parameters, *rows)
            )
        )

    @functools.cached_property
    def _scalars(self):
        return jax.jit(
            lambda parameters, *rows: heads.scalars(
                parameters, self._hidden(parameters, *rows)
            )
        )


def load(
    folder: str | pathlib.Path,
    allocation: str | Allocation | None = None,
    dtype: str | None = None,
    family: str | types.ModuleType | None = None,
    label: str = "",
    adapters: str | pathlib.Path | None = None,
) -> Model:
    """Reads a Hugging Face folder onto devices: of a policy, reward model or critic.

    Args:
        folder: config.json and safetensors (or .bin files); a tokenizer is read where
            there is one.
        allocation: as in "d2t4"; data parallel over all devices by default.
        dtype: "float32", "bfloat16" or "float16"; by default bfloat16 on a GPU.
        family: a module of your own, or its dotted name, that reads the folder's config
            and tensors; None takes the family that its config.json names.
        label: of a sequence classifier with several, the name or number of the one
            whose logit is the score.
        adapters: folder of adapters for the model, in PEFT's layout.

    Raises:
        FileNotFoundError: there is no such folder or it holds no model.
        ValueError: the model, the allocation or the type is not supported, or a file is
            broken.
    """
    folder = pathlib.Path(folder)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    config = hf.read_config(folder, family=family, label=label)
    if not isinstance(allocation, Allocation):
        allocation = Allocation.parse(allocation or f"d{len(jax.devices())}")
    check_fit(allocation, config)
    config = padded_for(config, [allocation])
    base_config = config
    if adapters is not None:
        config = lora_files.read_adapters(adapters, config)
    shardings = parameter_shardings(
        transformer.abstract_parameters(config),
        make_mesh(allocation),
        options=allocation.options,
    )
    _, of_base = divide(shardings, LORA)
    parameters = hf.load(folder, config=base_config, shardings=of_base, label=label)
    if adapters is not None:
        of_trained, _ = split(shardings, config)
        found = lora_files.load_adapters(adapters, config, shardings=of_trained)
        parameters = join(found, parameters)
    has_tokenizer = (folder / "tokenizer.json").exists()
    return Model(
        config,
        parameters,
        allocation=allocation,
        dtype=dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32"),
        tokenizer=Tokenizer.load(folder) if has_tokenizer else None,
        role=hf.read_role(folder),
    )


def check_ids(ids: np.ndarray, config: ModelConfig, what: str) -> None:
    """Refuses ids that the model has no embedding for.

    Raises:
        ValueError: naming the id and the vocabulary.
    """
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise ValueError(
            f"{what} holds the id {outside[0]}, and the model's vocabulary has "
            f"{config.vocab_size} ids, from 0. Is the tokenizer another model's?"
        )


def _positions(segment_ids: np.ndarray) -> np.ndarray:
    """Place of every token in its own segment, from 0."""
    place = np.arange(segment_ids.shape[1])
    is_first = np.pad(
        segment_ids[:, 1:] != segment_ids[:, :-1],
        ((0, 0), (1, 0)),
        constant_values=True,
    )
    first = np.maximum.accumulate(np.where(is_first, place, 0), axis=1)
    return (place - first).astype(np.int32)
