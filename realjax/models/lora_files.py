"""Folders of adapters in the layout of Hugging Face's PEFT.

    adapter_config.json          rank, scale, which modules have one
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight [rank, inputs]
                                 base_model.model.<module>.lora_B.weight [outputs, rank]

A model with a scalar head has that there, too, as "base_model.model.score.weight".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from realjax.core.arrays import PyTree
from realjax.core.shared_folder import wait_to_see
from realjax.models import layout, lora
from realjax.models.config import ModelConfig
from realjax.models.gathering import (
    Agreement,
    Source,
    alone,
    gather,
    stored_sources,
    writers,
)
from realjax.models.layout import Box, Stored
from realjax.models.new_folder import NewFolder
from realjax.models.parameters import abstract_parameters, split
from realjax.models.tensor_checks import is_parameter, is_stored, needed_shapes
from realjax.models.tensor_files import TensorFiles
from realjax.models.tensor_writer import PlannedFile, check_stored_dtype, write_file

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
OLD_FILE = "adapter_model.bin"

_PREFIX = "base_model.model."
_TASKS = {"language": "CAUSAL_LM", "scalar": "SEQ_CLS"}
# What would change what the model computes, and the values with which it does not.
_REFUSED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others change the base, too.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    **dict.fromkeys(
        ("use_dora", "use_qalora", "use_bdlora", "lora_bias"), (False, None)
    ),
    **dict.fromkeys(
        (
            *("layer_replication", "target_parameters", "trainable_token_indices"),
            *("alora_invocation_tokens", "arrow_config", "kasa_config"),
            *("velora_config", "monteclora_config"),
        ),
        (None, [], {}),
    ),
}


def stored_adapters(config: ModelConfig) -> PyTree:
    """Return the tree of what is trained with a `Stored` in the place of every array.

    A and B are stored as PyTorch stores matrices, [outputs, inputs], also beside those
    that GPT-2 stores the other way round.

    Args:
        config: of a model with adapters.
    """
    adapters = config.adapters
    assert adapters is not None
    layers: dict[str, Any] = {}
    for name, (group, kernel) in lora.places(config).items():
        if name not in adapters.targets:
            continue
        module = _PREFIX + kernel.name.removesuffix(".weight")
        inputs, outputs = _sides(kernel)
        count = len(inputs)
        first = Stored(f"{module}.lora_A.weight", ((count,), inputs))
        rows = tuple(dimension - count + 1 for dimension in outputs)
        part = None if kernel.part is None else (0, *kernel.part[1:])
        second = Stored(f"{module}.lora_B.weight", (rows, (0,)), part)
        of_group = layers.setdefault(group, {})
        is_shared = adapters.shares_input and name in lora.HEADS
        if is_shared:
            of_group["lora_a"] = first
        of_group[name] = {"lora_b": second} | ({} if is_shared else {"lora_a": first})
    tree: dict[str, Any] = {"layers": layers}
    if config.head == "scalar":
        score = lora.stored_score(config)
        tree["score"] = {"kernel": score._replace(name=_PREFIX + score.name)}
    return tree


def read_adapters(folder: str | Path, base: ModelConfig) -> ModelConfig:
    """Return a model with the adapters of a folder, as its config describes them.

    Which projections have one is read from the names of its tensors.

    Args:
        folder: in PEFT's layout.
        base: the model they were made for.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing.
        ValueError: for a field or a tensor that is not understood; it is named.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: {folder} holds no adapters.")
    try:
        fields = json.loads(path.read_text())
        rank, alpha = int(fields["r"]), float(fields["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no config of adapters ({error!r}).") from error
    for name, harmless in _REFUSED.items():
        if name in fields and fields[name] not in harmless:
            raise ValueError(
                f"{path}: {name} is {fields[name]!r}, which is not supported; it must"
                f" be {harmless[0]!r}."
            )
    with _open(folder) as files:
        names = files.names
    modules = {
        place.module: name
        for name, place in lora.places(base).items()
        if place.kernel.num_stacked == 1
    }
    first = {f"{_PREFIX}{m.format(layer=0)}.lora_A.weight": m for m in modules}
    found = [module for name, module in first.items() if name in names]
    if not found:
        raise ValueError(
            f"{path.parent} has no adapter of a projection of this model: its first"
            f" tensor is {min(names, default='missing')!r}, and {min(first)!r} was one"
            " of those looked for. Was it made for another model?"
        )
    return lora.with_adapters(
        base,
        rank=rank,
        alpha=alpha,
        targets=found,
        is_rank_stabilized=bool(fields.get("use_rslora", False)),
    )


def check_adapters(folder: str | Path, config: ModelConfig) -> None:
    """Check all that `load_adapters` would, in moments: only names and shapes.

    Raises:
        FileNotFoundError, ValueError: as `load_adapters` does.
    """
    _open_checked(folder, config).close()


def has_score(folder: str | Path, config: ModelConfig) -> bool:
    """Whether a scalar head is there, beside adapters of a model that has one."""
    with _open(folder) as files:
        return _PREFIX + lora.stored_score(config).name in files.names


def load_adapters(
    folder: str | Path,
    config: ModelConfig,
    *,
    shardings: PyTree | None = None,
    dtype: DTypeLike = jnp.float32,
) -> PyTree:
    """Load adapters, and the scalar head if one was trained with them.

    Args:
        folder: in PEFT's layout.
        config: of the model with adapters, as `read_adapters` gives it.
        shardings: of what is trained; all on this process's first device if None.
        dtype: of the result.

    Returns:
        The part of the parameter tree that is trained, without a scalar head that is
        not there.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if a tensor is missing, unknown or of another shape than the config
            says.
    """
    with _open_checked(folder, config) as files:
        abstract, stored = _trees(files, config)
        if shardings is None:
            device = SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: device, abstract, is_leaf=is_parameter)
        given: Any = shardings
        wanted = {name: given[name] for name in abstract}

        def load(parameter: Any, tensor: Stored, sharding: Any) -> Any:
            def read(index: Any) -> np.ndarray:
                box: Box = tuple(
                    slice(*s.indices(n)[:2])
                    for s, n in zip(index, parameter.shape, strict=True)
                )
                return layout.read_parameter(
                    tensor, parameter.real_shape, box, files.read, jnp.dtype(dtype)
                )

            return jax.make_array_from_callback(
                parameter.shape, sharding, read, dtype=jnp.dtype(dtype)
            )

        return jax.tree.map(load, abstract, stored, wanted, is_leaf=is_parameter)


