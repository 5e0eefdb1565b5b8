"""Model families: what their checkpoints call things, and their published sizes.

A family is a module with `read_config`, `write_config`, `stored_tensors`, `size` and
`IGNORED_TENSORS`; the name of the module is the `model_type` of its configs.
"""

import importlib
import pkgutil
from types import ModuleType


def family(name: str) -> ModuleType:
    """Import the module of a family.

    Raises:
        ValueError: if there is no such family; the message lists those there are.
    """
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in known:
        raise ValueError(
            f"Models of type {name!r} are not supported. Known families are:"
            f" {', '.join(known)}."
        )
    return importlib.import_module(f"{__name__}.{name}")
