"""Checkpoints in Hugging Face's format: read straight into shardings, written whole.

Reading never holds a model in host memory: of every parameter each device's part is
read from the files, laid out anew and put there. Writing holds one stacked parameter
and one file at a time, and the folder appears under its name only when complete.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Key, PyTree
from realjax.models import layout
from realjax.models.config import ModelConfig
from realjax.models.families import family
from realjax.models.layout import Box, Stored
from realjax.models.tensor_files import TensorFiles, write_tensors
from realjax.models.transformer import (
    INIT_DEVIATION,
    Parameter,
    abstract_parameters,
)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
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
    try:
        return family(str(fields.get("model_type"))).read_config(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{Path(folder) / CONFIG_FILE}: {error}") from error


def write_config(
    folder: str | Path, config: ModelConfig, *, dtype: DTypeLike = jnp.float32
) -> None:
    """Write config.json, and for language models generation_config.json."""
    module = family(config.family)
    fields = module.write_config(config) | {"dtype": jnp.dtype(dtype).name}
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
    with TensorFiles(folder) as files:
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
    with TensorFiles(folder) as files:
        _check_tensors(files, config, *_read_trees(own, config))


def save(
    folder: str | Path,
    config: ModelConfig,
    parameters: PyTree,
    *,
    tokenizer: SavesItself | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Write a checkpoint that transformers and vLLM load.

    Everything is written into a sibling folder that takes the name at the end: a
    process killed at any moment leaves the old checkpoint, if any, or the new one
    (between two renames: the old one as `.NAME.old`), never half of one.

    Args:
        folder: to make or, if it is a checkpoint already, to replace.
        config: of the model.
        parameters: on any devices of this process.
        tokenizer: saved into the folder too.
        max_shard_bytes: of one safetensors file; a larger tensor gets its own.
        dtype: to store; float32 keeps the masters exactly.

    Raises:
        FileExistsError: if the folder holds something that is not a checkpoint.
        ValueError: if the parameters are not those of the config.
    """
    folder = Path(os.path.abspath(folder))
    _refuse_other_content(folder)
    _check_parameters(config, parameters)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_config(partial, config, dtype=dtype)
    tensors = _stored_arrays(config, parameters, jnp.dtype(dtype))
    write_tensors(partial, tensors, max_shard_bytes=max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(partial)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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


def _check_tensors(
    files: TensorFiles, config: ModelConfig, abstract: PyTree, stored: PyTree
) -> None:
    """Compare names and shapes of all tensors with what the config needs."""
    needed: dict[str, tuple[int, ...]] = {}
    parameters = jax.tree.leaves(abstract, is_leaf=_is_parameter)
    tensors = jax.tree.leaves(stored, is_leaf=_is_stored)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        shape = _real_shape(parameter)
        for name in tensor.names(shape):
            needed[name] = layout.stored_shape(tensor, shape[tensor.num_stacked :])
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


def _load_parameter(
    files: TensorFiles,
    parameter: Parameter,
    tensor: Stored,
    sharding: Sharding,
    dtype: np.dtype,
) -> Array:
    """Read every addressable device's part of a parameter, equal parts once."""
    parts: dict[tuple, np.ndarray] = {}

    def read(box: Box | None) -> np.ndarray:
        assert box is not None  # Only arrays without a shape have no box.
        bounds = tuple(
            s.indices(n)[:2] for s, n in zip(box, parameter.shape, strict=True)
        )
        if bounds not in parts:
            parts[bounds] = layout.read_parameter(
                tensor,
                _real_shape(parameter),
                tuple(slice(*bound) for bound in bounds),
                files.read,
                dtype,
            )
        return parts[bounds]

    return jax.make_array_from_callback(parameter.shape, sharding, read, dtype)


def _real_shape(parameter: Parameter) -> tuple[int, ...]:
    """Shape without padding."""
    return getattr(parameter, "real_shape", None) or parameter.shape


def _draw_scalar_head(
    width: int, key: Array, sharding: Sharding, dtype: DTypeLike
) -> Array:
    def draw(key: Array) -> Array:
        kernel = jax.random.normal(key, (width, 1), jnp.float32)
        return (INIT_DEVIATION * kernel).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)(key)


def _stored_arrays(
    config: ModelConfig, parameters: PyTree, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and array of every stored tensor, one parameter after the other."""
    stored = family(config.family).stored_tensors(config)
    tensors, structure = jax.tree.flatten(stored, is_leaf=_is_stored)
    arrays = structure.flatten_up_to(parameters)
    abstract = structure.flatten_up_to(abstract_parameters(config))
    leaves = list(zip(tensors, arrays, abstract, strict=True))
    for name in dict.fromkeys(tensor.name for tensor in tensors):
        group = [leaf for leaf in leaves if leaf[0].name == name]
        hosts = [
            (tensor, np.asarray(array)[tuple(map(slice, _real_shape(parameter)))])
            for tensor, array, parameter in group
        ]
        first, whole = hosts[0]
        for index in np.ndindex(whole.shape[: first.num_stacked]):
            parts = {
                tensor.part[1] if tensor.part else 0: layout.to_stored(
                    tensor, np.asarray(host[index], dtype)
                )
                for tensor, host in hosts
            }
            yield first.item_name(index), layout.join_parts(parts, first)


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
