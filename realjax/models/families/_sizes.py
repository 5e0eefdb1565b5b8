"""Published sizes of the families, looked up by name."""

from collections.abc import Mapping
from typing import Any

from realjax.models.config import ModelConfig

# Columns of the families' tables.
_COLUMNS = ("width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width")

# Name of a size -> what it has beside the shared fields, and the columns.
Table = Mapping[str, tuple[Mapping[str, Any], tuple[int, ...]]]


def published(family: str, label: str, table: Table, name: str) -> ModelConfig:
    """Return the config of a published size.

    Args:
        family: name of the module.
        label: the family's name in errors.
        table: its sizes.
        name: of one of them.

    Raises:
        ValueError: if there is no such size; the message lists those there are.
    """
    if name not in table:
        raise ValueError(
            f"There is no {label} of size {name!r}; known sizes are:"
            f" {', '.join(table)}."
        )
    fields, columns = table[name]
    sizes = dict(zip(_COLUMNS, columns, strict=True))
    return ModelConfig(family=family, **sizes, **fields)
