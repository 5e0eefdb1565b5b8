"""Checkpoints in Hugging Face's format: read straight into shardings, written whole.

Reading never holds a model in host memory: of every parameter each device's part is
read from the files, laid out anew and put there. Writing holds one stacked parameter
and one file at a time, and the folder appears under its name only when complete.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Key, PyTree
from realjax.models import layout
from realjax.models.block import INIT_DEVIATION
from realjax.models.byte_ranges import FLOATS
from realjax.models.config import ModelConfig
from realjax.models.families import family
from realjax.models.gathering import (
    Source,
    gather,
    processes_of,
    stored_sources,
    wait_for_all,
)
from realjax.models.layout import Box, Stored
from realjax.models.parameters import Parameter, abstract_parameters
from realjax.models.streaming import Reader, stream
from realjax.models.tensor_files import TensorFiles
from realjax.models.tensor_writer import (
    PlannedFile,
    check_stored_dtype,
    plan_files,
    write_file,
    write_index,
)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
ROLE_FIELD = "realjax_role"
MAX_SHARD_BYTES = 5 * 10**9


@runtime_checkable
class SavesItself(Protocol):
    """A tokenizer, as far as this module is concerned."""

    def save(self, folder: Path) -> Any:
        """Write its files into a folder."""


def read_config(folder: str | Path) -> ModelConfig:
    """Read the config of a checkpoint folder.

    Raises:
        FileNotFoundError: if the folder or its config.json is missing.
        ValueError: if a field's value is not supported; the message names the field.
    """
    fields = _read_fields(Path(folder))
    fields.pop(ROLE_FIELD, None)
    try:
        return family(str(fields.get("model_type"))).read_config(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{Path(folder) / CONFIG_FILE}: {error}") from error


def write_config(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    role: str | None = None,
) -> None:
    """Write config.json, and for language models generation_config.json."""
    module = family(config.family)
    fields = module.write_config(config) | {"dtype": jnp.dtype(dtype).name}
    if role is not None:
        fields[ROLE_FIELD] = role
    _write_json(Path(folder) / CONFIG_FILE, fields)
    if config.head == "language":
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: fields[name] for name in names if fields[name] is not None}
        _write_json(Path(folder) / GENERATION_FILE, ids)


def load(
    folder: str | Path,
    *,
    config: ModelConfig | None = None,
    shardings: PyTree | None = None,
    head: str | None = None,
    key: Key[Array, ""] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> PyTree:
    """Load a checkpoint's parameters.

    Args:
        folder: with config.json and safetensors files.
        config: of the model wanted; the checkpoint's own if None.
        shardings: one per parameter; all on the first device if None.
        head: "scalar" turns a language checkpoint into a reward model or critic: its
            head is left out and a new one is drawn from `key`.
        key: only for a new scalar head.
        dtype: of the parameters.

    Returns:
        The tree of `abstract_parameters(config)`, with `head` as its head.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if a file is cut off, if a tensor is missing, unknown or of another
            shape than the config says, or if a head is asked for that the checkpoint
            does not have and `key` is None.
    """
    own, config = _wanted_config(folder, config, head)
    if _is_new_head(own, config) and key is None:
        raise ValueError(
            f"{folder} holds a language model; with head='scalar' a new head is drawn,"
            " which needs a `key`."
        )
    if shardings is None:
        device = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(
            lambda _: device, abstract_parameters(config), is_leaf=_is_parameter
        )
    wanted = dict(cast(dict, shardings))
    new_head_sharding = None
    if _is_new_head(own, config):
        new_head_sharding = wanted.pop("score")["kernel"]
    abstract, stored = _read_trees(own, config)
    with TensorFiles(folder, _needed_shapes(abstract, stored)) as files:
        _check_tensors(files, config, abstract, stored)
        parameters = jax.tree.map(
            lambda parameter, tensor, sharding: _load_parameter(
                files, parameter, tensor, sharding, jnp.dtype(dtype)
            ),
            abstract,
            stored,
            wanted,
            is_leaf=_is_parameter,
        )
    if new_head_sharding is not None:
        assert key is not None  # Checked above.
        kernel = _draw_scalar_head(config.width, key, new_head_sharding, dtype)
        parameters["score"] = {"kernel": kernel}
    return parameters


def check(
    folder: str | Path, *, config: ModelConfig | None = None, head: str | None = None
) -> None:
    """Check all that `load` would, in moments: of the tensors only names and shapes.

    Raises:
        FileNotFoundError, ValueError: as `load` does.
    """
    own, config = _wanted_config(folder, config, head)
    abstract, stored = _read_trees(own, config)
    with TensorFiles(folder, _needed_shapes(abstract, stored)) as files:
        _check_tensors(files, config, abstract, stored)


def save(
    folder: str | Path,
    config: ModelConfig,
    parameters: PyTree,
    *,
    tokenizer: SavesItself | None = None,
    role: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Write a checkpoint that transformers and vLLM load.

    Everything is written into a sibling folder that takes the name at the end: a
    process killed at any moment leaves the old checkpoint, if any, or the new one
    (between two renames: the old one as `.NAME.old`), never half of one.

    In a run of several processes all of them call this, with a folder that all of them
    see; each writes some of the files.

    Args:
        folder: to make or, if it is a checkpoint already, to replace.
        config: of the model.
        parameters: on any devices, also of several processes.
        tokenizer: saved into the folder too.
        role: what the model was trained to be, noted in config.json; see `read_role`.
        max_shard_bytes: of one safetensors file; a larger tensor gets its own.
        dtype: to store; float32 keeps the masters exactly.

    Raises:
        FileExistsError: if the folder holds something that is not a checkpoint.
        ValueError: if the parameters are not those of the config, or cannot be stored
            as `dtype`.
    """
    folder, dtype = Path(os.path.abspath(folder)), jnp.dtype(dtype)
    check_stored_dtype(dtype)
    _refuse_other_content(folder)
    _check_parameters(config, parameters)
    sources = _stored_sources(config, parameters)
    shapes = [
        (name, layout.stored_shape(parts[0].tensor, parts[0].shape))
        for name, parts in sources.items()
    ]
    plan = plan_files(shapes, dtype, max_shard_bytes)
    writers = processes_of(parameters)
    partial = folder.with_name(f".{folder.name}.partial")
    is_first = jax.process_index() == writers[0]
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_config(partial, config, dtype=dtype, role=role)
        write_index(partial, plan, dtype)
        if tokenizer is not None:
            tokenizer.save(partial)
    wait_for_all(f"{folder}: begun")
    _check_shared(partial)
    for number, planned in enumerate(plan):
        parts = [sources[name] for name in planned.shapes]
        _write_planned(partial, planned, parts, dtype, writers[number % len(writers)])
    wait_for_all(f"{folder}: written")
    if is_first:
        _replace(folder, partial)
    wait_for_all(f"{folder}: done")


