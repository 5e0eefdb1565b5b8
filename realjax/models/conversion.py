"""Checkpoint folders converted and described, tensor by tensor, without any device."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.models import checkpoint_config, families
from realjax.models.block import INIT_DEVIATION
from realjax.models.byte_ranges import FLOATS
from realjax.models.checkpoint_config import GENERATION_FILE
from realjax.models.config import ModelConfig
from realjax.models.lora_files import Updates
from realjax.models.new_folder import NewFolder
from realjax.models.parameters import abstract_parameters
from realjax.models.tensor_checks import (
    is_parameter,
    is_stored,
    needed_shapes,
    open_checked,
)
from realjax.models.tensor_files import TensorFiles
from realjax.models.tensor_writer import (
    check_stored_dtype,
    plan_files,
    write_file,
    write_index,
)

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
_BLOCK_ROWS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a checkpoint folder holds.

    Attributes:
        folder: of the checkpoint.
        config: of its model.
        role: what it was trained to be, if it says that.
        num_parameters: in its tensors.
        num_tensors: that the model uses.
        num_ignored: tensors that it has besides.
        files: bytes of every tensor file, by name.
        groups: for every kind of parameter, how many tensors are stored as which type.
        has_tokenizer: there is a tokenizer.json.
    """

    folder: Path
    config: ModelConfig
    role: str | None
    num_parameters: int
    num_tensors: int
    num_ignored: int
    files: dict[str, int]
    groups: dict[str, dict[str, int]]
    has_tokenizer: bool

    @property
    def dtypes(self) -> list[str]:
        """The types its tensors are stored as, the widest first."""
        found = {dtype for counts in self.groups.values() for dtype in counts}
        return sorted(found, key=lambda name: (-FLOATS[name].itemsize, name))


def summarize(folder: str | Path, *, family: str | None = None) -> Summary:
    """Check and describe a checkpoint; no number is read.

    Args:
        folder: of the checkpoint.
        family: name of the module of a family of your own.

    Raises:
        FileNotFoundError, ValueError: as `hf.check` does.
    """
    folder = Path(folder)
    with _opened(folder, family) as (config, files, needed):
        groups: dict[str, dict[str, int]] = {}
        for kind, names in _names_by_kind(config).items():
            counts = groups.setdefault(kind, {})
            for name in names:
                counts[files.dtype(name)] = counts.get(files.dtype(name), 0) + 1
        return Summary(
            folder=folder,
            config=config,
            role=checkpoint_config.read_role(folder),
            num_parameters=sum(map(int, map(np.prod, needed.values()))),
            num_tensors=len(needed),
            num_ignored=len(files.names - needed.keys()),
            files={path.name: path.stat().st_size for path in files.paths},
            groups=groups,
            has_tokenizer=(folder / "tokenizer.json").is_file(),
        )


def check_finite(
    folder: str | Path,
    on_tensor: Callable[[], Any] = lambda: None,
    *,
    family: str | None = None,
):
    """Read every number of a checkpoint.

    Args:
        folder: of the checkpoint.
        on_tensor: called after each tensor.
        family: name of the module of a family of your own.

    Raises:
        ValueError: if one is not finite; the message names the tensor and the place.
    """
    with _opened(Path(folder), family) as (_, files, needed):
        for name, shape in needed.items():
            for box in _blocks(shape):
                _refuse_not_finite(name, files.path(name), files.read(name, box), box)
            on_tensor()


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: np.dtype | None = None,
    head: str | None = None,
    family: str | None = None,
    seed: int = 0,
    adapters: str | Path | None = None,
    max_shard_bytes: int,
    on_tensor: Callable[[], Any] = lambda: None,
) -> None:
    """Write a checkpoint anew, as safetensors.

    Args:
        source: folder to read; its tokenizer is copied too, and a language model's
            settings for generation.
        target: folder to make or, if it is a checkpoint already, to replace.
        dtype: to store; the widest in the source by default.
        head: "scalar" makes a reward model or critic of a language model: its head is
            left out and a new one is drawn.
        family: name of the module of a family of your own.
        seed: of a new head.
        adapters: folder in PEFT's layout, to be added to the matrices; and to take a
            scalar head from, if it has one.
        max_shard_bytes: of one file; a larger tensor gets its own.
        on_tensor: called after each tensor.

    Raises:
        FileExistsError: if the target holds something that is not a checkpoint.
        FileNotFoundError, ValueError: if the source is not whole, or cannot become
            what is asked for.
    """
    source, new = Path(source), NewFolder(target)
    with (
        _opened(source, family) as (own, files, own_shapes),
        contextlib.ExitStack() as opened,
    ):
        config = _with_head(source, own, head)
        added = None
        if adapters is not None:
            added = opened.enter_context(Updates(adapters, config))
        # With a new head it is not what it was trained to be.
        is_same = config.head == own.head
        role = checkpoint_config.read_role(source) if is_same else None
        found = [FLOATS[files.dtype(name)] for name in own_shapes]
        dtype = dtype or max(found, key=lambda one: one.itemsize)
        check_stored_dtype(dtype)
        shapes = needed_shapes(*_trees(config))
        plan = plan_files(shapes.items(), dtype, max_shard_bytes)

        def array(name: str) -> np.ndarray:
            on_tensor()
            if added is not None and (score := added.score(name)) is not None:
                return _cast(name, score, dtype)
            if name in own_shapes:
                whole = files.read(name, tuple(map(slice, shapes[name])))
                if added is not None and (update := added.of(name)) is not None:
                    whole = whole.astype(np.float32) + update
                return _cast(name, whole, dtype)
            generator = np.random.default_rng(seed)
            return INIT_DEVIATION * generator.standard_normal(shapes[name], np.float32)

        try:
            partial = new.begin()
            checkpoint_config.write_config(partial, config, dtype=dtype, role=role)
            write_index(partial, plan, dtype)
            for planned in plan:
                write_file(partial, planned, map(array, planned.shapes), dtype)
            _copy_texts(source, partial, config)
            new.finish()
        except BaseException:
            new.discard()
            raise