def save_adapters(
    folder: str | Path,
    config: ModelConfig,
    parameters: PyTree,
    *,
    base: str = "",
    dtype: DTypeLike = jnp.float32,
    agreement: Agreement | None = None,
) -> None:
    """Write adapters that PEFT loads, all of them or nothing.

    In a run of several processes all of them call this, as `hf.save`.

    Args:
        folder: to make or, if it holds adapters already, to replace.
        config: of the model, with adapters.
        parameters: of the model, all or what is trained, on any devices.
        base: name or folder of the model beside which they stand, for PEFT to find.
        dtype: to store.
        agreement: of the processes; needed if there are several.

    Raises:
        FileExistsError: if the folder holds something else.
        ValueError: if the model has no adapters, or the type cannot be stored.
    """
    if config.adapters is None:
        raise ValueError("The model has no adapters to save. Save it as a whole.")
    agreement, dtype = agreement or alone(), jnp.dtype(dtype)
    check_stored_dtype(dtype)
    new = agreement.together(lambda: NewFolder(folder, config_file=ADAPTER_CONFIG))
    trained, _ = split(parameters, config)
    sources = _sources(config, trained)
    shapes = {
        name: layout.stored_shape(parts[0].tensor, parts[0].shape)
        for name, parts in sources.items()
    }
    owner, *_ = writers(trained, agreement)
    is_owner = jax.process_index() == owner
    planned = PlannedFile(ADAPTER_FILE, shapes)

    def begin() -> None:
        text = json.dumps(written_config(config, base), indent=2)
        (new.begin() / ADAPTER_CONFIG).write_text(text + "\n")

    def write() -> None:
        arrays: Any = (gather(s, dtype, is_wanted=is_owner) for s in sources.values())
        try:
            if is_owner:
                write_file(new.partial, planned, arrays, dtype)
        finally:
            for _ in arrays:  # The owner's items need the devices of all.
                pass

    agreement.together(begin if is_owner else lambda: None)
    agreement.together(lambda: wait_to_see(new.partial / ADAPTER_CONFIG))
    agreement.together(write)
    agreement.together(new.finish if is_owner else lambda: None)


