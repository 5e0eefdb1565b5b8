"""Logical axes: the names under which models speak of the dimensions of arrays.

A model never names a mesh. It says what each dimension of a parameter or of an
activation is, and passes activations through a `constrain` function; what a name
means on a mesh is a table elsewhere.
"""

from collections.abc import Callable

from realjax.core.arrays import Array

Axes = tuple[str | None, ...]
Constrain = Callable[[Array, Axes], Array]

EMBEDDED: Axes = ("wide_batch", "length", "embed")
RESIDUAL: Axes = ("batch", "length", "embed_act")
QUERY: Axes = ("batch", "length", "heads", "head_dim")
KEY_VALUE: Axes = ("batch", "length", "kv_heads", "head_dim")
MLP: Axes = ("batch", "length", "mlp")
ROUTER: Axes = ("batch", "length", None)
# Every device has the pages of its own rows, of all layers.
PAGES: Axes = (None, "pages", "kv_heads", "slots", "head_dim")
PAGE_SCALES: Axes = PAGES[:-1]
PAGE_TABLE: Axes = ("batch", None)
OF_ROWS: Axes = ("batch",)
OF_TOKENS: Axes = ("batch", "length")
SCALAR: Axes = ()


def unconstrained(x: Array, axes: Axes) -> Array:
    """Return `x` as it is: the `constrain` of a program without a mesh."""
    del axes
    return x
