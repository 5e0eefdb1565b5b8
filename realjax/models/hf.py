"""Checkpoints in Hugging Face's format: read straight into shardings, written whole.

Reading never holds a model in host memory: of every parameter each device's part is
read from the files, a chunk at a time, and put there. Writing holds one tensor at a
time, and the folder appears under its name only when complete.

    load, check, save                       here
    read_config, write_config, read_role    config.json
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from realjax.core.arrays import Array, Key, PyTree
from realjax.core.shared_folder import wait_to_see
from realjax.models import families, layout
from realjax.models.block import INIT_DEVIATION
from realjax.models.byte_ranges import FLOATS
from realjax.models.checkpoint_config import (
    CONFIG_FILE,
    read_config,
    read_fields,
    read_role,
    write_config,
)
from realjax.models.config import ModelConfig
from realjax.models.families import family
from realjax.models.gathering import (
    Agreement,
    Source,
    alone,
    gather,
    stored_sources,
    writers,
)
from realjax.models.labels import label_part
from realjax.models.layout import Box, Stored
from realjax.models.new_folder import NewFolder
from realjax.models.parameters import Parameter, abstract_parameters
from realjax.models.streaming import Reader, stream
from realjax.models.tensor_checks import (
    check_parameters,
    is_parameter,
    is_stored,
    open_checked,
)
from realjax.models.tensor_files import TensorFiles
from realjax.models.tensor_writer import (
    PlannedFile,
    check_stored_dtype,
    plan_files,
    write_file,
    write_index,
)

__all__ = [
    "MAX_SHARD_BYTES",
    "SavesItself",
    "check",
    "load",
    "read_config",
    "read_role",
    "save",
    "write_config",
]

MAX_SHARD_BYTES = 5 * 10**9


@runtime_checkable
class SavesItself(Protocol):
    """A tokenizer, as far as this module is concerned."""

    def save(self, folder: Path) -> Any:
        """Write its files into a folder."""


def load(
    folder: str | Path,
    *,
    config: ModelConfig | None = None,
    shardings: PyTree | None = None,
    head: str | None = None,
    label: str = "",
    key: Key[Array, ""] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> PyTree:
    """Load a checkpoint's parameters: of a policy, a reward model or a critic.

    In a run of several processes all of them call this, and each reads what its own
    devices hold.

    Args:
        folder: with config.json, and safetensors or .bin files.
        config: of the model wanted; the checkpoint's own if None.
        shardings: one per parameter; all on this process's first device if None.
        head: "scalar" turns a language checkpoint into a reward model or critic: its
            head is left out and a new one is drawn from `key`.
        label: of a sequence classifier, by name or number: its row of the head is the
            scalar head. "" is the only one.
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
    own, config = _wanted_config(folder, config, head, label)
    if _is_new_head(own, config) and key is None:
        raise ValueError(
            f"{folder} holds a language model; with head='scalar' a new head is drawn,"
            " which needs a `key`."
        )
    if shardings is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(
            lambda _: device, abstract_parameters(config), is_leaf=is_parameter
        )
    wanted = dict(cast(dict, shardings))
    new_head_sharding = None
    if _is_new_head(own, config):
        new_head_sharding = wanted.pop("score")["kernel"]
    abstract, stored = _read_trees(folder, own, config, label)
    with open_checked(folder, config, abstract, stored) as files:
        parameters = jax.tree.map(
            lambda parameter, tensor, sharding: _load_parameter(
                files, parameter, tensor, sharding, jnp.dtype(dtype)
            ),
            abstract,
            stored,
            wanted,
            is_leaf=is_parameter,
        )
    if new_head_sharding is not None:
        assert key is not None  # Checked above.
        kernel = _draw_scalar_head(config.width, key, new_head_sharding, dtype)
        parameters["score"] = {"kernel": kernel}
    return parameters


def check(
    folder: str | Path,
    *,
    config: ModelConfig | None = None,
    head: str | None = None,
    label: str = "",
) -> None:
    """Check all that `load` would, in moments: of the tensors only names and shapes.

    Raises:
        FileNotFoundError, ValueError: as `load` does.
    """
    own, config = _wanted_config(folder, config, head, label)
    abstract, stored = _read_trees(folder, own, config, label)
    open_checked(folder, config, abstract, stored).close()


