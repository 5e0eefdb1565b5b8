"""Whether a checkpoint has the tensors of its config, before one of them is read."""

import collections
from typing import Any

import jax

from realjax.core.arrays import PyTree
from realjax.models import layout
from realjax.models.config import ModelConfig
from realjax.models.families import family
from realjax.models.layout import Stored
from realjax.models.parameters import Parameter, abstract_parameters
from realjax.models.tensor_files import TensorFiles

_HEAD = "lm_head.weight"
_NUM_COMPARED_ROWS = 64


def is_parameter(node: Any) -> bool:
    """Tell leaves of the abstract tree, which are tuples, from containers."""
    return isinstance(node, Parameter)


def is_stored(node: Any) -> bool:
    """Tell leaves of the tree of stored tensors, which are tuples, from containers."""
    return isinstance(node, Stored)


def needed_shapes(abstract: PyTree, stored: PyTree) -> dict[str, tuple[int, ...]]:
    """Return name and shape of all stored tensors of a model."""
    needed: dict[str, tuple[int, ...]] = {}
    parameters = jax.tree.leaves(abstract, is_leaf=is_parameter)
    tensors = jax.tree.leaves(stored, is_leaf=is_stored)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        shape = parameter.real_shape
        for name in tensor.names(shape):
            needed[name] = layout.stored_shape(tensor, shape[tensor.num_stacked :])
    return needed


def open_checked(
    folder: Any, config: ModelConfig, abstract: PyTree, stored: PyTree
) -> TensorFiles:
    """Open a checkpoint's tensors, comparing names, shapes and types with the config's.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is broken, or a tensor is missing, unknown, of another
            shape, or of a type that is not read.
    """
    needed = needed_shapes(abstract, stored)
    files = TensorFiles(folder, needed)
    _adopt_prefix(files, needed)
    if missing := sorted(needed.keys() - files.names):
        raise ValueError(
            f"{files.folder} lacks {len(missing)} of {len(needed)} tensors that its"
            f" config needs, the first being {missing[0]!r}."
        )
    if extra := sorted(files.names - needed.keys() - ignored_names(files, config)):
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
    if config.head == "language" and config.tie_embeddings:
        _check_tied_head(files, stored["embedding"].name)
    return files


def ignored_names(files: TensorFiles, config: ModelConfig) -> set[str]:
    """Return the tensors that a model of this config does not use, and may have."""
    # A tied model may store its head again; a scalar one does not use it.
    has_own_head = config.head == "language" and not config.tie_embeddings
    ignored = family(config.family).IGNORED_TENSORS
    ignored += () if has_own_head else (_HEAD,)
    return {name for name in files.names if name.endswith(ignored)}


def check_parameters(config: ModelConfig, parameters: PyTree) -> None:
    """Compare a tree of arrays with what the config needs.

    Raises:
        ValueError: if a parameter is missing, unknown or of another shape.
    """
    needed, _ = jax.tree_util.tree_flatten_with_path(
        abstract_parameters(config), is_leaf=is_parameter
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


def _check_tied_head(files: TensorFiles, embedding: str) -> None:
    """Refuse a head beside an embedding that the config says is the head.

    transformers then uses the head that is there. Rows all over it are compared: one
    that was trained for itself differs everywhere.
    """
    if _HEAD not in files.names:
        return
    shape = files.shape(embedding)
    is_same = files.shape(_HEAD) == shape
    for number in range(_NUM_COMPARED_ROWS if is_same else 0):
        row = number * (shape[0] - 1) // (_NUM_COMPARED_ROWS - 1)
        box = (slice(row, row + 1), slice(0, shape[1]))
        is_same &= bool((files.read(_HEAD, box) == files.read(embedding, box)).all())
    if not is_same:
        raise ValueError(
            f"{files.path(_HEAD)}: the config says that the embedding is also the head"
            f" ('tie_word_embeddings'), but the tensor {_HEAD!r} is another than"
            f" {embedding!r}. Set the field to false, or remove the tensor."
        )


def _adopt_prefix(files: TensorFiles, needed: dict[str, tuple[int, ...]]) -> None:
    """Add the first part of all names where files were saved without it.

    Some checkpoints hold only what is inside the language model (the published GPT-2
    has "h.0.ln_1.weight" for "transformer.h.0.ln_1.weight").
    """
    firsts = collections.Counter(
        name.partition(".")[0] for name in needed if "." in name
    )
    prefix = f"{firsts.most_common(1)[0][0]}."
    if any(name.startswith(prefix) for name in files.names):
        return
    others = files.names - needed.keys() - {_HEAD}
    if any(prefix + name in needed for name in others):
        files.rename({name: prefix + name for name in others})