def read_role(folder: str | Path) -> str | None:
    """Return what a checkpoint says its model was trained to be, if it says that.

    Critics and reward models are the same to `transformers`: a model for sequence
    classification with one label. realjax notes in config.json which it saved; the
    numbers of a critic are values of tokens, those of a reward model scores of whole
    texts.
    """
    return _read_fields(Path(folder)).get(ROLE_FIELD)


def _is_parameter(x: Any) -> bool:
    return isinstance(x, Parameter)


def _is_stored(x: Any) -> bool:
    return isinstance(x, Stored)


def _read_fields(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint folder {folder}.")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: it has no {CONFIG_FILE}."
        )
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not an object.")
    return fields


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _wanted_config(
    folder: str | Path, config: ModelConfig | None, head: str | None
) -> tuple[ModelConfig, ModelConfig]:
    """Return the checkpoint's own config, and that of the model to load from it."""
    own = read_config(folder)
    config = own if config is None else config
    if head is not None:
        config = dataclasses.replace(config, head=cast(Any, head))
    if own.head == "scalar" and config.head == "language":
        raise ValueError(
            f"{folder} holds a model with a scalar head, which cannot score the"
            " vocabulary. Give the folder of a language model."
        )
    return own, config


def _is_new_head(own: ModelConfig, config: ModelConfig) -> bool:
    return own.head == "language" and config.head == "scalar"


def _read_trees(own: ModelConfig, config: ModelConfig) -> tuple[PyTree, PyTree]:
    """Return parameters and stored tensors that are read, without a head to draw."""
    abstract = abstract_parameters(config)
    stored = family(config.family).stored_tensors(config)
    if _is_new_head(own, config):
        del abstract["score"], stored["score"]
    return abstract, stored


def _needed_shapes(abstract: PyTree, stored: PyTree) -> dict[str, tuple[int, ...]]:
    """Return name and shape of all stored tensors."""
    needed: dict[str, tuple[int, ...]] = {}
    parameters = jax.tree.leaves(abstract, is_leaf=_is_parameter)
    tensors = jax.tree.leaves(stored, is_leaf=_is_stored)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        shape = parameter.real_shape
        for name in tensor.names(shape):
            needed[name] = layout.stored_shape(tensor, shape[tensor.num_stacked :])
    return needed