def _copy_texts(source: Path, target: Path, config: ModelConfig) -> None:
    """Copy the files of the tokenizer, and settings of generation."""
    is_language = config.head == "language"
    for name in (*TOKENIZER_FILES, *is_language * (GENERATION_FILE,)):
        if (source / name).is_file():
            shutil.copy(source / name, target)


@contextlib.contextmanager
def _opened(
    folder: Path, family: str | None
) -> Iterator[tuple[ModelConfig, TensorFiles, dict[str, tuple[int, ...]]]]:
    """Open a checkpoint: its config, tensors, and the shapes of those it needs."""
    config = checkpoint_config.read_config(folder, family=family)
    abstract, stored = _trees(config)
    with open_checked(folder, config, abstract, stored) as files:
        yield config, files, needed_shapes(abstract, stored)


def _trees(config: ModelConfig) -> tuple[Any, Any]:
    stored = families.family(config.family).stored_tensors(config)
    return abstract_parameters(config), stored


def _with_head(folder: Path, config: ModelConfig, head: str | None) -> ModelConfig:
    if head not in (None, "language", "scalar"):
        raise ValueError(f"head is {head!r}; it must be 'language' or 'scalar'.")
    if config.head == "scalar" and head == "language":
        raise ValueError(
            f"{folder} holds a model with a scalar head, and its language head is lost."
            " Give the folder of a language model."
        )
    return dataclasses.replace(config, head=head or config.head)


def _names_by_kind(config: ModelConfig) -> dict[str, list[str]]:
    """Return names of stored tensors by what they are: attention, embedding, norms."""
    abstract, stored = _trees(config)
    parameters = jax.tree.leaves(abstract, is_leaf=is_parameter)
    leaves, _ = jax.tree_util.tree_flatten_with_path(stored, is_leaf=is_stored)
    kinds: dict[str, dict[str, None]] = {}
    for (path, tensor), parameter in zip(leaves, parameters, strict=True):
        keys = [entry.key for entry in path if entry.key != "layers"]
        kind = "norms" if any("norm" in key for key in keys) else keys[0]
        names = dict.fromkeys(tensor.names(parameter.real_shape))
        kinds.setdefault(kind, {}).update(names)
    return {kind: list(names) for kind, names in kinds.items()}


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Cast a tensor, refusing to make infinities."""
    if jnp.finfo(dtype).max >= jnp.finfo(array.dtype).max:
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if (np.isinf(result) & np.isfinite(array)).any():
        raise ValueError(
            f"The tensor {name!r} holds numbers that are too large for {dtype.name}."
            " Choose bfloat16 or float32."
        )
    return result


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Cut a tensor into blocks of rows."""
    if not shape:
        yield ()
        return
    for start in range(0, shape[0], _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, shape[0])
        yield (slice(start, stop), *map(slice, shape[1:]))


def _refuse_not_finite(
    name: str, path: Path, block: np.ndarray, box: tuple[slice, ...]
) -> None:
    is_finite = np.isfinite(block)
    if is_finite.all():
        return
    place = [int(i) for i in np.argwhere(~is_finite)[0]]
    if box:
        place[0] += box[0].start
    raise ValueError(
        f"{path}: tensor {name!r} holds numbers that are not finite, the first at"
        f" {place}. The model that was saved had diverged, or the file is broken."
    )