def written_config(config: ModelConfig, base: str = "") -> dict[str, Any]:
    """Return the fields of an adapter_config.json, as PEFT has them.

    Args:
        config: of the model, with adapters.
        base: name or folder of the model beside which they stand.
    """
    adapters = config.adapters
    assert adapters is not None
    known, alpha = lora.places(config), float(adapters.alpha)
    is_scalar = config.head == "scalar"
    return {
        "peft_type": "LORA",
        "task_type": _TASKS[config.head],
        "base_model_name_or_path": base or None,
        "r": adapters.rank,
        # Whole numbers are written as such: some readers know no others.
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": adapters.dropout,
        "use_rslora": adapters.is_rank_stabilized,
        "target_modules": lora.module_ends(config),
        "modules_to_save": ["score"] if is_scalar else None,
        "fan_in_fan_out": any(is_transposed(known[n].kernel) for n in adapters.targets),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def is_transposed(kernel: Stored) -> bool:
    """Whether checkpoints store a projection as [inputs, outputs]."""
    return 0 in kernel.groups[0]


def _sides(kernel: Stored) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the dimensions of a kernel that are inputs, and those that are outputs."""
    first, second = kernel.groups
    return (first, second) if 0 in first else (second, first)


def _sources(config: ModelConfig, trained: PyTree) -> dict[str, list[Source]]:
    stored = stored_adapters(config)
    tensors, structure = jax.tree.flatten(stored, is_leaf=is_stored)
    arrays = structure.flatten_up_to(trained)
    abstract, _ = split(abstract_parameters(config), config)
    shapes = [leaf.real_shape for leaf in structure.flatten_up_to(abstract)]
    return stored_sources(list(zip(tensors, arrays, shapes, strict=True)))


def _open(folder: str | Path) -> TensorFiles:
    path = Path(folder)
    is_old = not (path / ADAPTER_FILE).is_file() and (path / OLD_FILE).is_file()
    file = OLD_FILE if is_old else ADAPTER_FILE
    if not (path / file).is_file():
        raise FileNotFoundError(f"{path} holds no {ADAPTER_FILE}.")
    return TensorFiles(path, file=file)


def _trees(files: TensorFiles, config: ModelConfig) -> tuple[PyTree, PyTree]:
    """Return parameters and stored tensors that are read."""
    abstract, _ = split(abstract_parameters(config), config)
    stored = stored_adapters(config)
    if "score" in stored and stored["score"]["kernel"].name not in files.names:
        del abstract["score"], stored["score"]
    return abstract, stored


def _open_checked(folder: str | Path, config: ModelConfig) -> TensorFiles:
    files = _open(folder)
    try:
        needed = needed_shapes(*_trees(files, config))
        _check(files, needed, config.family)
    except BaseException:
        files.close()
        raise
    return files


def _check(
    files: TensorFiles, needed: Mapping[str, tuple[int, ...]], family: str
) -> None:
    if missing := sorted(needed.keys() - files.names):
        raise ValueError(
            f"{files.folder} lacks {len(missing)} of {len(needed)} tensors of adapters"
            f" for this model, the first being {missing[0]!r}."
        )
    if extra := sorted(files.names - needed.keys()):
        raise ValueError(
            f"{files.folder} holds {len(extra)} tensors that adapters of this model of"
            f" family {family!r} do not have, the first being {extra[0]!r}."
        )
    for name, shape in needed.items():
        if files.shape(name) != shape:
            raise ValueError(
                f"{files.folder}: tensor {name!r} has shape {files.shape(name)}, and"
                f" {shape} was needed. Was it made for another model?"
            )
        files.check_dtype(name)


class Updates:
    """What the adapters of a folder add to stored tensors; a context manager.

    Attributes:
        config: of the model with these adapters.
    """

    def __init__(self, folder: str | Path, base: ModelConfig):
        """Open and check a folder.

        Args:
            folder: in PEFT's layout.
            base: the model beside which they stand.

        Raises:
            FileNotFoundError, ValueError: as `read_adapters` and `load_adapters` do.
        """
        self.config = read_adapters(folder, base)
        self._files = _open_checked(folder, self.config)
        self._transposed = {
            f"{place.module.format(layer=layer)}.weight": is_transposed(place.kernel)
            for place in lora.places(base).values()
            for layer in range(base.num_layers)
        }

    def __enter__(self) -> "Updates":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._files.close()

    def of(self, name: str) -> np.ndarray | None:
        """Return scale × A B, laid out as a stored matrix, float32; None without."""
        module = _PREFIX + name.removesuffix(".weight")
        names = [f"{module}.lora_{side}.weight" for side in "AB"]
        if names[0] not in self._files.names:
            return None
        first, second = (self._read(one).astype(np.float32) for one in names)
        assert self.config.adapters is not None
        update = np.float32(self.config.adapters.scale) * (second @ first)
        return update.T if self._transposed[name] else update

    def score(self, name: str) -> np.ndarray | None:
        """Return the scalar head of a stored tensor's name, if there is one."""
        is_score = name.startswith("score.") and _PREFIX + name in self._files.names
        return self._read(_PREFIX + name) if is_score else None

    def _read(self, name: str) -> np.ndarray:
        return self._files.read(name, tuple(map(slice, self._files.shape(name))))
