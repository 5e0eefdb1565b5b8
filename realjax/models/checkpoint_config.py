"""The config.json of a checkpoint folder: which model it holds, and what for."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from realjax.models import families
from realjax.models.config import ModelConfig
from realjax.models.families._fields import read_ids
from realjax.models.labels import with_one_label

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
ROLE_FIELD = "realjax_role"


def read_config(
    folder: str | Path,
    *,
    family: str | ModuleType | None = None,
    label: str = "",
) -> ModelConfig:
    """Read the config of a checkpoint folder.

    The ids that end a text are those of config.json and of generation_config.json:
    chat models name some of theirs only there.

    Args:
        folder: with a config.json.
        family: for a family of your own, its module or that module's name; by default
            the one that the config names.
        label: of a sequence classifier, by name or number; its logit is the score. ""
            is the only one.

    Raises:
        FileNotFoundError: if the folder or its config.json is missing.
        ValueError: if a field's value is not supported; the message names the field.
    """
    fields = read_fields(folder)
    fields.pop(ROLE_FIELD, None)
    try:
        fields = with_one_label(fields, label) if label else fields
        module = families.family(family) if family else families.named_in(fields)
        config = module.read_config(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{Path(folder) / CONFIG_FILE}: {error}") from error
    further = _generation_eos_ids(Path(folder) / GENERATION_FILE)
    eos_ids = tuple(dict.fromkeys((*config.eos_ids, *further)))
    return dataclasses.replace(config, eos_ids=eos_ids)


def write_config(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    role: str | None = None,
    eos_ids: Sequence[int] = (),
) -> None:
    """Write config.json, and for language models generation_config.json.

    Args:
        folder: to write into.
        config: of the model.
        dtype: that its tensors are stored as.
        role: what the model was trained to be, for `read_role`.
        eos_ids: ids that end a text beside those of the config, for generation.
    """
    module = families.family(config.family)
    fields = module.write_config(config)
    # The name in transformers 5, and that in 4.
    fields |= dict.fromkeys(("dtype", "torch_dtype"), jnp.dtype(dtype).name)
    if role is not None:
        fields[ROLE_FIELD] = role
    _write_json(Path(folder) / CONFIG_FILE, fields)
    if config.head == "language":
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: fields[name] for name in names if fields.get(name) is not None}
        all_eos = tuple(dict.fromkeys((*config.eos_ids, *eos_ids)))
        if all_eos != config.eos_ids:
            ids["eos_token_id"] = list(all_eos)
        _write_json(Path(folder) / GENERATION_FILE, ids)


def old_path(folder: Path) -> Path:
    """Return where a folder is for the moment in which another takes its name."""
    return folder.with_name(f".{folder.name}.old")


def read_role(folder: str | Path) -> str | None:
    """Return what a checkpoint says its model was trained to be, if it says that.

    Critics and reward models are the same to `transformers`: a model for sequence
    classification with one label. realjax notes in config.json which it saved; the
    numbers of a critic are values of tokens, those of a reward model scores of whole
    texts.
    """
    return read_fields(folder).get(ROLE_FIELD)


def read_fields(folder: str | Path) -> dict[str, Any]:
    """Read the fields of config.json, whatever they are.

    Raises:
        FileNotFoundError: if the folder or its config.json is missing.
        ValueError: if it is not an object of JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        old = old_path(folder)
        hint = f" What it held is in {old}: rename that." if old.is_dir() else ""
        raise FileNotFoundError(f"There is no checkpoint folder {folder}.{hint}")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: it has no {CONFIG_FILE}."
        )
    return _read_json(path)


def _generation_eos_ids(path: Path) -> tuple[int, ...]:
    if not path.is_file():
        return ()
    name = "eos_token_id"
    fields = _read_json(path)
    try:
        return read_ids(name, fields.get(name))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not an object.")
    return fields


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