def _check_tensors(
    files: TensorFiles, config: ModelConfig, abstract: PyTree, stored: PyTree
) -> None:
    """Compare names, shapes and types of all tensors with what the config needs."""
    needed = _needed_shapes(abstract, stored)
    if missing := sorted(needed.keys() - files.names):
        raise ValueError(
            f"{files.folder} lacks {len(missing)} of {len(needed)} tensors that its"
            f" config needs, the first being {missing[0]!r}."
        )
    # A tied model may store its head again; a scalar one does not use it.
    has_own_head = config.head == "language" and not config.tie_embeddings
    ignored = family(config.family).IGNORED_TENSORS
    ignored += () if has_own_head else ("lm_head.weight",)
    extra = sorted(
        name for name in files.names - needed.keys() if not name.endswith(ignored)
    )
    if extra:
        raise ValueError(
            f"{files.path(extra[0])} holds {len(extra)} tensors that a model of its"
            f" config does not have, the first being {extra[0]!r}."
        )
    for name, shape in needed.items():
        if files.shape(name) != shape:
            raise ValueError(
                f"{files.path(name)}: tensor {name!r} has shape {files.shape(name)},"
                f" but the config needs {shape}."
            )
        files.check_dtype(name)


def _load_parameter(
    files: TensorFiles,
    parameter: Parameter,
    tensor: Stored,
    sharding: Sharding,
    dtype: np.dtype,
) -> Array:
    """Read every addressable device's part of a parameter, equal parts once."""
    lead = tensor.num_stacked
    found = {FLOATS[files.dtype(name)] for name in tensor.names(parameter.real_shape)}
    # Narrow types travel as they are, if all have the same.
    is_narrow = len(found) == 1 and min(d.itemsize for d in found) < dtype.itemsize
    read_dtype = found.pop() if is_narrow else dtype

    def read(box: Box) -> np.ndarray:
        return layout.read_parameter(
            tensor, parameter.real_shape, box, files.read, read_dtype
        )

    order = (*range(lead), *(lead + dimension for dimension in tensor.order))
    reader = Reader(
        shape=parameter.shape,
        dtype=dtype,
        read=read,
        read_dtype=read_dtype,
        order=order,
        # Items are stored apart; of an item, the major dimension lies in whole blocks.
        cuts=order[: lead + 1],
    )
    return stream(reader, sharding)


def _draw_scalar_head(
    width: int, key: Array, sharding: Sharding, dtype: DTypeLike
) -> Array:
    def draw(key: Array) -> Array:
        kernel = jax.random.normal(key, (width, 1), jnp.float32)
        return (INIT_DEVIATION * kernel).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)(key)


def _stored_sources(config: ModelConfig, parameters: PyTree) -> dict[str, list[Source]]:
    """Return what every stored tensor is made of."""
    stored = family(config.family).stored_tensors(config)
    tensors, structure = jax.tree.flatten(stored, is_leaf=_is_stored)
    arrays = structure.flatten_up_to(parameters)
    abstract = structure.flatten_up_to(abstract_parameters(config))
    shapes = [parameter.real_shape for parameter in abstract]
    return stored_sources(list(zip(tensors, arrays, shapes, strict=True)))


def _write_planned(
    folder: Path,
    planned: PlannedFile,
    parts: list[list[Source]],
    dtype: np.dtype,
    owner: int,
) -> None:
    """Write a file, if this process is its owner, of what all gather."""
    is_owner = jax.process_index() == owner
    arrays = (gather(sources, dtype, is_wanted=is_owner) for sources in parts)
    if is_owner:
        write_file(folder, planned, cast(Any, arrays), dtype)
        return
    for _ in arrays:
        pass


def _check_shared(partial: Path) -> None:
    if not (partial / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"Process {jax.process_index()} does not see the folder {partial} that"
            " another process has made. Save to a file system that all processes share."
        )


def _replace(folder: Path, partial: Path) -> None:
    """Give a finished folder its name."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _check_parameters(config: ModelConfig, parameters: PyTree) -> None:
    """Compare the tree with what the config needs."""
    needed, _ = jax.tree_util.tree_flatten_with_path(
        abstract_parameters(config), is_leaf=_is_parameter
    )
    found, _ = jax.tree_util.tree_flatten_with_path(parameters)
    shapes = {jax.tree_util.keystr(path): array.shape for path, array in found}
    for path, parameter in needed:
        name = jax.tree_util.keystr(path)
        if name not in shapes:
            raise ValueError(
                f"The parameter tree lacks {name}, which its config needs."
            )
        shape = shapes.pop(name)
        if shape != parameter.shape:
            raise ValueError(
                f"The parameter {name} has shape {shape}, but its config needs"
                f" {parameter.shape}."
            )
    if shapes:
        raise ValueError(
            f"The parameter tree has {next(iter(shapes))}, which its config does not"
            " know."
        )


def _refuse_other_content(folder: Path) -> None:
    if (
        folder.is_dir()
        and any(folder.iterdir())
        and not (folder / CONFIG_FILE).exists()
    ):
        raise FileExistsError(
            f"{folder} is not empty and holds no {CONFIG_FILE}; it will not be replaced"
            " by a checkpoint. Choose another folder."
        )