def save(
    folder: str | Path,
    config: ModelConfig,
    parameters: PyTree,
    *,
    tokenizer: SavesItself | None = None,
    role: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: DTypeLike = jnp.float32,
    agreement: Agreement | None = None,
) -> None:
    """Write a checkpoint that transformers and vLLM load, all of it or nothing.

    In a run of several processes all of them call this, with a folder that all of them
    see; those whose devices hold the parameters write some of the files each.

    Args:
        folder: to make or, if it is a checkpoint already, to replace.
        config: of the model.
        parameters: on any devices, also of several processes; handles in those that
            hold nothing of them.
        tokenizer: saved into the folder too.
        role: what the model was trained to be, noted in config.json; see `read_role`.
        max_shard_bytes: of one safetensors file; a larger tensor gets its own.
        dtype: to store; float32 keeps the masters exactly.
        agreement: of the processes; needed if there are several.

    Raises:
        FileExistsError: if the folder holds something that is not a checkpoint.
        ValueError: if the parameters are not those of the config, or cannot be stored
            as `dtype`, or if there are several processes and no agreement.
    """
    agreement = agreement or alone()
    new, dtype = agreement.together(lambda: NewFolder(folder)), jnp.dtype(dtype)
    check_stored_dtype(dtype)
    check_parameters(config, parameters)
    family(config.family).write_config(config)  # Refuses what its files cannot say.
    sources = _stored_sources(config, parameters)
    shapes = [
        (name, layout.stored_shape(parts[0].tensor, parts[0].shape))
        for name, parts in sources.items()
    ]
    plan = plan_files(shapes, dtype, max_shard_bytes)
    owners = writers(parameters, agreement)
    is_first = jax.process_index() == owners[0]

    def begin() -> None:
        partial = new.begin()
        # A policy ends its texts as its tokenizer says, which may be another's.
        eos_ids = getattr(tokenizer, "eos_ids", ())
        write_config(partial, config, dtype=dtype, role=role, eos_ids=eos_ids)
        write_index(partial, plan, dtype)
        if tokenizer is not None:
            tokenizer.save(partial)

    agreement.together(begin if is_first else lambda: None)
    agreement.together(lambda: wait_to_see(new.partial / CONFIG_FILE))
    agreement.together(lambda: _write_all(new.partial, plan, sources, dtype, owners))
    agreement.together(new.finish if is_first else lambda: None)


def _wanted_config(
    folder: str | Path, config: ModelConfig | None, head: str | None, label: str
) -> tuple[ModelConfig, ModelConfig]:
    """Return the checkpoint's own config, and that of the model to load from it."""
    # Only a family of one's own is not known by what the folder says.
    is_foreign = config is not None and families.is_own(config.family)
    family_name = config.family if config and is_foreign else None
    own = read_config(folder, family=family_name, label=label)
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


def _read_trees(
    folder: str | Path, own: ModelConfig, config: ModelConfig, label: str
) -> tuple[PyTree, PyTree]:
    """Return parameters and stored tensors that are read, without a head to draw."""
    abstract = abstract_parameters(config)
    stored = family(config.family).stored_tensors(config)
    if _is_new_head(own, config):
        del abstract["score"], stored["score"]
    elif label:
        part = label_part(read_fields(folder), label)
        stored["score"] = {"kernel": stored["score"]["kernel"]._replace(part=part)}
    return abstract, stored


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
    if not sharding.addressable_devices:
        return jax.make_array_from_single_device_arrays(
            (width, 1), sharding, [], dtype=dtype
        )

    def draw(key: Array) -> Array:
        kernel = jax.random.normal(key, (width, 1), jnp.float32)
        return (INIT_DEVIATION * kernel).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)(key)


def _stored_sources(config: ModelConfig, parameters: PyTree) -> dict[str, list[Source]]:
    """Return what every stored tensor is made of."""
    stored = family(config.family).stored_tensors(config)
    tensors, structure = jax.tree.flatten(stored, is_leaf=is_stored)
    arrays = structure.flatten_up_to(parameters)
    abstract = structure.flatten_up_to(abstract_parameters(config))
    shapes = [parameter.real_shape for parameter in abstract]
    return stored_sources(list(zip(tensors, arrays, shapes, strict=True)))


def _write_all(
    folder: Path,
    plan: Sequence[PlannedFile],
    sources: dict[str, list[Source]],
    dtype: np.dtype,
    owners: Sequence[int],
) -> None:
    """Write this process's share of the files, of what the owners gather together."""
    failure: Exception | None = None
    for number, planned in enumerate(plan):
        parts = [sources[name] for name in planned.shapes]
        owner = owners[number % len(owners)]
        is_writing = jax.process_index() == owner and failure is None
        arrays = (gather(each, dtype, is_wanted=is_writing) for each in parts)
        try:
            if is_writing:
                write_file(folder, planned, cast(Any, arrays), dtype)
        except Exception as error:
            if len(owners) == 1:
                raise
            failure = error
        # The others' files need this process's devices, also when it has failed.
        for _ in arrays:
            pass
    if failure is not None:
        raise failure
