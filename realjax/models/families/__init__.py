"""Model families: what their checkpoints call things, and their published sizes.

A family is a module with

    read_config(fields) -> ModelConfig      fields of a parsed config.json
    write_config(config) -> fields          and back
    stored_tensors(config)                  the parameter tree of `Stored`s
    size(name) -> ModelConfig               published sizes
    IGNORED_TENSORS                         ends of names that files may have beside

The name of a module here is the `model_type` of its configs. A family of your own is a
module anywhere; `ModelConfig.family` is then its name, "my_package.my_family".
"""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

NEEDED = ("read_config", "write_config", "stored_tensors", "size", "IGNORED_TENSORS")


def names() -> list[str]:
    """Return the names of the families in this package."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if not name.startswith("_"))


def family(name: str | ModuleType) -> ModuleType:
    """Return the module of a family.

    Args:
        name: of one in this package; the name of another module, "package.module" as
            it is imported; or the module itself.

    Raises:
        ValueError: if there is no such family (the message lists those there are), or
            if the module lacks something.
    """
    module = name if isinstance(name, ModuleType) else _import(name)
    missing = [needed for needed in NEEDED if not hasattr(module, needed)]
    if missing:
        raise ValueError(
            f"The module {module.__name__!r} is no model family: it lacks"
            f" {', '.join(missing)}. A family defines {', '.join(NEEDED)}, as"
            " realjax/models/families/llama.py does."
        )
    return module


def named_in(fields: Mapping[str, Any]) -> ModuleType:
    """Return the module of the family that a config.json names.

    Only of this package: what is imported is not for a file to say.

    Raises:
        ValueError: if there is no such family.
    """
    name = fields.get("model_type")
    if name not in names():
        raise ValueError(_unknown(name))
    return family(name)


def is_own(name: str) -> bool:
    """Whether a family is somebody's own: not of this package."""
    return name not in names()


def _import(name: str) -> ModuleType:
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    parts = name.split(".")
    is_known = name in sys.modules or len(parts) > 1
    if not all(part.isidentifier() for part in parts) or not (
        is_known or importlib.util.find_spec(name)
    ):
        raise ValueError(_unknown(name))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"There is no module {name!r} for the model's family ({error}). It must be"
            " importable from where the program runs."
        ) from error


def _unknown(name: Any) -> str:
    return (
        f"Models of type {name!r} are not supported. Known families are:"
        f" {', '.join(names())}. One of your own is given by the name of its module, as"
        " `family`."
    )
